"""What layers check at their border, with messages that name the layer."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from bnext import _dtypes
from bnext.nn.module import Array, Module

Pair = tuple[int, int]

_WEIGHTS = (np.float32, np.float64)


def floating(module: Module, x: npt.ArrayLike, dtype: np.dtype[Any] | None = None) -> Array:
    """`x` as an array of `dtype`, by default of any of ours; TypeError if it is another."""
    array = np.asarray(x)
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
    array = np.asarray(x) if dtype is None else floating(module, x, dtype)
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
    array = np.asarray(grad_y)
    if array.shape != y:
        raise ValueError(f"{module.label}: grad_y: expected shape {y}, got {array.shape}")
    if array.dtype != dtype:
        raise TypeError(f"{module.label}: grad_y: expected {dtype}, got {array.dtype}")
    return np.asarray(array, order="C")


def weight_dtype(kind: str, dtype: npt.DTypeLike) -> np.dtype[Any]:
    """`dtype` as a NumPy dtype; TypeError unless it is float32 or float64."""
    wanted = np.dtype(dtype)
    if wanted not in _WEIGHTS:
        raise TypeError(f"{kind}: dtype: expected float32 or float64, got {wanted}")
    return wanted


def integer(kind: str, name: str, value: SupportsIndex, least: int) -> int:
    """`value` as an int >= `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{kind}: {name}: expected an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{kind}: {name}: expected {least} or more, got {number}")
    return number


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
        raise ValueError(
            f"{module.label}: x: expected a height and width of at least "
            f"{extent[0] - 2 * padding[0]} and {extent[1] - 2 * padding[1]} for a window of "
            f"{extent[0]}x{extent[1]}, got {size[0]}x{size[1]}"
        )
    height, width = (
        (s + 2 * p - e) // t + 1 for s, p, e, t in zip(size, padding, extent, stride, strict=True)
    )
    return height, width
