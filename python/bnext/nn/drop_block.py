"""Dropout of blocks of neighbouring pixels."""

from __future__ import annotations

from typing import SupportsIndex

import numpy.typing as npt

from bnext import functional as F
from bnext.nn import _check
from bnext.nn.dropout import Dropout
from bnext.nn.module import Array, Backward
from bnext.random import Generator

__all__ = ["DropBlock2d"]


class DropBlock2d(Dropout):
    """In training, zero square blocks of each channel of each sample.

    Some `p` of the elements are dropped, the others scaled by elements / elements kept:
    `bnext.functional.drop_block2d_forward` has the formula. Evaluation is the identity.

    Parameters
    ----------
    p : float, default 0.1
        In [0, 1].
    block_size : int, default 7
        Height and width of a block; no more than those of the image are used.
    generator : Generator, optional
        As `Dropout`.

    Shape: (N, C, H, W), kept.

    References
    ----------
    Ghiasi et al., "DropBlock", NeurIPS 2018, arXiv:1810.12890.

    Examples
    --------
    >>> import numpy as np
    >>> layer = DropBlock2d(0.2, block_size=3)
    >>> y, backward = layer.forward(np.ones((2, 3, 8, 8), np.float32))
    >>> layer
    DropBlock2d(p=0.2, block_size=3)
    """

    def __init__(
        self,
        p: float = 0.1,
        block_size: SupportsIndex = 7,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(p, generator=generator)
        self.block_size = _check.integer("DropBlock2d", "block_size", block_size, 1)

    def _checked(self, x: npt.ArrayLike) -> Array:
        x = super()._checked(x)
        if x.ndim != 4:
            raise ValueError(f"{self.label}: expected (N, C, H, W), got shape {x.shape}")
        return x

    def _drop(self, x: Array) -> tuple[Array, Backward]:
        y, saved = F.drop_block2d_forward(
            x,
            self.p,
            self.block_size,
            mask_shape=self._mask_shape(x),
            generator=self.generator,
        )
        return y, lambda grad_y: F.drop_block2d_backward(grad_y, saved)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}"
