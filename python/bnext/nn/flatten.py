"""Flattening."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bnext.nn import _check
from bnext.nn.module import Array, Backward, Module


class Flatten(Module):
    """Join the axes `start_dim` to `end_dim` into one; by default all but the samples'.

    Parameters
    ----------
    start_dim : int, default 1
    end_dim : int, default -1
        Inclusive; negative numbers count from the end.

    Notes
    -----
    x may have any dtype. The output is a view of it where NumPy can make one.

    Raises
    ------
    ValueError
        If x has no such axes, or `end_dim` comes before `start_dim`.

    Examples
    --------
    >>> Flatten()(np.zeros((2, 3, 4))).shape
    (2, 12)
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = _check.integer("Flatten", "start_dim", start_dim)
        self.end_dim = _check.integer("Flatten", "end_dim", end_dim)

    def __call__(self, x: npt.ArrayLike) -> Array:
        array = _check.native(self.label, "x", x)
        ndim = array.ndim
        start, end = (d + ndim if d < 0 else d for d in (self.start_dim, self.end_dim))
        if not 0 <= start <= end < ndim:
            raise ValueError(
                f"{self.label}: x: expected axes {self.start_dim} to {self.end_dim}, "
                f"got shape {array.shape}"
            )
        # Not -1: NumPy cannot infer a size if another is 0.
        joined = int(np.prod(array.shape[start : end + 1]))
        return array.reshape(*array.shape[:start], joined, *array.shape[end + 1 :])

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        y = self(x)
        y_shape, x_shape, dtype = y.shape, np.shape(x), y.dtype

        def backward(grad_y: Array) -> Array:
            return _check.gradient(self, grad_y, y_shape, dtype).reshape(x_shape)

        return y, backward

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"
