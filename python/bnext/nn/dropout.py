"""Dropout of single elements and of whole channels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bnext import functional as F
from bnext.nn.module import Array, Backward, Module, number
from bnext.random import Generator

__all__ = ["Dropout", "Dropout2d"]


class Dropout(Module):
    """In training, zero each element with probability `p` and scale the others by 1 / (1 - p).

    Evaluation is the identity, and returns its input itself.

    Parameters
    ----------
    p : float, default 0.5
        In [0, 1].
    generator : Generator, optional
        Where masks are drawn from; `bnext.random.default_generator` if not given.

    Shape: any, kept.

    References
    ----------
    Srivastava et al., "Dropout", JMLR 15 (2014).

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> y, backward = nn.Dropout(0.5).forward(np.ones((2, 4), np.float32))
    >>> sorted({float(value) for value in y.flat} | {0.0, 2.0})
    [0.0, 2.0]
    """

    def __init__(self, p: float = 0.5, *, generator: Generator | None = None) -> None:
        super().__init__()
        p = number(type(self).__name__, "p", p)
        if not 0 <= p <= 1:
            raise ValueError(f"{type(self).__name__}: p: expected a number in [0, 1], got {p}")
        self.p = p
        self.generator = generator

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        x = self._check(x)
        if not self.training or self.p == 0:
            return x, lambda grad_y: grad_y
        y, saved = F.dropout_forward(x, self.p, generator=self.generator)
        return y, lambda grad_y: F.dropout_backward(grad_y, saved)

    def __call__(self, x: npt.ArrayLike) -> Array:
        return self._check(x)

    def _check(self, x: npt.ArrayLike) -> Array:
        return np.asanyarray(x)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Dropout2d(Dropout):
    """In training, zero each channel of each sample with probability `p`, as `Dropout` does.

    Neighbouring pixels of one channel are so alike that dropping single ones takes little
    away (Tompson et al., "Efficient object localization using convolutional networks",
    CVPR 2015).

    Parameters
    ----------
    p, generator
        As `Dropout`.

    Shape: (N, C, H, W), kept.

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> y, backward = nn.Dropout2d(0.5).forward(np.ones((4, 8, 3, 3), np.float32))
    >>> bool((y == y[:, :, :1, :1]).all())
    True
    """

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        x = self._check(x)
        if not self.training or self.p == 0:
            return x, lambda grad_y: grad_y
        # Ones through dropout are the factors of the channels: 0 or 1 / (1 - p).
        ones = np.ones((*x.shape[:2], 1, 1), x.dtype)
        factors, _ = F.dropout_forward(ones, self.p, generator=self.generator, out=ones)
        return x * factors, lambda grad_y: grad_y * factors

    def _check(self, x: npt.ArrayLike) -> Array:
        x = np.asanyarray(x)
        if x.ndim != 4:
            raise ValueError(f"{self.label}: expected (N, C, H, W), got shape {x.shape}")
        return x
