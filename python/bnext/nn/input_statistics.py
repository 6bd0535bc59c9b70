"""Mean and variance of what passes by."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from bnext.nn import _check
from bnext.nn.module import Array, Backward, Module, number


class InputStatistics(Module):
    r"""The identity; in training it keeps the mean and variance of each channel.

    It stands before the `Conv2d` or `Linear` whose input `bnext.scaling.BNP` is to know. With the
    batch's mean m and biased variance v, and a the weight of the new batch,

    .. math::
        \sigma^2 \leftarrow (1 - a)\,\sigma^2 + a\,v + a (1 - a) (m - \mu)^2, \qquad
        \mu \leftarrow (1 - a)\,\mu + a\,m

    which is the variance of all values so far, weighted by age: batches of one sample are enough.

    Parameters
    ----------
    num_features : int
        C of the input.
    momentum : float or None, default 0.1
        a, in (0, 1]; 1 / t in the first batches t, as long as that is more, so that the
        statistics begin with those of the first batch. None: 1 / t always, the plain average
        over the batches.
    channel_axis : 1 or -1, default 1
        -1 before a `Linear` whose input has more than two dimensions.

    Attributes
    ----------
    running_mean, running_var : float64 array (C,)
        Zeros and ones before the first batch.
    num_batches_tracked : int64 array ()

    Notes
    -----
    x is (N, C, \*), or (N, \*, C) with channel_axis -1; float32, float64, float16 or bfloat16. It
    is returned as it is.

    Raises
    ------
    ValueError
        If x has another number of channels.

    Warns
    -----
    RuntimeWarning
        If a batch's statistics are not finite; the running statistics stay as they are.

    References
    ----------
    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979: the variance of two groups put together.

    Examples
    --------
    >>> statistics = InputStatistics(2)
    >>> y, backward = statistics.forward(np.array([[1.0, 10], [3, 10]]))
    >>> statistics.running_mean, statistics.running_var
    (array([ 2., 10.]), array([1., 0.]))
    """

    running_mean: Array
    running_var: Array
    num_batches_tracked: Array

    def __init__(
        self, num_features: int, momentum: float | None = 0.1, *, channel_axis: int = 1
    ) -> None:
        super().__init__()
        kind = "InputStatistics"
        self.num_features = _check.integer(kind, "num_features", num_features, 1)
        if momentum is not None and not 0 < number(kind, "momentum", momentum) <= 1:
            raise ValueError(
                f"{kind}: momentum: expected None or a number in (0, 1], got {momentum}"
            )
        self.momentum = momentum
        self.channel_axis = _check.channel_axis(kind, channel_axis)
        self.register_buffer("running_mean", np.zeros(self.num_features))
        self.register_buffer("running_var", np.ones(self.num_features))
        self.register_buffer("num_batches_tracked", np.zeros((), np.int64))

    def __call__(self, x: npt.ArrayLike) -> Array:
        array = _check.floating(self, x)
        if array.ndim < 2 or array.shape[self.channel_axis] != self.num_features:
            raise ValueError(
                f"{self.label}: x: expected {self.num_features} channels on axis "
                f"{self.channel_axis}, got shape {array.shape}"
            )
        return array

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        array = self(x)
        if self.training and array.size:
            self._update(array)
        return array, lambda grad_y: _check.gradient(self, grad_y, array.shape, array.dtype)

    def _update(self, x: Array) -> None:
        axes = tuple(axis for axis in range(x.ndim) if axis != self.channel_axis % x.ndim)
        with np.errstate(invalid="ignore", over="ignore"):
            mean, var = x.mean(axes, np.float64), x.var(axes, np.float64)
        step = int(self.num_batches_tracked) + 1
        if not np.isfinite(mean + var).all():
            warnings.warn(
                f"{self.label}: step {step}: batch statistics are not finite; running "
                "statistics stay as they are",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        a = max(self.momentum or 0.0, 1 / step)
        self.num_batches_tracked[...] = step
        offset = mean - self.running_mean
        self.running_var *= 1 - a
        self.running_var += a * var + a * (1 - a) * offset**2
        self.running_mean += a * offset

    def extra_repr(self) -> str:
        axis = "" if self.channel_axis == 1 else f", channel_axis={self.channel_axis}"
        return f"{self.num_features}, momentum={self.momentum}{axis}"
