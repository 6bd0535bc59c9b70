"""Pooling of images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bnext import _core
from bnext.nn import _check
from bnext.nn.module import Array, Backward, Module


class _Pool2d(Module):
    """A window that slides over every plane."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        self.kernel_size = _check.pair(kind, "kernel_size", kernel_size, 1)
        self.stride = _check.pair(kind, "stride", kernel_size if stride is None else stride, 1)
        self.padding = _check.pair(kind, "padding", padding, 0)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(
                f"{kind}: padding: expected at most half of kernel_size={self.kernel_size}, "
                f"got {self.padding}"
            )
        self._window = (self.kernel_size, self.stride, self.padding)

    def _prepare(self, x: npt.ArrayLike) -> tuple[Array, Array]:
        """`x` as the core wants it, and an output for it."""
        array = _check.images(self, x)
        plane = _check.positions(self, array.shape[2:], *self._window)
        return array, np.empty((*array.shape[:2], *plane), array.dtype)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class MaxPool2d(_Pool2d):
    """Largest element of each window, as `torch.nn.MaxPool2d`.

    A window that holds a NaN gives NaN; padding is never the largest. The gradient goes to the
    first of equal elements in the window, row by row (to the first NaN, if there is one).

    Parameters
    ----------
    kernel_size : int or (int, int)
    stride : int or (int, int), optional
        By default `kernel_size`.
    padding : int or (int, int), default 0
        At most half of `kernel_size`.

    Notes
    -----
    x is (N, C, H, W), float32 or float64; y is (N, C, H', W') with
    H' = floor((H + 2 padding - kernel) / stride) + 1.

    Examples
    --------
    >>> MaxPool2d(2)(np.arange(8.0).reshape(1, 1, 2, 4))
    array([[[[5., 7.]]]])
    """

    def __call__(self, x: npt.ArrayLike) -> Array:
        array, y = self._prepare(x)
        _core.max_pool(array, y, None, *self._window)
        return y

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        array, y = self._prepare(x)
        index = np.empty(y.shape, np.int32)
        _core.max_pool(array, y, index, *self._window)
        shape, dtype = array.shape, array.dtype

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, index.shape, dtype)
            grad_x = np.empty(shape, dtype)
            _core.max_pool_backward(grad, index, grad_x, *self._window)
            return grad_x

        return y, backward


class AvgPool2d(_Pool2d):
    """Mean of each window, as `torch.nn.AvgPool2d`.

    Parameters
    ----------
    kernel_size : int or (int, int)
    stride : int or (int, int), optional
        By default `kernel_size`.
    padding : int or (int, int), default 0
        At most half of `kernel_size`.
    count_include_pad : bool, default True
        Whether the zeros of the padding count as elements of the window; if not, a window at the
        border is the mean of what it covers of x.

    Notes
    -----
    x is (N, C, H, W), float32 or float64; y is (N, C, H', W') with
    H' = floor((H + 2 padding - kernel) / stride) + 1.

    Examples
    --------
    >>> AvgPool2d(2)(np.arange(8.0).reshape(1, 1, 2, 4))
    array([[[[2.5, 4.5]]]])
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        *,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding)
        self.count_include_pad = count_include_pad

    def __call__(self, x: npt.ArrayLike) -> Array:
        array, y = self._prepare(x)
        _core.avg_pool(array, y, *self._window, self.count_include_pad)
        return y

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        y = self(x)
        y_shape, shape, dtype = y.shape, np.shape(x), y.dtype

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, y_shape, dtype)
            grad_x = np.empty(shape, dtype)
            _core.avg_pool_backward(grad, grad_x, *self._window, self.count_include_pad)
            return grad_x

        return y, backward

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, count_include_pad={self.count_include_pad}"


class GlobalAvgPool2d(Module):
    """Mean of every plane: (N, C, H, W) to (N, C), float32 or float64.

    Raises
    ------
    ValueError
        If x has another rank, or H or W is 0.

    Examples
    --------
    >>> GlobalAvgPool2d()(np.arange(8.0).reshape(1, 2, 2, 2))
    array([[1.5, 5.5]])
    """

    def __call__(self, x: npt.ArrayLike) -> Array:
        array = _check.images(self, x)
        if 0 in array.shape[2:]:
            raise ValueError(f"{self.label}: x: expected images, got shape {array.shape}")
        y: Array = array.mean(axis=(2, 3))
        return y

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        y = self(x)
        y_shape, shape = y.shape, np.shape(x)

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, y_shape, y.dtype)
            share = grad / grad.dtype.type(shape[2] * shape[3])
            return np.broadcast_to(share[:, :, np.newaxis, np.newaxis], shape).copy()

        return y, backward
