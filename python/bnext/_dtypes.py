"""The dtypes of data, and those of what belongs to them."""

from __future__ import annotations

from typing import Any

import numpy as np

# By name: bfloat16 is not NumPy's, the package ml_dtypes has it, and nobody else needs that.
_HALF = ("float16", "bfloat16")
DATA = ("float32", "float64", *_HALF)
NAMES = " or ".join([", ".join(DATA[:-1]), DATA[-1]])


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of `dtype` are stored in 16 bits; they are computed as float32."""
    return dtype.name in _HALF


def parameter_dtype(dtype: np.dtype[Any] | None) -> np.dtype[Any]:
    """That of parameters, statistics and factors for data of `dtype`: float32 but for float64.

    What is not ours counts as float32 too.
    """
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
