"""Exact running statistics for a model as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bnext._table import Table
from bnext.nn import _check
from bnext.nn._normalize import Moments
from bnext.nn.batchnorm import BatchNorm, batch_norms
from bnext.nn.module import Module

__all__ = ["Reestimated", "reestimate"]


class Reestimated(NamedTuple):
    """What `reestimate` did to a layer.

    Attributes
    ----------
    name : str
        The layer's dotted path.
    values : int
        Per channel, that the new statistics are of; 0 if no batch reached the layer, which is
        as it was then.
    mean_before, mean_after, var_before, var_after : float
        Averages over the channels.
    mean_shift : float
        How far the mean was off: the largest |before - after| / sqrt(var_after + eps).
    var_ratio : float
        var_before / var_after of the channel where it is farthest from 1.
    """

    name: str
    values: int
    mean_before: float
    mean_after: float
    var_before: float
    var_after: float
    mean_shift: float
    var_ratio: float


def reestimate(model: Module, loader: Iterable[Any]) -> Table[Reestimated]:
    """Replace the running statistics of `model` by those of all samples of `loader`.

    Running averages lag behind the weights, and more so with a small momentum; dropout before a
    `BatchNorm` makes the variance in training another than in evaluation. Here the weights stay,
    dropout is off, and the statistics of the batches are pooled: counts, means and sums of squared
    deviations in float64 (Chan et al. 1979), as if all samples had been one batch.

    While the statistics are collected, each layer normalizes by those of its batch, whole, without
    ghost batches and renormalization. So a layer sees what the layers before it make of batches;
    the first layer's statistics do not depend on how the samples are batched, those of deeper
    layers do a little. Layers whose statistics are frozen use them, and are left as they are.

    Parameters
    ----------
    model : Module
    loader : iterable
        Of batches of inputs, or of tuples that begin with them, such as `bnext.data.batches` gives.
        Some thousand samples are enough.

    Returns
    -------
    table : list of Reestimated
        One for each layer; ``print`` shows a table.

    Raises
    ------
    ValueError
        If there is no layer or no batch, or statistics are not finite. All is as it was then.
    TypeError
        If `loader` is one array or no iterable of batches.

    References
    ----------
    Wu & Johnson, "Rethinking 'batch' in BatchNorm", arXiv:2105.07576, section 3.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> from bnext import nn
    >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm(1))
    >>> x = np.arange(8, dtype=np.float32).reshape(4, 2, 1)
    >>> print(bnext.reestimate(model, [x.reshape(8, 1)[:4], x.reshape(8, 1)[4:]]))
    name  values  mean_before  mean_after  var_before  var_after  mean_shift  var_ratio
    1     8       0            3.5         1           6          1.429       0.1667
    """
    _check.model("reestimate", model)
    if isinstance(loader, (np.ndarray, str, Mapping)) or not isinstance(loader, Iterable):
        raise TypeError(
            "reestimate: loader: expected an iterable of batches, such as [x], "
            f"got {type(loader).__name__}"
        )
    layers = {
        name: layer
        for name, layer in batch_norms(model)
        if layer.track_running_stats
        and not layer.frozen_stats
        and (layer.channel_mask is None or layer.channel_mask.any())
    }
    if not layers:
        raise ValueError(
            "reestimate: model: expected BatchNorm layers with running statistics that are not "
            "frozen, got none"
        )
    pools = {name: _Pool() for name in layers}
    modes = [(module, module.training) for module in model.modules()]
    batches = 0
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers.values():
            layer.training = True
        for name, layer in layers.items():
            layer._observer = pools[name].add
        for batch in loader:
            batches += 1
            model.forward(np.asanyarray(batch[0] if isinstance(batch, (tuple, list)) else batch))
    finally:
        for layer in layers.values():
            layer._observer = None
        for module, training in modes:
            module.training = training
    if batches == 0:
        raise ValueError("reestimate: loader: expected one batch or more, got none")
    for name, layer in layers.items():
        pools[name].check(layer)
    return Table(Reestimated, [_replace(layers[name], name, pools[name]) for name in layers])


class _Pool:
    """Moments of all batches so far."""

    def __init__(self) -> None:
        self.batches = self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0  # sum of squared deviations from the mean

    def add(self, batch: Moments) -> None:
        if batch.count == 0:
            return
        self.batches += 1
        total = self.count + batch.count
        delta = batch.mean - self.mean
        self.mean = self.mean + delta * (batch.count / total)
        self.squares = (
            self.squares
            + batch.var * batch.count
            + np.square(delta) * (self.count * batch.count / total)
        )
        self.count = total

    @property
    def moments(self) -> Moments:
        return Moments(self.mean, self.squares / self.count, self.count)

    def check(self, layer: BatchNorm) -> None:
        if self.count == 0:
            return
        dtype = layer.running_var.dtype
        with np.errstate(over="ignore"):
            mean, var = (values.astype(dtype) for values in layer._estimates(self.moments))
        bad = ~(np.isfinite(mean) & np.isfinite(var))
        if layer.channel_mask is not None:
            bad = bad & layer.channel_mask
        if np.any(bad):
            raise ValueError(
                f"reestimate: {layer.label}: statistics are not finite in "
                f"{np.count_nonzero(bad)} of {layer.num_features} channels, the first is "
                f"{np.flatnonzero(bad)[0]}; all running statistics stay as they are"
            )


def _replace(layer: BatchNorm, name: str, pool: _Pool) -> Reestimated:
    active = slice(None) if layer.channel_mask is None else layer.channel_mask
    before = [array[active].astype(np.float64) for array in (layer.running_mean, layer.running_var)]
    if pool.count:
        mean, var = layer._estimates(pool.moments)
        layer.running_mean[active], layer.running_var[active] = mean[active], var[active]
        layer.num_batches_tracked[...] = pool.batches
        layer._given.add(layer.current_bank)
    after = [array[active].astype(np.float64) for array in (layer.running_mean, layer.running_var)]
    ratio = (before[1] + layer.eps) / (after[1] + layer.eps)
    return Reestimated(
        name,
        pool.count,
        float(before[0].mean()),
        float(after[0].mean()),
        float(before[1].mean()),
        float(after[1].mean()),
        mean_shift=float(np.max(abs(before[0] - after[0]) / np.sqrt(after[1] + layer.eps))),
        var_ratio=float(ratio[np.argmax(abs(np.log(ratio)))]),
    )
