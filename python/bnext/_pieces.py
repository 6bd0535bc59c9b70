"""What operations share that are written in Python: checks, and work on several threads."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from bnext import _core
from bnext._dtypes import parameter_dtype

Array = npt.NDArray[Any]

# Elements that one thread works on at a time: they stay in the cache of its core.
_PIECE = 1 << 16


def probability(operation: str, p: float) -> float:
    if not isinstance(p, SupportsFloat) or np.ndim(p):
        raise TypeError(f"{operation}: p: expected a number, got {type(p).__name__}")
    p = float(p)
    if not 0 <= p <= 1:
        raise ValueError(f"{operation}: p: expected a probability in [0, 1], got {p:g}")
    return p


def integer(operation: str, argument: str, value: SupportsIndex, least: float = -math.inf) -> int:
    """`value` as an int >= `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{operation}: {argument}: expected an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{operation}: {argument}: expected {least} or more, got {number}")
    return number


def sizes(operation: str, argument: str, value: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """`value` as a shape without negative sizes; which it may have is for others to say."""
    try:
        shape = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(
            f"{operation}: {argument}: expected a tuple of integers, got {value!r}"
        ) from None
    if any(size < 0 for size in shape):
        raise ValueError(f"{operation}: {argument}: expected no negative extent, got {shape}")
    return shape


def channel_axis(operation: str, value: SupportsIndex) -> int:
    """`value` as an int, 1 or -1."""
    try:
        axis = operator.index(value)
    except TypeError:
        raise TypeError(f"{operation}: channel_axis: expected 1 or -1, got {value!r}") from None
    if axis not in (1, -1):
        raise ValueError(f"{operation}: channel_axis: expected 1 or -1, got {axis}")
    return axis


def gradient(
    operation: str, grad_y: npt.ArrayLike, saved: Any, kind: type[Any], out: Array | None
) -> tuple[Array, Array]:
    """`grad_y` and where its product goes."""
    if type(saved) is not kind:
        forward = operation.replace("backward", "forward")
        raise TypeError(
            f"{operation}: saved: expected what {forward} returned, got {type(saved).__name__}"
        )
    array, grad_x = _core.prepare(operation, "grad_y", grad_y, out)
    if array.shape != saved.shape:
        raise ValueError(f"{operation}: grad_y: expected shape {saved.shape}, got {array.shape}")
    return array, grad_x


def factor(value: float, dtype: np.dtype[Any]) -> Array:
    """`value` for data of `dtype`, as an array: half types give way to its float32."""
    return np.full(1, value, parameter_dtype(dtype))


def each_piece(task: Callable[[slice], None], count: int, size: int) -> None:
    """Call `task` for slices of `count` items of `size` elements, on several threads.

    The slices follow from the arguments alone, and fit into the cache of a core.
    """
    piece = max(1, _PIECE // max(1, size))
    parts = [slice(i, min(i + piece, count)) for i in range(0, count, piece)]

    def call(i: int) -> None:
        # Each thread has NumPy's defaults, which warn; arithmetic goes where IEEE sends it.
        with np.errstate(all="ignore"):
            task(parts[i])

    if len(parts) == 1:
        call(0)
    elif parts:
        _core.run_tasks(call, len(parts))
