"""Two-dimensional convolution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from bnext import random
from bnext._core import col2im, im2col
from bnext.nn import _blas, _check
from bnext.nn.module import Array, Backward, Module, Parameter

# A product with fewer columns, or with fewer multiplications, runs below BLAS's full speed:
# small images are taken several at a time.
_COLUMNS = 512
_PRODUCT = 100_000


class Conv2d(Module):
    r"""Cross-correlation of images with a set of kernels, as `torch.nn.Conv2d`.

    .. math::
        y_{n,o,p,q} = b_o + \sum_{c,i,j} w_{o,c,i,j}\,
        x_{n,\;c,\;p s_0 - p_0 + i d_0,\;q s_1 - p_1 + j d_1}

    with zeros outside of x; stride s, padding p, dilation d. With `groups`, output channels of
    group g see only the input channels of group g.

    Parameters
    ----------
    in_channels, out_channels : int
        Multiples of `groups`.
    kernel_size, stride, padding, dilation : int or (int, int)
        For height and width.
    groups : int, default 1
    bias : bool, default True
    dtype : float32 or float64

    Attributes
    ----------
    weight : Parameter (out_channels, in_channels / groups, kernel height, kernel width)
        Drawn from U(-k, k), k = 1 / sqrt(fan in).
    bias : Parameter (out_channels,), or None
        Drawn likewise.

    Notes
    -----
    x is (N, in_channels, H, W) of `dtype`; y is (N, out_channels, H', W') with
    H' = floor((H + 2 p - d (k - 1) - 1) / s) + 1. Results do not depend on the number of threads.

    Raises
    ------
    ValueError
        If x has another shape or is smaller than the kernel.
    TypeError
        If x has another dtype.

    Examples
    --------
    >>> layer = Conv2d(3, 8, 3, stride=2, padding=1)
    >>> layer(np.zeros((1, 3, 9, 9), np.float32)).shape
    (1, 8, 5, 5)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        self.in_channels = _check.integer("Conv2d", "in_channels", in_channels, 1)
        self.out_channels = _check.integer("Conv2d", "out_channels", out_channels, 1)
        self.kernel_size = _check.pair("Conv2d", "kernel_size", kernel_size, 1)
        self.stride = _check.pair("Conv2d", "stride", stride, 1)
        self.padding = _check.pair("Conv2d", "padding", padding, 0)
        self.dilation = _check.pair("Conv2d", "dilation", dilation, 1)
        self.groups = _check.integer("Conv2d", "groups", groups, 1)
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"Conv2d: {name}: expected a multiple of groups={groups}, "
                    f"got {getattr(self, name)}"
                )
        self.dtype = _check.weight_dtype("Conv2d", dtype)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        draw = random.initial_rng().uniform
        self.weight = Parameter(draw(-bound, bound, shape).astype(self.dtype))
        self.bias = (
            Parameter(draw(-bound, bound, self.out_channels).astype(self.dtype), decay=False)
            if bias
            else None
        )

    def __call__(self, x: npt.ArrayLike) -> Array:
        return _Convolution(self, x).output()

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        convolution = _Convolution(self, x)
        y = convolution.output()

        def backward(grad_y: Array) -> Array:
            grad_y = _check.gradient(self, grad_y, y_shape, self.dtype)
            return convolution.gradients(grad_y)

        y_shape = y.shape
        return y, backward

    def extra_repr(self) -> str:
        shown = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        defaults["groups"] = 1
        shown += [
            f"{name}={getattr(self, name)}"
            for name, default in defaults.items()
            if getattr(self, name) != default
        ]
        if self.bias is None:
            shown.append("bias=False")
        return ", ".join(shown)


