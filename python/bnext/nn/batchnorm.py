"""Batch Normalization."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from bnext import _core
from bnext import functional as F
from bnext._dtypes import DATA, parameter_dtype
from bnext.nn import _check, _normalize
from bnext.nn._normalize import Pass
from bnext.nn._running_stats import RunningStats
from bnext.nn.module import Array, Backward, Mode, Module, Parameter, number
from bnext.random import Generator

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(RunningStats):
    r"""Normalize each channel over the batch, then scale and shift it.

    .. math:: y = \frac{x - E[x]}{\sqrt{Var[x] + eps}} \, weight + bias

    In training, E and Var are those of the batch (Var biased), and each forward pass
    moves the running statistics: ``running = (1 - momentum) * running + momentum * batch``
    with the unbiased variance. In evaluation they are the running statistics.

    Parameters
    ----------
    num_features : int
        C of the input.
    eps : float, default 1e-5
    momentum : float or None, default 0.1
        Weight of the new batch, in [0, 1]. None averages over all batches so far.
    affine : bool, default True
        Whether there are `weight` (ones) and `bias` (zeros); weight decay spares both.
    track_running_stats : bool, default True
        Without, evaluation uses the batch's statistics too.
    activation : str, optional
        Applied to y in the same pass over memory: one of `bnext.functional.activations`,
        such as "relu".
    negative_slope : float, default 0.01
        Of leaky_relu.
    dropout : float, default 0
        In training, probability of a zero, as `Dropout`, after the activation and in the same
        pass.
    generator : Generator, optional
        Where dropout draws from; `bnext.random.default_generator` if not given.
    channel_mask : array_like of bool (C,), optional
        Channels that are False are not normalized: ``y = weight * x + bias``. Their running
        statistics stay as they are.
    ghost_batch_size : int, optional
        In training, normalize groups of so many samples each by their own statistics (Hoffer et
        al. 2017). A remainder is spread over the groups. The running statistics see the groups
        one after the other.
    banks : iterable of str, optional
        Names of sets of running statistics, for batches from different domains; `bank` chooses.
        There is then no set without a name, and the first is in use.
    channel_axis : 1 or -1, default 1
    dtype : float32 or float64, default float32
        Of parameters and running statistics. The input of a float64 layer is float64; that of
        others float32, float16 or bfloat16.

    Attributes
    ----------
    update_stats : bool
        Whether forward passes in training move the running statistics; see `stats_updates`.
    consistent : bool
        Of dropout, as that of `Dropout`.

    Shape: (N, C, *) -> (N, C, *), or (N, *, C) with channel_axis -1.

    Raises
    ------
    ValueError
        In training, if a channel has one value only: there is nothing to normalize.

    Warns
    -----
    RuntimeWarning
        If a batch's statistics are not finite; the running statistics stay as they are.

    References
    ----------
    Ioffe & Szegedy, "Batch normalization", arXiv:1502.03167. Hoffer et al., "Train longer,
    generalize better", arXiv:1705.08741.

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> norm = nn.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(7, 2, (16, 3, 4, 4)).astype(np.float32)
    >>> y, backward = norm.forward(x)
    >>> bool(abs(y.mean()) < 1e-6)
    True
    >>> backward(y).shape
    (16, 3, 4, 4)
    """

    _ranks: tuple[int, ...] | None = None
    _expects = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        dropout: float = 0.0,
        generator: Generator | None = None,
        channel_mask: npt.ArrayLike | None = None,
        ghost_batch_size: int | None = None,
        banks: Iterable[str] = (),
        channel_axis: int = 1,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        kind = type(self).__name__
        num_features = _check.integer(kind, "num_features", num_features, 1)
        eps = number(kind, "eps", eps)
        if not (eps >= 0 and np.isfinite(eps)):
            raise ValueError(f"{kind}: eps: expected a finite number >= 0, got {eps}")
        if momentum is not None:
            momentum = number(kind, "momentum", momentum)
            if not 0 <= momentum <= 1:
                raise ValueError(
                    f"{kind}: momentum: expected None or a number in [0, 1], got {momentum}"
                )
            if momentum >= 0.5:
                warnings.warn(
                    f"{kind}: momentum {momentum} is the weight of the new batch; what Keras calls "
                    f"momentum {momentum} is {1 - momentum:.3g} here",
                    stacklevel=2,
                )
        if activation not in _core.activations:
            raise ValueError(
                f"{kind}: activation: expected one of {_core.activations}, got {activation!r}"
            )
        negative_slope = _check.finite(kind, "negative_slope", negative_slope)
        dropout = number(kind, "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{kind}: dropout: expected a number in [0, 1], got {dropout}")
        dtype = _check.weight_dtype(kind, dtype)
        super().__init__(
            num_features,
            momentum,
            track_running_stats,
            _channel_mask(kind, channel_mask, num_features),
        )
        self.eps = eps
        self.affine = affine
        self.activation = activation
        self.negative_slope = negative_slope
        self.dropout = dropout
        self.generator = _check.generator(kind, generator)
        self.consistent = False
        self._always_drops = False  # bnext.mc_dropout sets both
        self.ghost_batch_size = (
            None
            if ghost_batch_size is None
            else _check.integer(kind, "ghost_batch_size", ghost_batch_size, 1)
        )
        self.channel_axis = _check.channel_axis(kind, channel_axis)
        self.weight = Parameter(np.ones(num_features, dtype), decay=False) if affine else None
        self.bias = Parameter(np.zeros(num_features, dtype), decay=False) if affine else None
        self._add_running_stats(banks, dtype)

    # -- passes ------------------------------------------------------------------------
    @overload
    def forward(
        self,
        x: npt.ArrayLike,
        residual: None = None,
        *,
        mask: npt.ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> tuple[Array, Backward]: ...

    @overload
    def forward(
        self,
        x: npt.ArrayLike,
        residual: npt.ArrayLike,
        *,
        mask: npt.ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]: ...

    def forward(
        self,
        x: npt.ArrayLike,
        residual: npt.ArrayLike | None = None,
        *,
        mask: npt.ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> Any:
        """One pass that can be differentiated.

        Parameters
        ----------
        x : array_like (N, C, *), or (N, *, C) with channel_axis -1
        residual : array_like, like x, optional
            Added before the activation, in the same pass.
        mask : array_like of bool, optional
            (N, *), or with an axis of 1 in place of the channels. Only where it is True do values
            count in the batch's statistics; all of them are normalized, as in Keras.
        update_stats : bool, optional
            Whether the running statistics move in training; by default as the attribute says.

        Returns
        -------
        y : ndarray, like x
        backward : callable
            ``grad_x = backward(grad_y)``, or ``grad_x, grad_residual = backward(grad_y)`` if there
            is a residual.
        """
        x = self._check(x)
        residual = self._check_residual(residual, x)
        positions = self._positions(mask, x)
        if self.uses_batch_statistics:
            result = self._by_batch(x, residual, positions, self._as_in_training)
            updates = self.update_stats if update_stats is None else update_stats
            for moments in result.moments:
                if self._observer is not None:
                    self._observer(moments)
                elif self.training and self.track_running_stats and updates:
                    self._update_running_stats(moments)
        else:
            result = _normalize.by_statistics(
                x,
                self._running_statistics,
                self._options,
                self._dropout(self._as_in_training),
                residual=residual,
            )

        def backward(grad_y: Array) -> Any:
            grads = result.gradients(grad_y, None)
            for parameter, grad in ((self.weight, grads.weight), (self.bias, grads.bias)):
                if parameter is not None and grad is not None and not self.frozen_affine:
                    parameter.accumulate(grad)
            return grads.x if residual is None else (grads.x, grads.residual)

        return result.y, backward

    def __call__(
        self,
        x: npt.ArrayLike,
        residual: npt.ArrayLike | None = None,
        *,
        mask: npt.ArrayLike | None = None,
    ) -> Array:
        """Evaluation, whatever the mode; `mask` matters without running statistics only."""
        x = self._check(x)
        residual = self._check_residual(residual, x)
        positions = self._positions(mask, x)
        if not self.track_running_stats:
            return self._by_batch(x, residual, positions, as_in_training=False).y
        return F.batch_norm_inference(
            x, residual=residual, **{**self._options, **self._running_statistics}
        )

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether `forward` normalizes by the batch, or else by the running statistics."""
        return not self.track_running_stats or (self.training and not self.frozen_stats)

    @property
    def _as_in_training(self) -> bool:
        """With dropout and all that belongs to training, which `bnext.reestimate` wants without."""
        return self.training and self._observer is None

    def _dropout(self, as_in_training: bool) -> _normalize.Dropout:
        p = self.dropout if as_in_training or self._always_drops else 0.0
        return _normalize.Dropout(p, self.generator, self.consistent)

    def _by_batch(
        self, x: Array, residual: Array | None, positions: Array | None, as_in_training: bool
    ) -> Pass:
        normalize = partial(
            _normalize.by_batch,
            options=self._options,
            dropout=self._dropout(as_in_training),
            channels=self.channel_mask,
            rescale=self._rescale if as_in_training else None,
        )
        groups = self._groups(len(x)) if as_in_training else [slice(None)]
        for group in groups:
            self._check_count(x[group], None if positions is None else positions[group])
        if len(groups) == 1:
            return normalize(x, residual=residual, positions=positions)
        return _normalize.by_groups(x, groups, normalize, residual=residual, positions=positions)

    _rescale: _normalize.Rescale | None = None

    def _groups(self, samples: int) -> list[slice]:
        """The ghost batches: of `ghost_batch_size` samples, or a few more."""
        count = max(1, samples // self.ghost_batch_size) if self.ghost_batch_size else 1
        edges = [samples * group // count for group in range(count + 1)]
        return [slice(*pair) for pair in pairwise(edges)]

    @property
    def _options(self) -> dict[str, Any]:
        """What the functions take besides x and statistics."""
        return {
            "weight": None if self.weight is None else self.weight.data,
            "bias": None if self.bias is None else self.bias.data,
            "eps": self.eps,
            "channel_axis": self.channel_axis,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }

    @property
    def _running_statistics(self) -> dict[str, Any]:
        """What evaluation normalizes by: mean 0 and variance 1 in channels that are masked."""
        if self.channel_mask is None:
            return {"mean": self.running_mean, "var": self.running_var}
        dtype = self.running_var.dtype
        var = self.running_var.astype(np.float64) + self.eps
        return {
            "mean": np.where(self.channel_mask, self.running_mean, dtype.type(0)),
            "var": np.where(self.channel_mask, var, 1).astype(dtype),
            "eps": 0.0,
        }

    # -- checks ------------------------------------------------------------------------
    def _check(self, x: npt.ArrayLike) -> Array:
        x = _check.native(self.label, "x", x)
        if self._ranks is not None and x.ndim not in self._ranks:
            raise ValueError(f"{self.label}: expected {self._expects}, got shape {x.shape}")
        if x.ndim < 2:
            raise ValueError(f"{self.label}: x: expected 2 or more dimensions, got shape {x.shape}")
        if x.shape[self.channel_axis] != self.num_features:
            raise ValueError(
                f"{self.label}: expected {self.num_features} channels on axis "
                f"{self.channel_axis}, got {x.shape[self.channel_axis]} (shape {x.shape})"
            )
        own = self._dtype
        if own is not None and x.dtype.name in DATA and parameter_dtype(x.dtype) != own:
            expected = own if own == np.float64 else "float32, float16 or bfloat16"
            raise TypeError(
                f"{self.label}: x: expected dtype {expected} like the layer, got {x.dtype}"
            )
        return x

    @property
    def _dtype(self) -> np.dtype[Any] | None:
        """Of parameters and statistics, if it has any."""
        if self.weight is not None:
            return self.weight.data.dtype
        return self.running_var.dtype if self.track_running_stats else None

    def _check_residual(self, residual: npt.ArrayLike | None, x: Array) -> Array | None:
        if residual is None:
            return None
        residual = _check.native(self.label, "residual", residual)
        if residual.shape != x.shape:
            raise ValueError(
                f"{self.label}: residual: expected shape {x.shape}, got {residual.shape}"
            )
        if residual.dtype.name != x.dtype.name:
            raise TypeError(
                f"{self.label}: residual: expected dtype {x.dtype}, got {residual.dtype}"
            )
        return residual

    def _positions(self, mask: npt.ArrayLike | None, x: Array) -> Array | None:
        """`mask` like x with one channel."""
        if mask is None:
            return None
        mask = _check.native(self.label, "mask", mask)
        if mask.dtype != bool:
            raise TypeError(f"{self.label}: mask: expected dtype bool, got {mask.dtype}")
        one_channel = list(x.shape)
        one_channel[self.channel_axis] = 1
        without = list(x.shape)
        del without[self.channel_axis]
        if list(mask.shape) not in (one_channel, without):
            raise ValueError(
                f"{self.label}: mask: expected shape {tuple(one_channel)} or {tuple(without)}, "
                f"got {mask.shape}"
            )
        return mask.reshape(one_channel)

    def _check_count(self, x: Array, positions: Array | None) -> None:
        """ValueError if a channel that is normalized has one value."""
        count = x.size // self.num_features if positions is None else np.count_nonzero(positions)
        if count != 1 or (self.channel_mask is not None and not self.channel_mask.any()):
            return
        values = "value" if positions is None else "valid value"
        mode, advice = "without running statistics", ""
        if self.track_running_stats:
            mode = "in training mode"
            advice = ", or use running statistics, with eval() or freeze(affine=False)"
        raise ValueError(
            f"{self.label}: 1 {values} per channel (shape {x.shape}) {mode}; batch statistics "
            "need 2 or more: use a larger batch, drop or merge a last batch of one sample" + advice
        )

    # -- display -----------------------------------------------------------------------
    def _mode(self) -> Mode:
        statistics = "batch" if self.uses_batch_statistics else "running"
        if self.ghost_batch_size and self.training and self.uses_batch_statistics:
            statistics = "ghost batch"
        return Mode(
            self.name,
            type(self).__name__,
            self.training,
            statistics,
            self.current_bank,
            updates=self.training
            and self.track_running_stats
            and self.uses_batch_statistics
            and self.update_stats,
            trains=self.affine and not self.frozen_affine,
            dropout=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        fields = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
        if self.channel_mask is not None:
            off = self.num_features - np.count_nonzero(self.channel_mask)
            fields += f", channel_mask={off} off"
        defaults: dict[str, Any] = {
            "affine": True,
            "track_running_stats": True,
            "activation": None,
            "dropout": 0,
            "ghost_batch_size": None,
            "banks": (),
            "channel_axis": 1,
            "frozen_stats": False,
            "frozen_affine": False,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                fields += f", {name}={getattr(self, name)!r}"
        return fields


class BatchNorm1d(BatchNorm):
    """`BatchNorm` for (N, C) or (N, C, L)."""

    _ranks = (2, 3)
    _expects = "2 or 3 dimensions, (N, C) or (N, C, L)"


class BatchNorm2d(BatchNorm):
    """`BatchNorm` for (N, C, H, W)."""

    _ranks = (4,)
    _expects = "4 dimensions, (N, C, H, W)"


class BatchNorm3d(BatchNorm):
    """`BatchNorm` for (N, C, D, H, W)."""

    _ranks = (5,)
    _expects = "5 dimensions, (N, C, D, H, W)"


def _channel_mask(kind: str, mask: npt.ArrayLike | None, num_features: int) -> Array | None:
    if mask is None:
        return None
    mask = np.array(mask)
    if mask.dtype != bool:
        raise TypeError(f"{kind}: channel_mask: expected dtype bool, got {mask.dtype}")
    if mask.shape != (num_features,):
        raise ValueError(
            f"{kind}: channel_mask: expected shape ({num_features},), got {mask.shape}"
        )
    mask.flags.writeable = False
    return mask


def batch_norms(model: Module) -> Iterator[tuple[str, BatchNorm]]:
    """Every `BatchNorm` of a model, itself included, once, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            yield name, module
