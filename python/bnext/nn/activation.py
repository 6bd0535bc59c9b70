"""Activations without parameters."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bnext.nn import _check
from bnext.nn.module import Array, Backward, Module


class ReLU(Module):
    """``max(x, 0)``; NaN stays NaN.

    x has any shape, float32 or float64. The gradient at 0 is 0. After a `BatchNorm`,
    ``BatchNorm(..., activation="relu")`` is the same in one pass over memory.

    Examples
    --------
    >>> ReLU()(np.array([-1.0, 0.0, 2.0]))
    array([0., 0., 2.])
    """

    def __call__(self, x: npt.ArrayLike) -> Array:
        array = _check.floating(self, x)
        y: Array = np.maximum(array, array.dtype.type(0))
        return y

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        y = self(x)

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, y.shape, y.dtype)
            return np.where(y <= 0, y.dtype.type(0), grad)

        return y, backward


class LeakyReLU(Module):
    """``x`` where x > 0, else ``negative_slope * x``.

    x has any shape, float32 or float64. The gradient at 0 is `negative_slope`. After a
    `BatchNorm`, ``BatchNorm(..., activation="leaky_relu")`` is the same in one pass over memory.

    Parameters
    ----------
    negative_slope : float, default 0.01
        Finite.

    Examples
    --------
    >>> LeakyReLU(0.5)(np.array([-1.0, 0.0, 2.0]))
    array([-0.5,  0. ,  2. ])
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        if not math.isfinite(negative_slope):
            raise ValueError(
                f"LeakyReLU: negative_slope: expected a finite number, got {negative_slope!r}"
            )
        self.negative_slope = float(negative_slope)

    def _scale(self, array: Array, x: Array) -> Array:
        """`array` where x > 0, else `negative_slope` times it."""
        return np.where(x > 0, array, array * array.dtype.type(self.negative_slope))

    def __call__(self, x: npt.ArrayLike) -> Array:
        array = _check.floating(self, x)
        return self._scale(array, array)

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        array = _check.floating(self, x)

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, array.shape, array.dtype)
            return self._scale(grad, array)

        return self._scale(array, array), backward

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope:g}"
