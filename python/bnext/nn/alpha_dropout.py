"""Dropout for self-normalizing networks."""

from __future__ import annotations

import numpy.typing as npt

from bnext import _dropout
from bnext import functional as F
from bnext.nn.dropout import Dropout
from bnext.nn.module import Array, Backward

__all__ = ["AlphaDropout", "FeatureAlphaDropout"]


class AlphaDropout(Dropout):
    """In training, set each element to what SELU saturates at with probability `p`.

    All elements are then scaled and shifted so that a mean of 0 and a variance of 1 stay what
    they are: `bnext.functional.alpha_dropout_forward` has the formula. Evaluation is the identity.

    Parameters
    ----------
    p, generator
        As `Dropout`.

    Shape: any, kept.

    References
    ----------
    Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, arXiv:1706.02515.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> x = np.random.default_rng(0).normal(size=(1000, 100))
    >>> y, backward = AlphaDropout(0.3, generator=bnext.Generator(0)).forward(x)
    >>> bool(abs(y.mean()) < 0.01), bool(abs(y.var() - 1) < 0.01)
    (True, True)
    """

    def _drop(self, x: Array) -> tuple[Array, Backward]:
        y, saved = F.alpha_dropout_forward(
            x, self.p, mask_shape=self._mask_shape(x), generator=self.generator
        )
        return y, lambda grad_y: F.alpha_dropout_backward(grad_y, saved)


class FeatureAlphaDropout(AlphaDropout):
    """`AlphaDropout` of whole channels of each sample.

    Parameters
    ----------
    p, generator
        As `Dropout`.

    Shape: (N, C, \\*), kept.

    Examples
    --------
    >>> import numpy as np
    >>> y, backward = FeatureAlphaDropout(0.5).forward(np.ones((4, 8, 3, 3), np.float32))
    >>> bool((y == y[:, :, :1, :1]).all())
    True
    """

    def _checked(self, x: npt.ArrayLike) -> Array:
        x = super()._checked(x)
        _dropout.channel_mask_shape(self.label, x.shape)
        return x

    def _mask_shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _dropout.channel_mask_shape(self.label, shape)
