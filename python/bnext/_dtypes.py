"""The dtypes of data, and those of what belongs to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnext import _core

# By name: bfloat16 is not NumPy's, the package ml_dtypes has it, and nobody else needs that.
DATA = tuple(_core.dtypes)
NAMES = " or ".join([", ".join(DATA[:-1]), DATA[-1]])


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of `dtype` are only stored so, in 16 bits, and computed as others."""
    return dtype.name != _core.dtypes.get(dtype.name, dtype.name)


def parameter_dtype(dtype: np.dtype[Any] | None) -> np.dtype[Any]:
    """That of parameters, statistics and factors for data of `dtype`: float32 but for float64.

    What is not ours counts as float32 too.
    """
    return np.dtype(_core.dtypes.get(dtype.name if dtype is not None else "", "float32"))
