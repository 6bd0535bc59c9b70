"""What every operation means, in plain NumPy: extended precision, no tricks, no bnext."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Wide = np.longdouble  # float64 where the platform has nothing wider


def _axes(x, channel_axis):
    return tuple(axis for axis in range(x.ndim) if axis != channel_axis % x.ndim)


def _per_channel(values, x, channel_axis):
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return np.asarray(values, Wide).reshape(shape)


def wide(x):
    """x in extended precision; NumPy cannot convert every dtype there at once."""
    return np.asarray(x).astype(np.float64).astype(Wide) if x.dtype.itemsize < 4 else x.astype(Wide)


def activate(z, activation, slope):
    """(value, derivative) of the activation; where it has none, that from the left."""
    if activation == "relu":
        return np.where(z <= 0, 0, z), np.where(z > 0, 1, 0)
    if activation == "leaky_relu":
        return np.where(z > 0, z, slope * z), np.where(z > 0, 1, slope)
    if activation == "relu6":
        return np.clip(z, 0, 6), np.where((z > 0) & (z < 6), 1, 0)
    if activation == "hardswish":
        derivative = np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6))
        return z * np.clip(z + 3, 0, 6) / 6, derivative
    if activation == "silu":
        s = 1 / (1 + np.exp(-z))
        return z * s, s + z * s * (1 - s)
    if activation == "gelu":
        u = np.sqrt(2 / Wide(np.pi)) * (z + Wide(0.044715) * z**3)
        du = np.sqrt(2 / Wide(np.pi)) * (1 + 3 * Wide(0.044715) * z**2)
        t = np.tanh(u)
        return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t**2) * du / 2
    if activation is not None:
        raise ValueError(f"no reference for {activation!r}")
    return z, np.ones_like(z)


@dataclass
class BatchNorm:
    """Batch normalization of `x`; by `mean` and `var` if given, by the batch's own if not."""

    x: np.ndarray
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    eps: float = 1e-5
    channel_axis: int = 1
    activation: str | None = None
    negative_slope: float = 0.01
    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    residual: np.ndarray | None = None
    dropout: float = 0.0
    seed: int = 0
    offset: int = 0

    def __post_init__(self):
        x = wide(self.x)
        axes = _axes(x, self.channel_axis)
        self.batch_statistics = self.mean is None
        if self.batch_statistics:
            self.mean = x.mean(axes)
            self.var = np.square(x - self._wide(self.mean)).mean(axes)
        self.r = 1 / np.sqrt(self._wide(self.var) + self.eps)
        self.n = (x - self._wide(self.mean)) * self.r
        self.scale = self._wide(1 if self.weight is None else self.weight)
        self.z = self.n * self.scale + self._wide(0 if self.bias is None else self.bias)
        if self.residual is not None:
            self.z = self.z + wide(self.residual)
        self.y, self.derivative = activate(self.z, self.activation, self.negative_slope)
        self.y = self._drop(self.y)

    def _drop(self, values):
        return dropout(values, self.dropout, self.seed, self.offset)

    def _wide(self, values):
        return _per_channel(values, self.x, self.channel_axis)

    def grad_residual(self, grad_y):
        return self._drop(wide(grad_y)) * self.derivative

    def backward(self, grad_y):
        """Gradients of x, weight and bias."""
        axes = _axes(self.x, self.channel_axis)
        g = self.grad_residual(grad_y)
        grad_x = g
        if self.batch_statistics:
            grad_x = g - g.mean(axes, keepdims=True)
            grad_x -= self.n * (g * self.n).mean(axes, keepdims=True)
        return self.scale * self.r * grad_x, (g * self.n).sum(axes), g.sum(axes)


def philox4x32_10(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011) on arrays: counter of four words, key of two."""
    c = [np.asarray(word, np.uint64) for word in counter]
    k = [int(word) for word in key]
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c[0]
        product1 = np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product1 >> shift) ^ c[1] ^ np.uint64(k[0]),
            product1 & mask,
            (product0 >> shift) ^ c[3] ^ np.uint64(k[1]),
            product0 & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def dropout_bits(size, seed, offset):
    """The 32 random bits of each of `size` elements, as cpp/core/philox.hpp lays them out."""
    word, bit = np.divmod(np.arange(size, dtype=np.uint64), np.uint64(32))
    key = (seed & 0xFFFFFFFF, seed >> 32)
    low, high = np.full_like(word, offset & 0xFFFFFFFF), np.full_like(word, offset >> 32)
    number = np.zeros_like(word)
    for draw in range(8):
        top = (word >> np.uint64(32)) | np.uint64(draw << 29)
        for random in philox4x32_10((word & np.uint64(0xFFFFFFFF), top, low, high), key):
            number = number << np.uint64(1) | (random >> bit & np.uint64(1))
    return number


def dropout(x, p, seed, offset):
    """x / (1 - p) where the bits are at least p 2^32, 0 elsewhere; half types rounded once."""
    if p == 0:
        return x.copy()
    if p == 1:
        return np.zeros_like(x)
    keep = dropout_bits(x.size, seed, offset) >= np.uint64(round(p * 2**32))
    computed = x.astype(np.float32) if x.dtype.itemsize < 4 else x
    scale = computed.dtype.type(1 / (1 - p))
    return np.where(keep.reshape(x.shape), computed * scale, 0).astype(x.dtype)


def gaussian_noise(size, p, seed, offset):
    """1 + sqrt(p / (1 - p)) z with z by Box and Muller (1958), as cpp/core/gaussian.cpp does."""
    span, e = np.divmod(np.arange(size, dtype=np.uint64), np.uint64(256))
    word, lane = np.divmod(e, np.uint64(64))
    block = span * np.uint64(64) + lane
    low, high = np.full_like(block, offset & 0xFFFFFFFF), np.full_like(block, offset >> 32)
    counter = (block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), low, high)
    words = np.stack(philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))).astype(np.float64)
    second = word % np.uint64(2) == 1
    pair = np.where(word < 2, 0, 2)[None]
    u = (np.take_along_axis(words, pair, 0)[0] + 0.5) / 2**32
    angle = 2 * np.pi * np.take_along_axis(words, pair + 1, 0)[0] / 2**32
    z = np.sqrt(-2 * np.log(u)) * np.where(second, np.sin(angle), np.cos(angle))
    return 1 + np.sqrt(p / (1 - p)) * z


def alpha_dropout(x, kept, p):
    """Klambauer et al. (2017), section 2.4, for a given mask."""
    saturation = -1.6732632423543772848170429916717 * 1.0507009873554804934193349852946
    x, kept = wide(x), kept.astype(Wide)
    if p == 1:
        return np.zeros_like(x)
    a = 1 / np.sqrt((1 - p) + saturation**2 * p * (1 - p))
    return a * (x * kept + saturation * (1 - kept)) - a * p * saturation


def drop_block2d_kept(shape, p, block_size, seed, offset):
    """Ghiasi et al. (2018): True where no block lies over the element."""
    n, c, height, width = shape
    block = min(block_size, height, width)
    rows, columns = height - block + 1, width - block + 1
    rate = 1 if p == 1 else min(1, p * height * width / (block**2 * rows * columns))
    bits = dropout_bits(n * c * rows * columns, seed, offset).reshape(n, c, rows, columns)
    kept = np.ones(shape, bool)
    for i, j, k, m in zip(*np.nonzero(bits < np.uint64(round(rate * 2**32))), strict=True):
        kept[i, j, k : k + block, m : m + block] = False
    return kept
