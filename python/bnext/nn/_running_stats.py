"""Running statistics of a normalization layer: what moves them, and what does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bnext.nn import _check
from bnext.nn._normalize import Moments
from bnext.nn.module import Array, Module

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RunningStats", "stats_updates", "use_bank"]


class RunningStats(Module):
    """Base class of `BatchNorm`: buffers, banks, freezing, updates.

    `channel_mask` (C,) says which channels are normalized; None is all.
    """

    running_mean: Array
    running_var: Array
    num_batches_tracked: Array

    def __init__(
        self,
        num_features: int,
        momentum: float | None,
        track_running_stats: bool,
        channel_mask: Array | None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.channel_mask = channel_mask
        self.update_stats = True
        self.frozen_stats = self.frozen_affine = False
        # Takes batch statistics in place of the running ones; bnext.reestimate sets it.
        self._observer: Callable[[Moments], None] | None = None
        self.banks: tuple[str, ...] = ()
        self.current_bank: str | None = None
        # Banks (None where there are none) whose variance is no average that began with 1.
        self._given: set[str | None] = set()

    def _add_running_stats(self, banks: Iterable[str], dtype: np.dtype[Any]) -> None:
        """The last of what a layer's constructor does: banks may not take its attributes' names."""
        kind = type(self).__name__
        if isinstance(banks, str) or not isinstance(banks, Iterable):
            raise TypeError(f"{kind}: banks: expected names, got {banks!r}")
        self.banks = tuple(banks)
        if self.banks and not self.track_running_stats:
            raise ValueError(
                f"{kind}: banks: expected none without track_running_stats, got {self.banks}"
            )
        for name in self.banks:
            if not (isinstance(name, str) and name.isidentifier()) or (
                hasattr(self, name) or name in RunningStats.__annotations__
            ):
                raise ValueError(
                    f"{kind}: banks: expected different identifiers that name no attribute of the "
                    f"layer, got {name!r}"
                )
            setattr(self, name, _Bank(self.num_features, dtype))
        if self.banks:
            self.bank(self.banks[0])
        elif self.track_running_stats:
            _register_running_stats(self, self.num_features, dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in RunningStats.__annotations__ and self.current_bank is not None:
            setattr(self._modules[self.current_bank], name, value)

    def bank(self, name: str) -> Self:
        """Use the running statistics `name` of `banks` from now on; return the layer.

        Raises
        ------
        ValueError
            If there is no such bank; the message lists those there are.

        Examples
        --------
        >>> import numpy as np
        >>> from bnext import nn
        >>> norm = nn.BatchNorm(3, banks=("real", "fake"))
        >>> y, backward = norm.bank("fake").forward(np.ones((4, 3), np.float32))
        >>> norm.real.num_batches_tracked, norm.fake.num_batches_tracked
        (array(0), array(1))
        """
        if name not in self.banks:
            raise ValueError(
                f"{self.label}: bank: expected one of {', '.join(self.banks) or '(none)'}, "
                f"got {name!r}"
            )
        self.current_bank = name
        for key, buffer in self._modules[name]._buffers.items():
            setattr(self, key, buffer)
        return self

    def reset_running_stats(self) -> None:
        """Set the running statistics, of all banks, to mean 0, variance 1, no batches seen."""
        for module in self.modules():
            for key, buffer in module._buffers.items():
                buffer[...] = 1 if key == "running_var" else 0
        self._given.clear()

    def freeze(self, stats: bool = True, affine: bool = True) -> Self:
        """Keep statistics and parameters as they are, whatever `train` says; return the layer.

        Parameters
        ----------
        stats : bool
            Use the running statistics in training too, and do not move them.
        affine : bool
            Give `weight` and `bias` no gradient; optimizers leave them alone then.

        Raises
        ------
        ValueError
            For `stats` without track_running_stats.
        """
        if stats and not self.track_running_stats:
            raise ValueError(
                f"{self.label}: freeze: stats: expected False without running statistics"
            )
        self.frozen_stats |= stats
        self.frozen_affine |= affine
        return self

    def unfreeze(self, stats: bool = True, affine: bool = True) -> Self:
        """Undo `freeze`; return the layer."""
        self.frozen_stats &= not stats
        self.frozen_affine &= not affine
        return self

    def _update_running_stats(self, moments: Moments) -> None:
        if moments.count == 0:
            return
        self._notice_given()
        step = int(self.num_batches_tracked) + 1
        weight = 1 / step if self.momentum is None else self.momentum
        active = slice(None) if self.channel_mask is None else self.channel_mask
        with np.errstate(all="ignore"):  # what is not finite is seen to below
            mean, var = (
                new.astype(self.running_mean.dtype)[active] for new in self._moved(moments, weight)
            )
        finite = np.isfinite(mean) & np.isfinite(var)
        if not finite.all():
            channels = np.arange(self.num_features)[active][~finite]
            warnings.warn(
                f"{self.label}: step {step}: batch statistics are not finite in "
                f"{channels.size} of {self.num_features} channels, the first is {channels[0]}; "
                "running statistics stay as they are",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        self.num_batches_tracked[...] = step
        self.running_mean[active] = mean
        self.running_var[active] = var

    def _notice_given(self) -> None:
        """A variance that is another than 1 before the first batch has come from elsewhere."""
        for bank in self.banks or (None,):
            buffers = self._buffers if bank is None else self._modules[bank]._buffers
            if buffers["num_batches_tracked"] == 0 and (buffers["running_var"] != 1).any():
                self._given.add(bank)

    @property
    def _share_of_initial(self) -> float:
        """The weight that the 1 it began with still has in the running variance."""
        self._notice_given()
        if self.momentum is None or self.current_bank in self._given:
            return 0.0
        return float((1 - self.momentum) ** int(self.num_batches_tracked))

    def _collected_var(self) -> Array:
        """Running variance in float64 without what it still has of the 1 it began with."""
        return _without_initial(self.running_var.astype(np.float64), self._share_of_initial, 1.0)

    def _estimates(self, moments: Moments) -> tuple[Array, Array]:
        """Mean and (unbiased) variance, for the running statistics."""
        return moments.mean, moments.var * (moments.count / (moments.count - 1))

    def _moved(self, moments: Moments, weight: float) -> tuple[Array, Array]:
        """Running mean and variance once a batch has counted with `weight`."""
        mean, var = self._estimates(moments)
        return (
            (1 - weight) * self.running_mean.astype(np.float64) + weight * mean,
            (1 - weight) * self.running_var.astype(np.float64) + weight * var,
        )


def _without_initial(average: Array, share: float, initial: float) -> Array:
    """`average` without its `share` of `initial`, or itself if it has nothing else."""
    if share == 1:
        return average
    # What is tiny may be lost in the rounding of the average.
    rest: Array = np.maximum(average - share * initial, 0) / (1 - share)
    return rest


class _Bank(Module):
    """Running statistics under a name of their own; `RunningStats` does the work."""

    def __init__(self, num_features: int, dtype: np.dtype[Any]) -> None:
        super().__init__()
        _register_running_stats(self, num_features, dtype)


def _register_running_stats(module: Module, num_features: int, dtype: np.dtype[Any]) -> None:
    module.register_buffer("running_mean", np.zeros(num_features, dtype))
    module.register_buffer("running_var", np.ones(num_features, dtype))
    module.register_buffer("num_batches_tracked", np.zeros((), np.int64))


def _layers(operation: str, model: Module) -> list[RunningStats]:
    modules = _check.model(operation, model).modules()
    return [module for module in modules if isinstance(module, RunningStats)]


@contextmanager
def stats_updates(model: Module, enabled: bool) -> Iterator[None]:
    """Inside, `BatchNorm` layers of `model` move their running statistics in training, or do not.

    A second pass over the same samples (recomputation of activations, the small batches of
    gradient accumulation after the first) should not count twice.

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> norm = nn.BatchNorm(3)
    >>> with nn.stats_updates(norm, False):
    ...     y, backward = norm.forward(np.ones((4, 3), np.float32))
    >>> norm.num_batches_tracked
    array(0)
    """
    before = [(layer, layer.update_stats) for layer in _layers("stats_updates", model)]
    try:
        for layer, _ in before:
            layer.update_stats = enabled
        yield
    finally:
        for layer, update_stats in before:
            layer.update_stats = update_stats


@contextmanager
def use_bank(model: Module, name: str) -> Iterator[None]:
    """Inside, all layers of `model` that have banks use the one called `name`.

    Raises
    ------
    ValueError
        If a layer with banks has none of this name, or no layer has banks.

    Examples
    --------
    >>> from bnext import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3, banks=("real", "fake")))
    >>> with nn.use_bank(model, "fake"):
    ...     model[1].current_bank
    'fake'
    >>> model[1].current_bank
    'real'
    """
    layers = _layers("use_bank", model)
    before = [(layer, layer.current_bank) for layer in layers if layer.banks]
    if not before:
        raise ValueError("use_bank: model: expected BatchNorm layers with banks, got none")
    try:
        for layer, _ in before:
            layer.bank(name)
        yield
    finally:
        for layer, bank in before:
            assert bank is not None
            layer.bank(bank)
