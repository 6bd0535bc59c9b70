"""How sure a model is: predictions with dropout left on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from bnext.nn import _check
from bnext.nn.batchnorm import BatchNorm
from bnext.nn.dropout import Dropout
from bnext.nn.module import Array, Module
from bnext.random import Generator

__all__ = ["MCDropout", "mc_dropout"]


class MCDropout(NamedTuple):
    """Mean and standard deviation of a model's outputs over passes with dropout."""

    mean: Array
    std: Array


def mc_dropout(
    model: Module,
    x: npt.ArrayLike,
    samples: SupportsIndex = 20,
    *,
    consistent: bool = False,
    transform: Callable[[Array], Array] | None = None,
    generator: Generator | None = None,
) -> MCDropout:
    """Mean and standard deviation of `samples` passes with dropout on and all else in evaluation.

    BatchNorm uses its running statistics, and does not change them, whatever mode the model is
    in; afterwards it is in that mode again. Dropout layers are `bnext.nn.Dropout` and those that
    derive from it, and each `bnext.nn.BatchNorm` with `dropout`.

    Parameters
    ----------
    model : Module
    x : array_like
        Input of the model, with the samples of the batch on axis 0.
    samples : int, default 20
        Number of passes, 1 or more.
    consistent : bool, default False
        Whether all samples of a batch share the masks of a pass, as if each pass were one model
        drawn at random. With a generator in the same state, several batches share them too.
    transform : callable, optional
        Applied to the output of each pass, such as a softmax: mean and std are those of its
        results.
    generator : Generator, optional
        Where all masks are drawn from. By default each layer draws from its own.

    Returns
    -------
    MCDropout
        ``mean`` and ``std`` (that of a population: divided by `samples`), of the shape of one
        output and its dtype (float64 for integers); computed in float64.

    Raises
    ------
    ValueError
        If the model has no dropout layer with p > 0, or `samples` is below 1.
    TypeError
        If `samples` is not an integer or `model` not a Module.

    Notes
    -----
    The layers are switched while it runs: do not use the model in other threads meanwhile.

    References
    ----------
    Gal & Ghahramani, "Dropout as a Bayesian approximation", ICML 2016, arXiv:1506.02142.

    Examples
    --------
    >>> import bnext
    >>> from bnext import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm(8), nn.ReLU(), nn.Dropout(0.5))
    >>> x = np.ones((3, 4), np.float32)
    >>> mean, std = mc_dropout(model, x, 50, generator=bnext.Generator(0))
    >>> mean.shape, std.shape, bool((std > 0).any())
    ((3, 8), (3, 8), True)
    """
    _check.model("mc_dropout", model)
    _check.generator("mc_dropout", generator)
    count = _check.integer("mc_dropout", "samples", samples, 1)
    x = np.asanyarray(x)
    mean: Array | float = 0.0
    m2: Array | float = 0.0
    with _dropping(model, consistent, generator):
        for k in range(1, count + 1):
            y = model.forward(x)[0]
            y = np.asarray(y if transform is None else transform(y))
            dtype = np.float64 if y.dtype.kind in "biu" else y.dtype
            y = y.astype(np.float64)
            # Welford's update: nothing cancels where the outputs hardly differ.
            delta = y - mean
            mean = mean + delta / k
            m2 = m2 + delta * (y - mean)
    return MCDropout(np.asarray(mean).astype(dtype), np.asarray(np.sqrt(m2 / count)).astype(dtype))


@contextmanager
def _dropping(model: Module, consistent: bool, generator: Generator | None) -> Iterator[None]:
    """Dropout layers in training mode, all other modules in evaluation mode."""
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, Dropout | BatchNorm)]
    if not any((layer.p if isinstance(layer, Dropout) else layer.dropout) > 0 for layer in layers):
        raise ValueError("mc_dropout: model: expected a dropout layer with p > 0, found none")
    modes = [module.training for module in modules]
    before = [(layer.consistent, layer.generator) for layer in layers]
    try:
        for module in modules:
            module.training = isinstance(module, Dropout)
        for layer in layers:
            if isinstance(layer, BatchNorm):
                layer._always_drops = True
            layer.consistent = consistent
            if generator is not None:
                layer.generator = generator
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for layer, (shared, own) in zip(layers, before, strict=True):
            layer.consistent, layer.generator = shared, own
            if isinstance(layer, BatchNorm):
                layer._always_drops = False
