"""What layers check at their border, with messages that name the layer."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from bnext import _dtypes

# For layers as for operations.
from bnext._pieces import channel_axis as channel_axis
from bnext._pieces import integer as integer
from bnext.nn.module import Array, Module, number
from bnext.random import Generator

Pair = tuple[int, int]

_WEIGHTS = (np.float32, np.float64)


def native(where: str, argument: str, x: npt.ArrayLike) -> Array:
    """`x` as an array of this machine's byte order; TypeError if some of it is masked.

    ValueError if it is no array, but a ragged list.
    """
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise TypeError(
            f"{where}: {argument}: expected an array without masked values, got a masked array"
        )
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"{where}: {argument}: expected an array, "
            f"got a {type(x).__name__} that is none: {error}"
        ) from None
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def floating(module: Module, x: npt.ArrayLike, dtype: np.dtype[Any] | None = None) -> Array:
    """`x` as an array of `dtype`, by default of any of ours; TypeError if it is another."""
    array = native(module.label, "x", x)
    if dtype is None:
        if array.dtype.name not in _dtypes.DATA:
            raise TypeError(f"{module.label}: x: expected {_dtypes.NAMES}, got {array.dtype}")
    elif array.dtype != dtype:
        raise TypeError(f"{module.label}: x: expected {dtype}, as its weight, got {array.dtype}")
    return array


def images(
    module: Module,
    x: npt.ArrayLike,
    *,
    channels: int | None = None,
    dtype: np.dtype[Any] | None = None,
) -> Array:
    """`x` as a contiguous array (N, C, H, W) with `channels` channels, by default any number.

    Without `dtype`, float32 or float64: convolution and pooling have no half types.
    """
    array = native(module.label, "x", x) if dtype is None else floating(module, x, dtype)
    if array.dtype not in _WEIGHTS:
        raise TypeError(f"{module.label}: x: expected float32 or float64, got {array.dtype}")
    if array.ndim != 4:
        raise ValueError(f"{module.label}: x: expected shape (N, C, H, W), got {array.shape}")
    if channels is not None and array.shape[1] != channels:
        raise ValueError(
            f"{module.label}: x: expected {channels} channels (axis 1), got shape {array.shape}"
        )
    return np.ascontiguousarray(array)


def gradient(module: Module, grad_y: npt.ArrayLike, y: tuple[int, ...], dtype: Any) -> Array:
    """`grad_y` as a contiguous array with the shape of `y` and `dtype`."""
    array = native(module.label, "grad_y", grad_y)
    if array.shape != y:
        raise ValueError(f"{module.label}: grad_y: expected shape {y}, got {array.shape}")
    if array.dtype != dtype:
        raise TypeError(f"{module.label}: grad_y: expected {dtype}, got {array.dtype}")
    return np.asarray(array, order="C")


def finite(kind: str, name: str, value: float) -> float:
    """`value` as a finite float."""
    value = number(kind, name, value)
    if not math.isfinite(value):
        raise ValueError(f"{kind}: {name}: expected a finite number, got {value}")
    return value


def weight_dtype(kind: str, dtype: npt.DTypeLike) -> np.dtype[Any]:
    """`dtype` as a NumPy dtype; TypeError unless it is float32 or float64."""
    try:
        wanted = None if dtype is None else np.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted not in _WEIGHTS:
        raise TypeError(f"{kind}: dtype: expected float32 or float64, got {wanted or repr(dtype)}")
    return wanted


def generator(kind: str, given: Generator | None) -> Generator | None:
    """`given`; TypeError unless it is one of ours or None."""
    if given is not None and not isinstance(given, Generator):
        raise TypeError(
            f"{kind}: generator: expected a bnext.Generator or None, got {type(given).__name__}"
        )
    return given


def layer(where: str, argument: str, given: Any) -> Module:
    """`given`; TypeError unless it is a Module."""
    if not isinstance(given, Module):
        raise TypeError(f"{where}: {argument}: expected a Module, got {type(given).__name__}")
    return given


def model(operation: str, given: Module) -> Module:
    """`given`; TypeError unless it is a Module."""
    return layer(operation, "model", given)


def pair(
    kind: str, name: str, value: SupportsIndex | tuple[SupportsIndex, ...], least: int
) -> Pair:
    """One integer for both axes, or two of them; each >= `least`."""
    values = value if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{kind}: {name}: expected an integer or two, got {value!r}")
    return integer(kind, name, values[0], least), integer(kind, name, values[1], least)


def positions(
    module: Module,
    size: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair = (1, 1),
) -> Pair:
    """Number of window positions along each axis of an image; ValueError if none fits."""
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if any(s + 2 * p < e for s, p, e in zip(size, padding, extent, strict=True)):
        least = [max(0, e - 2 * p) for e, p in zip(extent, padding, strict=True)]
        raise ValueError(
            f"{module.label}: x: expected a height and width of at least {least[0]} and {least[1]} "
            f"for a window of {extent[0]}x{extent[1]}, got {size[0]}x{size[1]}"
        )
    height, width = (
        (s + 2 * p - e) // t + 1 for s, p, e, t in zip(size, padding, extent, stride, strict=True)
    )
    return height, width
