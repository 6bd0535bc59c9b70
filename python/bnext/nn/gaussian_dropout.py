"""Dropout by multiplicative noise."""

from __future__ import annotations

from bnext import functional as F
from bnext.nn.dropout import Dropout
from bnext.nn.module import Array, Backward
from bnext.random import Generator

__all__ = ["GaussianDropout"]


class GaussianDropout(Dropout):
    """In training, multiply each element by a random number from N(1, p / (1 - p)).

    That has the mean and the variance of the factors of `Dropout`. Evaluation is the identity.

    Parameters
    ----------
    p : float, default 0.5
        In [0, 1): at 1 the variance would be infinite.
    generator : Generator, optional
        As `Dropout`.

    Shape: any, kept.

    References
    ----------
    Srivastava et al., "Dropout", JMLR 15 (2014), section 10.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> layer = bnext.nn.GaussianDropout(0.2, generator=bnext.Generator(0))
    >>> y, backward = layer.forward(np.ones((100, 1000), np.float32))
    >>> bool(abs(y.mean() - 1) < 0.01), bool(abs(y.var() - 0.25) < 0.01)
    (True, True)
    """

    def __init__(self, p: float = 0.5, *, generator: Generator | None = None) -> None:
        super().__init__(p, generator=generator)
        if self.p == 1:
            raise ValueError("GaussianDropout: p: expected a number in [0, 1), got 1")

    def _drop(self, x: Array) -> tuple[Array, Backward]:
        y, saved = F.gaussian_dropout_forward(
            x, self.p, mask_shape=self._mask_shape(x), generator=self.generator
        )
        return y, lambda grad_y: F.gaussian_dropout_backward(grad_y, saved)
