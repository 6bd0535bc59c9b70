"""The shapes, dtypes and tolerances that tests walk over."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from bnext import _core

_backends = dict(_core.backends())
# Those of the processor, whose results are the same to the bit.
BACKENDS = [name for name, available in _backends.items() if available and name != "cuda"]
# On arrays in main memory, that of GPUs copies them there and back: every test is one of it too.
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _backends["cuda"], reason=f"CUDA: {_core.cuda_unavailable_reason()}"),
]
CUDA = pytest.param("cuda", marks=needs_cuda)
# Those that are computed as they are, and those of 16 bits, of which parameters are not.
DTYPES = [np.dtype(name).type for name, parameters in _core.dtypes.items() if name == parameters]
HALF_DTYPES = [np.dtype(name).type for name in _core.dtypes if np.dtype(name).type not in DTYPES]
ACTIVATIONS = list(_core.activations)


@contextlib.contextmanager
def using(backend):
    """With another backend, until the end of the block."""
    before = _core.backend()
    _core.set_backend(backend)
    try:
        yield
    finally:
        _core.set_backend(before)


def dtype_name(value):
    """For the names of tests."""
    return np.dtype(value).name if value in (*DTYPES, *HALF_DTYPES) else None


# DESIGN: |y - y64| <= 5e-6 (1 + |y|) for float32; float64 carries 29 bits more,
# of which sums of many rounded values take five.
TOLERANCE = {np.dtype(np.float32): 5e-6, np.dtype(np.float64): 5e-6 / 2**24}
# What is rounded to 16 bits is computed as float32: half a unit in the last place more.
TOLERANCE |= {
    np.dtype(dtype): 5e-6 + float(ml_dtypes.finfo(dtype).eps) / 2 for dtype in HALF_DTYPES
}

# (shape, channel_axis): every boundary of the kernels. Rows are cut into chunks of 16,384 values;
# rows shorter than 64, or 33 of one or two samples, and channels-last become columns, at most 1,024
# to a group, 65,536 values to a tile, a few positions side by side where there are few channels; of
# all columns, some rows are one run. Of many channels with short rows, neighbours are one run.
SHAPES = [
    ((2, 1), 1),
    ((2, 3), 1),
    ((7, 1, 5), 1),
    ((3, 5, 1, 1), 1),
    ((2, 1, 1, 1), -1),
    ((4, 3, 7, 7), 1),
    ((4, 7, 7, 3), -1),
    ((3, 5, 63), 1),
    ((3, 5, 64), 1),
    ((3, 5, 65), 1),
    ((1, 3, 15), 1),
    ((1, 2, 2), 1),
    ((13, 17, 11, 3), 1),
    ((13, 11, 3, 17), -1),
    ((2, 3, 2, 5, 11), 1),
    ((1, 2, 16383), 1),
    ((1, 2, 16384), 1),
    ((1, 2, 16385), 1),
    ((3, 2, 16383), 1),
    ((1, 1, 70001), 1),
    ((70001, 1), 1),
    ((331, 211), 1),
    ((5, 1024), 1),
    ((5, 1025), 1),
    ((33, 2051), 1),
    ((3, 700, 3), 1),
    ((1031, 3), 1),
    ((1031, 64), -1),
    ((257, 5, 48), -1),
    ((9, 31, 67), -1),
    ((2, 40, 41, 100), -1),
    ((9, 130, 7, 7), 1),
    ((64, 3, 9, 9), 1),
    ((3, 70, 14, 14), 1),
    ((2, 130, 9, 9), 1),
    ((1, 70, 6, 6), 1),
]


def name_of(case):
    shape, channel_axis = case
    return "x".join(map(str, shape)) + ("" if channel_axis == 1 else "-last")


def channels_of(shape, channel_axis):
    return shape[channel_axis]


def data(shape, channel_axis=1, dtype=np.float32, seed=0, offset=3.0):
    """Normal values with a mean and a spread of its own for each channel."""
    rng = np.random.default_rng(seed)
    channels = shape[channel_axis]
    per_channel = [1] * len(shape)
    per_channel[channel_axis] = channels
    spread = np.exp(rng.normal(size=per_channel))
    x = rng.normal(size=shape) * spread + offset * rng.normal(size=per_channel)
    return x.astype(dtype)


def parameter_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def parameters(channels, dtype=np.float32, seed=1):
    """weight and bias for data of `dtype`: float32 for those of 16 bits."""
    rng = np.random.default_rng(seed)
    dtype = parameter_dtype(dtype)
    return rng.normal(size=channels).astype(dtype), rng.normal(size=channels).astype(dtype)


_extent = st.integers(1, 9) | st.sampled_from([1, 7, 13, 16, 31, 32, 33, 64, 65, 100, 129])


@st.composite
def shapes(draw):
    """(shape, channel_axis) of up to 40,000 elements and two or more values per channel."""
    rank = draw(st.integers(2, 5))
    shape = []
    for _ in range(rank):
        room = 40_000 // int(np.prod(shape, initial=1))
        shape.append(draw(_extent.filter(lambda extent, room=room: extent <= room)))
    channel_axis = draw(st.sampled_from([1, -1]))
    if np.prod(shape) == shape[channel_axis]:  # one value per channel
        shape[0] += 1
    return tuple(shape), channel_axis
