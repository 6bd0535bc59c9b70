"""Batch Normalization."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from bnext import _core
from bnext import functional as F
from bnext.nn.module import Array, Backward, Module, Parameter, number

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(Module):
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
    channel_axis : 1 or -1, default 1
    dtype : dtype, default float32
        Of parameters, running statistics and input.

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
    Ioffe & Szegedy, "Batch normalization", arXiv:1502.03167.

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

    running_mean: Array
    running_var: Array
    num_batches_tracked: Array
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
        channel_axis: int = 1,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        if num_features < 1:
            raise ValueError(f"{kind}: num_features: expected 1 or more, got {num_features}")
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
        if channel_axis not in (1, -1):
            raise ValueError(f"{kind}: channel_axis: expected 1 or -1, got {channel_axis}")
        dtype = np.dtype(dtype)
        if dtype not in (np.float32, np.float64):
            raise TypeError(f"{kind}: dtype: expected float32 or float64, got {dtype}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.negative_slope = negative_slope
        self.channel_axis = channel_axis
        self.weight = Parameter(np.ones(num_features, dtype), decay=False) if affine else None
        self.bias = Parameter(np.zeros(num_features, dtype), decay=False) if affine else None
        if track_running_stats:
            self.register_buffer("running_mean", np.zeros(num_features, dtype))
            self.register_buffer("running_var", np.ones(num_features, dtype))
            self.register_buffer("num_batches_tracked", np.zeros((), np.int64))

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0, variance 1, no batches seen."""
        if self.track_running_stats:
            self.running_mean[...] = 0
            self.running_var[...] = 1
            self.num_batches_tracked[...] = 0

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        x = self._check(x)
        if self.training or not self.track_running_stats:
            y, saved = self._normalize_by_batch(x)
            if self.training and self.track_running_stats:
                self._update_running_stats(saved)
        else:
            y, saved = _core.batch_norm_inference_forward(
                x, self.running_mean, self.running_var, **self._arguments
            )

        def backward(grad_y: Array) -> Array:
            grads = F.batch_norm_backward(grad_y, saved)
            for parameter, grad in ((self.weight, grads.weight), (self.bias, grads.bias)):
                if parameter is not None and grad is not None:
                    parameter.accumulate(grad)
            return grads.x

        return y, backward

    def __call__(self, x: npt.ArrayLike) -> Array:
        x = self._check(x)
        if not self.track_running_stats:
            return self._normalize_by_batch(x)[0]
        return F.batch_norm_inference(x, self.running_mean, self.running_var, **self._arguments)

    @property
    def _arguments(self) -> dict[str, Any]:
        """What the functions take besides x and statistics."""
        return {
            "weight": None if self.weight is None else self.weight.data,
            "bias": None if self.bias is None else self.bias.data,
            "eps": self.eps,
            "channel_axis": self.channel_axis,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }

    def _check(self, x: npt.ArrayLike) -> Array:
        x = np.asanyarray(x)
        if self._ranks is not None and x.ndim not in self._ranks:
            raise ValueError(f"{self.label}: expected {self._expects}, got shape {x.shape}")
        if x.ndim >= 2 and x.shape[self.channel_axis] != self.num_features:
            raise ValueError(
                f"{self.label}: expected {self.num_features} channels on axis "
                f"{self.channel_axis}, got {x.shape[self.channel_axis]} (shape {x.shape})"
            )
        return x

    def _normalize_by_batch(self, x: Array) -> tuple[Array, F.BatchNormSaved]:
        if x.ndim >= 2 and x.size == self.num_features:
            mode = "in training mode" if self.training else "without running statistics"
            raise ValueError(
                f"{self.label}: 1 value per channel (shape {x.shape}) {mode}; batch statistics "
                "need 2 or more: use a larger batch, drop or merge a last batch of one sample, "
                "or call eval() to use running statistics"
            )
        return F.batch_norm_forward(x, **self._arguments)

    def _update_running_stats(self, saved: F.BatchNormSaved) -> None:
        if saved.count == 0:
            return
        mean, var = saved.mean, saved.var
        bad = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var)))
        step = int(self.num_batches_tracked) + 1
        if bad.size:
            warnings.warn(
                f"{self.label}: step {step}: batch statistics are not finite in "
                f"{bad.size} of {self.num_features} channels, the first is {bad[0]}; running "
                "statistics stay as they are",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        self.num_batches_tracked[...] = step
        weight = 1 / step if self.momentum is None else self.momentum
        unbiased = var * (saved.count / (saved.count - 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            running *= 1 - weight
            running += weight * batch

    def extra_repr(self) -> str:
        fields = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
        if not self.affine:
            fields += ", affine=False"
        if not self.track_running_stats:
            fields += ", track_running_stats=False"
        if self.activation is not None:
            fields += f", activation={self.activation!r}"
        if self.channel_axis != 1:
            fields += f", channel_axis={self.channel_axis}"
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
