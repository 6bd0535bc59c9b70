"""Fast, exact and well understood Batch Normalization and Dropout.

>>> import numpy as np, bnext
>>> from bnext import functional as F
>>> x = np.random.default_rng(0).normal(size=(32, 16, 8, 8)).astype(np.float32)
>>> y, saved = F.batch_norm_forward(x, np.ones(16, np.float32), np.zeros(16, np.float32))
>>> grads = F.batch_norm_backward(np.ones_like(y), saved)
>>> grads.x.shape, grads.weight.shape
((32, 16, 8, 8), (16,))
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from bnext import _core, conventions, functional, nn
from bnext._core import (
    __version__,
    buffer_stats,
    get_num_threads,
    set_buffer_limit,
    set_num_threads,
)
from bnext.folding import fold
from bnext.random import Generator, manual_seed
from bnext.reestimation import reestimate
from bnext.uncertainty import mc_dropout

if TYPE_CHECKING:
    from bnext.comparison import advise, compare
    from bnext.diagnosis import doctor

__all__ = [
    "Generator",
    "__version__",
    "advise",
    "buffer_stats",
    "compare",
    "conventions",
    "doctor",
    "fold",
    "functional",
    "get_num_threads",
    "manual_seed",
    "mc_dropout",
    "nn",
    "reestimate",
    "set_buffer_limit",
    "set_num_threads",
    "show_config",
]


# What trains, measures and reports is loaded when it is first asked for.
_LATER = {"advise": "comparison", "compare": "comparison", "doctor": "diagnosis"}
_MODULES = (
    "checkpoint",
    "comparison",
    "data",
    "diagnosis",
    "losses",
    "models",
    "onnx",
    "optim",
    "regularizers",
    "scaling",
    "schedules",
    "train",
)


# Hidden from type checkers, for which every name would be one of ours.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"bnext.{name}")
        if name in _LATER:
            value = getattr(importlib.import_module(f"bnext.{_LATER[name]}"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'bnext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_MODULES})


def show_config() -> None:
    """Print the version, the backends compiled and in use, the threads, the cache and OpenMP."""
    in_use = _core.backend()
    backends = [
        name + (" (in use)" if name == in_use else "" if available else " (not on this machine)")
        for name, available in _core.backends()
    ]
    why_not = _core.cuda_unavailable_reason()
    print(f"bnext     {__version__}")
    print(f"backends  {', '.join(backends)}")
    print(f"threads   {get_num_threads()}")
    print(f"cache     {_core.cache_bytes() / 2**20:.1f} MiB")
    print(f"OpenMP    {'yes' if _core.has_openmp() else 'no'}")
    print(f"CUDA      {why_not or 'yes'}")


# A child of fork has none of its parent's worker threads, and would wait for them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_core.pause_threads)
