"""What writing and reading ONNX share."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnext import _extras


def require(module: str) -> Any:
    """`module` of onnx or what it needs; ImportError if it is not installed."""
    return _extras.require(module, "reading and writing ONNX", "onnx")


def decimal(value: float) -> float:
    """The shortest decimal that rounds to the float32 `value`: 0.1, not 0.10000000149.

    ONNX keeps attributes in float32; this undoes the rounding of numbers people write.
    """
    return float(str(np.float32(value)))


def channels_first(rank: int) -> list[int]:
    """The permutation of axes from (N, *, C) to (N, C, *)."""
    return [0, rank - 1, *range(1, rank - 1)]


def channels_last(rank: int) -> list[int]:
    """The permutation of axes from (N, C, *) to (N, *, C)."""
    return [0, *range(2, rank), 1]


def join(path: str, name: str, separator: str) -> str:
    """The two with `separator` between them, or `name` alone if there is no `path`."""
    return f"{path}{separator}{name}" if path else name
