"""Batch normalization as part of the layer before it."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnext import nn
from bnext.nn import _check
from bnext.nn.activation import activation_layer
from bnext.nn.batchnorm import batch_norms
from bnext.nn.module import Array, Module, Parameter, number

__all__ = ["Folded", "fold"]


class Folded(NamedTuple):
    """What `fold` returns.

    Attributes
    ----------
    model : Module
        A copy without the layers that were folded.
    error : float
        Largest |difference| to the model on the probe.
    folded : dict
        Name of each `BatchNorm` that is gone -> name of the layer that does its work.
    kept : dict
        Name of each `BatchNorm` that is still there -> why.
    """

    model: Module
    error: float
    folded: dict[str, str]
    kept: dict[str, str]


def fold(model: Module, probe: npt.ArrayLike, *, tolerance: float = 1e-4) -> Folded:
    """Fold each `BatchNorm` that directly follows a `Conv2d` or `Linear` in a `Sequential` into it.

    In evaluation, batch normalization is a scale and a shift of each channel, which weight and
    bias of the layer before it can do:

        s = gamma / sqrt(running_var + eps),  weight' = s weight,
        bias' = s (bias - running_mean) + beta

    computed in float64. Its activation becomes a layer of its own.

    Parameters
    ----------
    model : Module
        In evaluation mode; it is not changed.
    probe : array_like
        An input, on which both models are compared; it also shows which axis is normalized.
    tolerance : float, default 1e-4
        Of the error, in multiples of 1 + max |y|.

    Returns
    -------
    folded : Folded
        ``model``, ``error``, ``folded``, ``kept``.

    Raises
    ------
    ValueError
        If a layer is in training mode, or the folded model gives other results.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> from bnext import nn
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4, activation="relu"), nn.Linear(4, 2))
    >>> result = bnext.fold(model.eval(), np.ones((5, 3), np.float32))
    >>> result.model
    Sequential(
      (0): Linear(3, 4)
      (1): ReLU()
      (2): Linear(4, 2)
    )
    >>> result.folded, bool(result.error < 1e-6)
    ({'1': '0'}, True)
    """
    for module in _check.model("fold", model).modules():
        if module.training:
            raise ValueError(
                f"fold: model: expected evaluation mode, got {module.label} in training mode; "
                "call eval() first"
            )
    if not number("fold", "tolerance", tolerance) >= 0:
        raise ValueError(f"fold: tolerance: expected a number >= 0, got {tolerance}")
    result = copy.deepcopy(model)
    probe = _check.native("fold", "probe", probe)
    expected, ranks = _watched(result, probe)
    uses = Counter(
        id(part)
        for module in result.modules()
        for part in (*module.children(), *module._parameters.values())
    )
    kept = {name: "no Conv2d or Linear directly before it" for name, _ in batch_norms(result)}
    folded: dict[str, str] = {}
    for path, module in list(result.named_modules()):
        if not isinstance(module, nn.Sequential):
            continue
        prefix = f"{path}." if path else ""
        children = list(module._modules.items())
        for (before, layer), (after, norm) in pairwise(children):
            if not isinstance(norm, nn.BatchNorm) or not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            name = f"{prefix}{after}"
            reason = _obstacle(layer, norm, uses, ranks.get(id(norm)))
            if reason:
                kept[name] = reason
                continue
            _absorb(layer, norm)
            _leave_activation(module, after, norm)
            folded[name] = f"{prefix}{before}"
            kept.pop(name, None)
    error = float(abs(_run(result, probe) - expected).max(initial=0))
    allowed = tolerance * (1 + float(abs(expected).max(initial=0)))
    if not error <= allowed:
        raise ValueError(
            f"fold: probe: expected results within {allowed:.3g} of the model's, got a difference "
            f"of {error:.3g} after folding {', '.join(folded)}"
        )
    return Folded(result, error, folded, kept)


def _run(model: Module, probe: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(model(probe), np.float64)


def _watched(model: Module, probe: Array) -> tuple[Array, dict[int, int]]:
    """The results of `model`, and the number of axes of what each `BatchNorm` got, by id."""
    ranks: dict[int, int] = {}

    def watch(norm: nn.BatchNorm, x: Array) -> Array:
        ranks[id(norm)] = np.ndim(x)
        return type(norm)._check(norm, x)

    norms = [norm for _, norm in batch_norms(model)]
    for norm in norms:
        norm.__dict__["_check"] = partial(watch, norm)
    y = _run(model, probe)
    for norm in norms:
        del norm.__dict__["_check"]
    return y, ranks


def _obstacle(
    layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm, uses: Counter[int], rank: int | None
) -> str:
    """Why `norm`, whose input has `rank` axes, cannot become part of `layer`; empty if it can."""
    if not norm.track_running_stats:
        return "it has no running statistics"
    for part, name in ((layer, layer.label), (layer.weight, f"the weight of {layer.label}")):
        if uses[id(part)] > 1:
            return f"{name} is used in {uses[id(part)]} places"
    if isinstance(layer, nn.Conv2d):
        features, fits = layer.out_channels, norm.channel_axis == 1
    else:
        features, fits = layer.out_features, norm.channel_axis == -1 or rank == 2
    if features != norm.num_features or not fits:
        return "it normalizes another axis than the output channels of the layer before it"
    return ""


def _absorb(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm) -> None:
    values: dict[str, Any] = {**norm._options, **norm._running_statistics}

    def wide(name: str, default: float) -> Array:
        value = values[name]
        return np.full(norm.num_features, default) if value is None else value.astype(np.float64)

    bias = 0 if layer.bias is None else layer.bias.data.astype(np.float64)
    weight = layer.weight.data
    with np.errstate(all="ignore"):  # what is not finite is seen on the probe
        scale = wide("weight", 1) / np.sqrt(wide("var", 1) + values["eps"])
        shifted = scale * (bias - wide("mean", 0)) + wide("bias", 0)
        weight[...] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.bias = Parameter(shifted.astype(weight.dtype), decay=False)


def _leave_activation(parent: nn.Sequential, name: str, norm: nn.BatchNorm) -> None:
    """Put what is left of `norm` in its place."""
    if norm.activation is None:
        del parent._modules[name]
    else:
        layer = activation_layer(norm.activation, norm.negative_slope)
        parent.register_module(name, layer.eval())
