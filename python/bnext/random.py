"""Random numbers: one Philox generator for dropout, one NumPy generator for initial weights.

`default_generator` is where dropout draws from when no `generator` is given.
"""

from __future__ import annotations

import numpy as np

from bnext._core import Generator, default_generator

__all__ = ["Generator", "default_generator", "initial_rng", "manual_seed"]

_initial_rng = np.random.default_rng(0)


def initial_rng() -> np.random.Generator:
    """The generator from which layers draw their initial weights."""
    return _initial_rng


def manual_seed(seed: int) -> Generator:
    """Restart every default generator of bnext from `seed` (0 <= seed < 2**64).

    Returns the default dropout generator, as `torch.manual_seed` does.
    """
    global _initial_rng
    default_generator.state = {"seed": seed, "offset": 0}
    _initial_rng = np.random.default_rng(seed)
    return default_generator
