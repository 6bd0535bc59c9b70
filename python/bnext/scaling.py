"""Gradients scaled by statistics of normalization: an option of every optimizer.

``SGD(model.named_parameters(), lr, scaling=BatchNormScaling(model))`` scales the gradient of each
weight whose output is normalized; `BNP` preconditions layers that have no normalization.
"""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bnext.nn import BatchNorm, Conv2d, InputStatistics, Linear, Residual, Sequential, _check
from bnext.nn.module import Array, Module, Parameter, number

__all__ = ["BNP", "BatchNormScaling", "GradientScaling"]


class GradientScaling:
    """Base class: gradients to be used instead of ``.grad`` for some of the parameters.

    Attributes
    ----------
    pairs : tuple of (str, str)
        Names of the two layers of each pair that was found in the model.
    """

    pairs: tuple[tuple[str, str], ...] = ()

    def parameters(self) -> list[Parameter]:
        """The parameters whose gradients are replaced."""
        raise NotImplementedError(f"{type(self).__name__}.parameters")

    def gradients(self) -> dict[Parameter, Array]:
        """New arrays for those that have a gradient; ``.grad`` stays as it is."""
        raise NotImplementedError(f"{type(self).__name__}.gradients")

    def state_dict(self) -> dict[str, Any]:
        """The options, and what decides the next gradients besides the model's state."""
        raise NotImplementedError(f"{type(self).__name__}.state_dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict` with the same keys; ValueError, and no change, if it is bad."""
        raise NotImplementedError(f"{type(self).__name__}.load_state_dict")

    def _shown(self) -> dict[str, Any]:
        """The arguments shown by `repr`."""
        return {}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
        pairs = "".join(f"\n  {first} -> {second}" for first, second in self.pairs)
        return f"{type(self).__name__}({options}){pairs}"


class _Normed(NamedTuple):
    """A layer and the BatchNorm of its output."""

    layer: Conv2d | Linear
    norm: BatchNorm


class BatchNormScaling(GradientScaling):
    r"""Scale the gradient of each weight row by the variance of the channel that it feeds.

    .. math::
        g_c \leftarrow s_c\, g_c, \qquad
        s_c = \Bigl(\frac{\sigma_c^2 + \varepsilon}{\text{ref}}\Bigr)^\alpha

    with the running variance and the eps of the `BatchNorm`. A weight before a BatchNorm has
    no effect by its length, :math:`\nabla L(kw) = \nabla L(w) / k`, so that a long row turns
    slowly: its angle moves by :math:`\eta / \lVert w \rVert^2`. The scaling measures that length by
    the standard deviation of the row's output. ``alpha=0`` is the plain gradient; 1/2 makes the
    gradient independent of the length; with 1 and ``ref=1`` the step of kw is k times that of w,
    and the scale of the initial weights no longer matters.

    Parameters
    ----------
    model : Module
        Searched for pairs: a `Conv2d` or `Linear` directly followed by a `BatchNorm` with running
        statistics in a `Sequential`, nested ones and those inside `Residual` included, and as the
        end of the body of a `Residual` with a norm. The output of a pair's layer goes nowhere else;
        a weight in use at several places is left out. After a `Linear`, the BatchNorm should
        normalize the last axis: with inputs (N, L, C), one of axis 1 is no pair, but taken for one
        if L is the number of output features.
    alpha : float, default 0.5
        In [0, 1].
    ref : "geometric_mean" or float > 0, default "geometric_mean"
        Of the layer's :math:`\sigma^2 + \varepsilon` by default: the rows of a layer become alike,
        and its learning rate is kept. 1: equivariant, see above.
    clip : (float, float) or None, default (0.1, 10)
        Limits of s. Equivariance needs None.
    divide_by_weight : bool, default False
        Also divide by max(\|weight of the BatchNorm\|, 0.1), after clipping. It undoes a weight of
        the BatchNorm that begins at zero on purpose.

    Raises
    ------
    ValueError
        If the model has no pair or an option is out of range.

    Notes
    -----
    Momentum and weight decay see the scaled gradient. Adam divides any constant scale out again:
    use it with SGD. A learning rate that the growth of the weights no longer slows down needs a
    schedule that falls (Arora, Li & Lyu, arXiv:1812.03981).

    Running variances begin at 1, which is no variance of anything. The share
    :math:`(1 - \text{momentum})^t` that this 1 still has after t batches is taken out, as Adam does
    with its moments. A BatchNorm that has seen no batch and yet has other variances, as after an
    import, is taken as it is, and so are statistics from `bnext.reestimate`. Of several banks, the
    one in use counts. Channels that are not normalized (`channel_mask`) keep s = 1.

    References
    ----------
    van Laarhoven, arXiv:1706.05350 (the effective learning rate); You, Gitman & Ginsburg,
    arXiv:1708.03888 (LARS, which measures the length by the norms of weight and gradient).

    Examples
    --------
    >>> from bnext import nn, optim
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm(8, activation="relu"), nn.Linear(8, 2))
    >>> scaling = BatchNormScaling(model, alpha=1)
    >>> scaling
    BatchNormScaling(alpha=1.0, ref='geometric_mean', clip=(0.1, 10.0), divide_by_weight=False)
      0 -> 1
    >>> optimizer = optim.SGD(model.named_parameters(), lr=0.1, scaling=scaling)
    """

    def __init__(
        self,
        model: Module,
        alpha: float = 0.5,
        *,
        ref: str | float = "geometric_mean",
        clip: tuple[float, float] | None = (0.1, 10.0),
        divide_by_weight: bool = False,
    ) -> None:
        self._set(alpha, ref, (0.0, np.inf) if clip is None else clip, divide_by_weight)
        found = {
            (first, second): _Normed(layer, norm)
            for first, layer, second, norm in _neighbours("BatchNormScaling", model)
            if isinstance(layer, Conv2d | Linear)
            and isinstance(norm, BatchNorm)
            and norm.track_running_stats
            and norm.num_features == len(layer.weight.data)
            # The channels of the normalization are the rows of the weight.
            and (isinstance(layer, Linear) or norm.channel_axis == 1)
        }
        if not found:
            raise ValueError(
                "BatchNormScaling: model: expected a Conv2d or Linear directly followed by a "
                "BatchNorm with running statistics in a Sequential, found none"
            )
        self.pairs = tuple(found)
        self._layers = list(found.values())

    def _set(self, alpha: Any, ref: Any, clip: Any, divide_by_weight: Any) -> None:
        """Check the options, then take them over."""
        kind = type(self).__name__
        if not 0 <= number(kind, "alpha", alpha) <= 1:
            raise ValueError(f"{kind}: alpha: expected a number in [0, 1], got {alpha!r}")
        if ref != "geometric_mean" and (
            isinstance(ref, str) or not 0 < number(kind, "ref", ref) < np.inf
        ):
            raise ValueError(
                f'{kind}: ref: expected "geometric_mean" or a finite number > 0, got {ref!r}'
            )
        if (
            np.shape(clip) != (2,)
            or not all(isinstance(limit, numbers.Real) for limit in clip)
            or not 0 <= clip[0] <= clip[1]
            or clip[1] == 0
            or clip[0] == np.inf
        ):
            raise ValueError(
                f"{kind}: clip: expected two numbers, 0 <= low <= high, 0 < high, got {clip!r}"
            )
        self.alpha = float(alpha)
        self.ref = ref if isinstance(ref, str) else float(ref)
        self.clip = (float(clip[0]), float(clip[1]))
        self.divide_by_weight = bool(divide_by_weight)

    def scales(self) -> dict[tuple[str, str], Array]:
        """The factors s of each pair's rows, as the next step will use them."""
        return {
            pair: self._scale(norm)
            for pair, (_, norm) in zip(self.pairs, self._layers, strict=True)
        }

    def _scale(self, norm: BatchNorm) -> Array:
        var = norm._collected_var() + norm.eps
        normalized = np.ones(len(var), bool) if norm.channel_mask is None else norm.channel_mask
        ref = self.ref
        if isinstance(ref, str):
            # A channel without variance has no say; s of all of them is 1 or 0 without others.
            positive = var[normalized & (var > 0)]
            ref = float(np.exp(np.log(positive).mean())) if positive.size else 1.0
        scale: Array = np.clip((var / ref) ** self.alpha, *self.clip)
        if self.divide_by_weight and norm.weight is not None:
            scale /= np.maximum(np.abs(norm.weight.data), 0.1)
        return np.where(normalized, scale, 1.0)

    def parameters(self) -> list[Parameter]:
        return [layer.weight for layer, _ in self._layers]

    def gradients(self) -> dict[Parameter, Array]:
        scaled = {}
        for (layer, _), scale in zip(self._layers, self.scales().values(), strict=True):
            grad = layer.weight.grad
            if grad is not None:
                rows = scale.astype(grad.dtype).reshape(-1, *[1] * (grad.ndim - 1))
                scaled[layer.weight] = grad * rows
        return scaled

    def state_dict(self) -> dict[str, Any]:
        fresh = {name: bank not in norm._given for name, norm, bank in self._averages()}
        # A list, as JSON gives it back.
        return {**self._options(), "clip": list(self.clip), **fresh}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values = {name: np.asarray(state[name]).tolist() for name in self._options()}
        self._set(**values)
        for name, norm, bank in self._averages():
            (norm._given.discard if state[name] else norm._given.add)(bank)

    def _averages(self) -> Iterator[tuple[str, BatchNorm, str | None]]:
        """Each running variance: what its origin is called in the state, its layer and bank."""
        for (first, _), (_, norm) in zip(self.pairs, self._layers, strict=True):
            norm._notice_given()
            for bank in norm.banks or (None,):
                yield f"fresh.{first}" + (f".{bank}" if bank else ""), norm, bank

    def _options(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "ref": self.ref,
            "clip": self.clip,
            "divide_by_weight": self.divide_by_weight,
        }

    def _shown(self) -> dict[str, Any]:
        clip = None if self.clip == (0, np.inf) else self.clip
        return {**self._options(), "clip": clip}


class _Observed(NamedTuple):
    """A layer with a bias and the statistics of its input."""

    statistics: InputStatistics
    layer: Conv2d | Linear
    bias: Parameter


class BNP(GradientScaling):
    r"""Batch normalization preconditioning: steps as if the layer's input were normalized.

    .. math::
        \Delta W = \frac{\partial W - \partial b\, \mu^\top}{\sigma^2 + \epsilon}, \qquad
        \Delta b = \partial b - \Delta W \mu

    take the place of the gradients, with the mean and variance of each input channel: plain
    gradient descent on W', b' of :math:`W' (x - \mu) / \sigma + b'`, written for W and b. Nothing
    is normalized in the forward pass, so that it works with batches of one sample, in training and
    evaluation alike. In a convolution each position of the kernel sees the channel's statistics,
    and :math:`\Delta W \mu` is summed over the positions.

    Parameters
    ----------
    model : Module
        Searched for pairs: an `InputStatistics` directly followed by a `Conv2d` or `Linear` with
        bias in a `Sequential`. A layer in use at several places is left out.
    eps : float, default 0.01
        :math:`\epsilon` as a share of the layer's largest variance, >= 0: a limit for inputs that
        hardly vary.

    Raises
    ------
    ValueError
        If the model has no pair or `eps` is out of range.

    References
    ----------
    Lange, Helfrich & Ye, "Batch normalization preconditioning for neural network training",
    JMLR 23 (2022).

    Examples
    --------
    >>> from bnext import nn, optim
    >>> model = nn.Sequential(
    ...     nn.InputStatistics(4), nn.Linear(4, 8), nn.ReLU(),
    ...     nn.InputStatistics(8), nn.Linear(8, 2),
    ... )
    >>> BNP(model)
    BNP(eps=0.01)
      0 -> 1
      3 -> 4
    >>> optimizer = optim.SGD(model.named_parameters(), lr=0.1, scaling=BNP(model))
    """

    def __init__(self, model: Module, *, eps: float = 0.01) -> None:
        self._set(eps)
        found = {
            (first, second): _Observed(statistics, layer, layer.bias)
            for first, statistics, second, layer in _neighbours("BNP", model)
            if isinstance(statistics, InputStatistics)
            and isinstance(layer, Conv2d | Linear)
            and layer.bias is not None
            and (isinstance(layer, Linear) or statistics.channel_axis == 1)
        }
        if not found:
            raise ValueError(
                "BNP: model: expected an InputStatistics directly followed by a Conv2d or Linear "
                "with bias in a Sequential, found none"
            )
        self.pairs = tuple(found)
        self._layers = list(found.values())

    def _set(self, eps: Any) -> None:
        if not 0 <= number("BNP", "eps", eps) < np.inf:
            raise ValueError(f"BNP: eps: expected a finite number >= 0, got {eps!r}")
        self.eps = float(eps)

    def parameters(self) -> list[Parameter]:
        return [parameter for _, layer, bias in self._layers for parameter in (layer.weight, bias)]

    def gradients(self) -> dict[Parameter, Array]:
        changed = {}
        for statistics, layer, bias in self._layers:
            var = statistics.running_var + self.eps * statistics.running_var.max()
            # Without any variance there are no coordinates to normalize.
            if layer.weight.grad is None or bias.grad is None or not var.any():
                continue
            var[var == 0] = np.inf  # a constant input: its weight stays, the bias does its work
            dtype = layer.weight.data.dtype
            groups = layer.groups if isinstance(layer, Conv2d) else 1
            # Rows of one group see the same inputs, at every position of the kernel.
            grad_w = layer.weight.grad.reshape(groups, len(bias.grad) // groups, -1)
            taps = grad_w.shape[2] * groups // statistics.num_features
            mean, inverse = (
                np.repeat(values.astype(dtype), taps).reshape(groups, 1, -1)
                for values in (statistics.running_mean, 1 / var)
            )
            grad_b = bias.grad.reshape(groups, -1, 1)
            step_w = (grad_w - grad_b * mean) * inverse
            step_b = grad_b - (step_w * mean).sum(axis=2, keepdims=True)
            changed[layer.weight] = step_w.reshape(layer.weight.data.shape)
            changed[bias] = step_b.reshape(bias.data.shape)
        return changed

    def state_dict(self) -> dict[str, Any]:
        return {"eps": self.eps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._set(float(state["eps"]))

    def _shown(self) -> dict[str, Any]:
        return {"eps": self.eps}


# -- finding pairs ---------------------------------------------------------------------
def _neighbours(kind: str, model: Module) -> Iterator[tuple[str, Module, str, Module]]:
    """Layers of which one gets the other's output and nobody else does, with their names."""
    places = list(_places("", _check.model(kind, model)))

    def parts(layer: Module) -> list[int]:
        return [id(part) for part in (layer, *layer.parameters())]

    uses = Counter(part for _, layer in places if layer is not None for part in parts(layer))
    for (first, before), (second, after) in pairwise(places):
        if before is not None and after is not None:
            if all(uses[part] == 1 for part in parts(before) + parts(after)):
                yield first, before, second, after


def _places(name: str, module: Module) -> Iterator[tuple[str, Module | None]]:
    """Layers in the order in which they work; None where another order or a branch begins."""
    # A BatchNorm's banks are no layers.
    children = {} if isinstance(module, BatchNorm) else module._modules
    if not children:
        yield name, module
    for chain in _chains(module, list(children)):
        if not isinstance(module, Sequential):
            yield name, None
        for child in chain:
            yield from _places(f"{name}.{child}" if name else child, children[child])
        if not isinstance(module, Sequential):
            yield name, None


def _chains(module: Module, children: list[str]) -> list[list[str]]:
    """The names of `children`, those together of which one gets the other's output."""
    if isinstance(module, Sequential):
        return [children]
    if isinstance(module, Residual) and module.norm is not None:
        return [["body", "norm"], *([name] for name in children if name not in ("body", "norm"))]
    return [[name] for name in children]
