"""Two-dimensional convolution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from bnext import _core, random
from bnext.nn import _blas, _check
from bnext.nn._blas import Workspace
from bnext.nn.module import Array, Backward, Module, Parameter

# Bytes of windows or tiles to work on at a time: more no longer fit into a core's own cache, less
# leaves too little between two returns to Python.
_CHUNK = 1 << 21
# Channels of a group from which on Winograd's matrix products are large enough to pay.
_CHANNELS = 8


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
    Most 3x3 kernels with stride 1 take Winograd's algorithm, with 16 instead of 36 multiplications
    for 4 outputs; a NaN or an infinity then spreads to all of the 2x2 outputs computed together.

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

    def _method(self, x: npt.ArrayLike) -> tuple[_Method, Array]:
        """How to convolve `x`, and `x` as it is wanted."""
        array = _check.images(self, x, channels=self.in_channels, dtype=self.dtype)
        simple = self.stride == self.dilation == (1, 1) and self.kernel_size == (3, 3)
        if simple and self.in_channels >= _CHANNELS * self.groups:
            return _Winograd(self, array.shape), array
        return _Windows(self, array.shape), array

    def __call__(self, x: npt.ArrayLike) -> Array:
        method, array = self._method(x)
        return method.output(array)

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        method, array = self._method(x)
        y = method.output(array)
        y_shape = y.shape

        def backward(grad_y: Array) -> Array:
            return method.gradients(_check.gradient(self, grad_y, y_shape, self.dtype), array)

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


class _Method:
    """A way to do a convolution with matrix products, for inputs of one shape.

    The samples are cut into pieces for the threads, the pieces into chunks that fit into the
    cache; one chunk of one group of channels is the business of the subclasses. Nothing that is
    large is kept for backward: it is cheaper to make it again than to fetch it from memory.
    """

    # Multiplications for each element of a weight at each output position.
    _cost = 1.0

    def __init__(self, layer: Conv2d, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.plane = _check.positions(
            layer, shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation
        )
        inputs, outputs = (
            channels // layer.groups for channels in (layer.in_channels, layer.out_channels)
        )
        self.groups = [
            (slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs))
            for g in range(layer.groups)
        ]
        weight = layer.weight.data
        with _blas.serial():
            self.matrices = self.transform(weight.reshape(layer.groups, outputs, *weight.shape[1:]))
        work = self._cost * shape[0] * weight.size * math.prod(self.plane)
        self.pieces = _blas.pieces(shape[0], int(work))
        self.chunk = max(1, _CHUNK // (self.values(inputs, outputs) * weight.itemsize))

    def chunks(self, piece: range) -> list[slice]:
        """The samples of a piece, as many at a time as are worked on at once."""
        return [slice(i, min(i + self.chunk, piece.stop)) for i in piece[:: self.chunk]]

    def output(self, x: Array) -> Array:
        layer = self.layer
        y = np.empty((len(x), layer.out_channels, *self.plane), x.dtype)

        def task(_: int, piece: range, workspace: Workspace) -> None:
            for chunk in self.chunks(piece):
                for matrix, (inputs, outputs) in zip(self.matrices, self.groups, strict=True):
                    self.convolve(matrix, x[chunk, inputs], y[chunk, outputs], workspace)
                if layer.bias is not None:
                    y[chunk] += layer.bias.data[:, np.newaxis, np.newaxis]

        _blas.run(task, self.pieces)
        return y

    def gradients(self, grad_y: Array, x: Array) -> Array:
        """Accumulate the gradients of the parameters; return that of `x`."""
        layer = self.layer
        grad_x = np.empty_like(x)
        # A sum for each piece, and then over the pieces: the same order for any number of threads.
        sums = np.zeros((len(self.pieces), *self.matrices.shape), x.dtype)
        bias_sums = np.zeros((len(self.pieces), layer.out_channels), x.dtype)

        def task(index: int, piece: range, workspace: Workspace) -> None:
            for chunk in self.chunks(piece):
                for group, (inputs, outputs) in enumerate(self.groups):
                    matrix, total = self.matrices[group], sums[index, group]
                    first = chunk.start == piece.start
                    term = total if first else workspace("term", total.shape, x.dtype)
                    self.differentiate(
                        matrix,
                        x[chunk, inputs],
                        grad_y[chunk, outputs],
                        grad_x[chunk, inputs],
                        term,
                        workspace,
                    )
                    if not first:
                        total += term
                if layer.bias is not None:
                    bias_sums[index] += grad_y[chunk].sum(axis=(0, 2, 3))

        _blas.run(task, self.pieces)
        with _blas.serial():
            grad = self.transform_transpose(sums.sum(axis=0))
        layer.weight.accumulate(grad.reshape(layer.weight.data.shape))
        if layer.bias is not None:
            layer.bias.accumulate(bias_sums.sum(axis=0))
        return grad_x

    def values(self, inputs: int, outputs: int) -> int:
        """Elements of working memory for one sample of a group."""
        raise NotImplementedError

    def transform(self, weight: Array) -> Array:
        """What `convolve` wants for each group, of weights (groups, O, C, kernel)."""
        raise NotImplementedError

    def transform_transpose(self, grad: Array) -> Array:
        """The gradient of the weights from that of what `transform` makes of them."""
        raise NotImplementedError

    def convolve(self, matrix: Array, x: Array, y: Array, workspace: Workspace) -> None:
        """Write the convolution of `x` (B, C, H, W) to `y` (B, O, H', W')."""
        raise NotImplementedError

    def differentiate(
        self,
        matrix: Array,
        x: Array,
        grad_y: Array,
        grad_x: Array,
        grad_matrix: Array,
        workspace: Workspace,
    ) -> None:
        """Write the gradients of `x` and of `matrix`."""
        raise NotImplementedError


class _Windows(_Method):
    """The windows of a sample as the columns of a matrix (K, positions).

    K runs over channel, kernel row and kernel column, as in the weight.
    """

    def __init__(self, layer: Conv2d, shape: tuple[int, ...]) -> None:
        self.window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        # Then a sample is that matrix already.
        self.pointwise = self.window == ((1, 1), (1, 1), (0, 0), (1, 1))
        super().__init__(layer, shape)

    def values(self, inputs: int, outputs: int) -> int:
        return inputs * math.prod(self.layer.kernel_size) * math.prod(self.plane)

    def transform(self, weight: Array) -> Array:
        return weight.reshape(*weight.shape[:2], -1)

    def transform_transpose(self, grad: Array) -> Array:
        return grad

    def columns(self, matrix: Array, x: Array, workspace: Workspace) -> Array:
        shape = (len(x), matrix.shape[1], math.prod(self.plane))
        if self.pointwise:
            return x.reshape(shape)
        columns = workspace("columns", shape, x.dtype)
        _core.im2col(x, columns, *self.window)
        return columns

    def convolve(self, matrix: Array, x: Array, y: Array, workspace: Workspace) -> None:
        np.matmul(matrix, self.columns(matrix, x, workspace), out=y.reshape(*y.shape[:2], -1))

    def differentiate(
        self,
        matrix: Array,
        x: Array,
        grad_y: Array,
        grad_x: Array,
        grad_matrix: Array,
        workspace: Workspace,
    ) -> None:
        columns = self.columns(matrix, x, workspace)
        grad = grad_y.reshape(*grad_y.shape[:2], -1)
        terms = workspace("terms", (len(x), *matrix.shape), x.dtype)
        np.matmul(grad, columns.transpose(0, 2, 1), out=terms)
        np.sum(terms, axis=0, out=grad_matrix)
        if self.pointwise:
            np.matmul(matrix.T, grad, out=grad_x.reshape(columns.shape))
        else:
            np.matmul(matrix.T, grad, out=columns)
            _core.col2im(columns, grad_x, *self.window)


class _Winograd(_Method):
    """3x3 with stride 1: Winograd's F(2x2, 3x3), explained in cpp/core/winograd.hpp.

    Each of the 16 elements of the transformed tiles is a matrix product over the channels.
    """

    _cost = 16 / 36
    _G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    # G g G^T as a matrix times g: row (i, j), column (k, l).
    _GG = np.kron(_G, _G)

    @property
    def tiles(self) -> int:
        return math.prod((size + 1) // 2 for size in self.plane)

    def values(self, inputs: int, outputs: int) -> int:
        return 16 * (inputs + outputs) * self.tiles

    def transform(self, weight: Array) -> Array:
        groups, outputs, inputs = weight.shape[:3]
        kernels = weight.reshape(groups, -1, 9).transpose(0, 2, 1)
        return (self._GG.astype(weight.dtype) @ kernels).reshape(groups, 16, outputs, inputs)

    def transform_transpose(self, grad: Array) -> Array:
        tiles = grad.reshape(len(grad), 16, -1).transpose(0, 2, 1)
        kernels: Array = np.matmul(tiles, self._GG.astype(grad.dtype))
        return kernels

    def input_tiles(self, x: Array, workspace: Workspace) -> Array:
        tiles = workspace("input tiles", (16, x.shape[1], len(x) * self.tiles), x.dtype)
        _core.winograd_input(x, tiles, self.layer.padding)
        return tiles

    def output_tiles(self, y: Array, workspace: Workspace) -> Array:
        return workspace("output tiles", (16, y.shape[1], len(y) * self.tiles), y.dtype)

    def convolve(self, matrix: Array, x: Array, y: Array, workspace: Workspace) -> None:
        tiles = self.output_tiles(y, workspace)
        np.matmul(matrix, self.input_tiles(x, workspace), out=tiles)
        _core.winograd_output(tiles, y)

    def differentiate(
        self,
        matrix: Array,
        x: Array,
        grad_y: Array,
        grad_x: Array,
        grad_matrix: Array,
        workspace: Workspace,
    ) -> None:
        tiles = self.input_tiles(x, workspace)
        grad_tiles = self.output_tiles(grad_y, workspace)
        _core.winograd_output_transpose(grad_y, grad_tiles)
        np.matmul(grad_tiles, tiles.transpose(0, 2, 1), out=grad_matrix)
        np.matmul(matrix.transpose(0, 2, 1), grad_tiles, out=tiles)
        _core.winograd_input_transpose(tiles, grad_x, self.layer.padding)