class _Convolution:
    """One input of a `Conv2d`: how it is cut into matrix products, and those products.

    The windows of a few samples become the columns of a matrix (K, columns), where K runs over
    (channel of the group, kernel row, kernel column) as in the weight; then output, gradient of
    the weight and gradient of the columns are one matrix product each. The columns are made
    again in backward: keeping them would take 9 times the memory of x for a 3x3 kernel.
    """

    def __init__(self, layer: Conv2d, x: npt.ArrayLike) -> None:
        self.layer = layer
        self.x = x = _check.images(layer, x, channels=layer.in_channels, dtype=layer.dtype)
        window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self.window = window
        self.plane = _check.positions(layer, x.shape[2:], *window)
        self.groups = [
            (
                slice(
                    g * layer.in_channels // layer.groups,
                    (g + 1) * layer.in_channels // layer.groups,
                ),
                slice(
                    g * layer.out_channels // layer.groups,
                    (g + 1) * layer.out_channels // layer.groups,
                ),
            )
            for g in range(layer.groups)
        ]
        # Groups, rows, K: a matrix for each group.
        self.weight = layer.weight.data.reshape(
            layer.groups, layer.out_channels // layer.groups, -1
        )
        self.area = math.prod(self.plane)
        product = self.weight[0].size * self.area
        self.samples = max(
            1, -(-_COLUMNS // self.area) if self.area < _COLUMNS // 2 else 1, _PRODUCT // product
        )
        self.pieces = _blas.pieces(len(x), len(x) * product * layer.groups)
        # The columns of one sample are the sample itself.
        self.pointwise = window == ((1, 1), (1, 1), (0, 0), (1, 1)) and self.samples == 1

    def chunks(self, piece: range) -> list[slice]:
        """The samples of a piece, as many at a time as one product takes."""
        return [
            slice(start, min(start + self.samples, piece.stop)) for start in piece[:: self.samples]
        ]

    def columns(self, x: Array) -> Array:
        """The windows of the samples `x` as columns (K, columns)."""
        if self.pointwise:
            return x.reshape(x.shape[1], -1)
        shape = (self.weight.shape[2], len(x) * self.area)
        columns = _blas.workspace("columns", shape, x.dtype)
        im2col(x, columns, *self.window)
        return columns

    def output(self) -> Array:
        layer, x = self.layer, self.x
        y = np.empty((len(x), layer.out_channels, *self.plane), x.dtype)
        rows = y.reshape(len(x), layer.out_channels, self.area)
        bias = None if layer.bias is None else layer.bias.data[:, np.newaxis]

        def task(_: int, piece: range) -> None:
            for chunk in self.chunks(piece):
                for weight, (inputs, outputs) in zip(self.weight, self.groups, strict=True):
                    columns = self.columns(x[chunk, inputs])
                    to = rows[chunk, outputs]
                    if len(to) == 1:
                        np.matmul(weight, columns, out=to[0])
                    else:
                        product = _blas.workspace(
                            "product", (len(weight), columns.shape[1]), x.dtype
                        )
                        np.matmul(weight, columns, out=product)
                        to[...] = product.reshape(len(weight), len(to), -1).transpose(1, 0, 2)
                if bias is not None:
                    rows[chunk] += bias

        _blas.run(task, self.pieces)
        return y

    def gradients(self, grad_y: Array) -> Array:
        """Accumulate the gradients of the parameters; return that of x."""
        layer, x = self.layer, self.x
        grad_x = np.empty_like(x)
        rows = grad_y.reshape(len(x), layer.out_channels, self.area)
        weight_sums = np.zeros((len(self.pieces), *self.weight.shape), x.dtype)
        bias_sums = np.zeros((len(self.pieces), layer.out_channels), x.dtype)

        def task(index: int, piece: range) -> None:
            for chunk in self.chunks(piece):
                for group, (inputs, outputs) in enumerate(self.groups):
                    weight, weight_sum = self.weight[group], weight_sums[index, group]
                    columns = self.columns(x[chunk, inputs])
                    grad = rows[chunk, outputs]
                    if len(grad) == 1:
                        grad = grad[0]
                    else:
                        product = _blas.workspace(
                            "product", (len(weight), columns.shape[1]), x.dtype
                        )
                        product.reshape(len(weight), len(grad), -1)[...] = grad.transpose(1, 0, 2)
                        grad = product
                    term = _blas.workspace("term", weight.shape, x.dtype)
                    weight_sum += np.matmul(grad, columns.T, out=term)
                    to = grad_x[chunk, inputs]
                    if self.pointwise:
                        np.matmul(weight.T, grad, out=to.reshape(columns.shape))
                    else:
                        np.matmul(weight.T, grad, out=columns)
                        col2im(columns, to, *self.window)
                if layer.bias is not None:
                    bias_sums[index] += rows[chunk].sum(axis=(0, 2))

        _blas.run(task, self.pieces)
        layer.weight.accumulate(weight_sums.sum(axis=0).reshape(layer.weight.data.shape))
        if layer.bias is not None:
            layer.bias.accumulate(bias_sums.sum(axis=0))
        return grad_x
