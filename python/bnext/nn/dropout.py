"""Dropout of single elements, of whole channels and of whole samples."""

from __future__ import annotations

import numpy.typing as npt

from bnext import _dropout
from bnext import functional as F
from bnext.nn import _check
from bnext.nn.module import Array, Backward, Module, number
from bnext.random import Generator

__all__ = ["DropPath", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]


class Dropout(Module):
    """In training, zero each element with probability `p` and scale the others by 1 / (1 - p).

    Evaluation is the identity, and returns its input itself. So does `p` 0, which draws nothing.

    Parameters
    ----------
    p : float, default 0.5
        In [0, 1].
    generator : Generator, optional
        Where masks are drawn from; `bnext.random.default_generator` if not given.

    Attributes
    ----------
    consistent : bool
        Whether all samples of a batch (axis 0) share one mask. False; `bnext.mc_dropout` sets it.

    Shape: any, kept, and so is the dtype: float32, float64, float16 or bfloat16.

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
        self.generator = _check.generator(type(self).__name__, generator)
        self.consistent = False

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        x = self._checked(x)
        if not self.training or self.p == 0:
            return x, lambda grad_y: grad_y
        return self._drop(x)

    def __call__(self, x: npt.ArrayLike) -> Array:
        return self._checked(x)

    def _checked(self, x: npt.ArrayLike) -> Array:
        return _check.floating(self, x)

    def _drop(self, x: Array) -> tuple[Array, Backward]:
        """What training with p > 0 does."""
        y, saved = F.dropout_forward(
            x, self.p, mask_shape=self._mask_shape(x), generator=self.generator
        )
        return y, lambda grad_y: F.dropout_backward(grad_y, saved)

    def _mask_shape(self, x: Array) -> tuple[int, ...]:
        shape = self._mask_shape_of(x.shape)
        return (1, *shape[1:]) if self.consistent else shape

    def _mask_shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the mask that is broadcast to an x of `shape`, unless it is consistent."""
        return shape

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _ChannelDropout(Dropout):
    """What `Dropout1d`, `Dropout2d` and `Dropout3d` are but for their ranks."""

    _rank: int
    _spatial = ("L", "H, W", "D, H, W")

    def __init__(
        self, p: float = 0.5, *, channel_axis: int = 1, generator: Generator | None = None
    ) -> None:
        super().__init__(p, generator=generator)
        self.channel_axis = _check.channel_axis(type(self).__name__, channel_axis)

    def _batch(self, rank: int) -> str:
        spatial = self._spatial[rank - 3]
        return f"(N, C, {spatial})" if self.channel_axis == 1 else f"(N, {spatial}, C)"

    def _checked(self, x: npt.ArrayLike) -> Array:
        x = super()._checked(x)
        if x.ndim == self._rank:
            return x
        advice = []
        if x.ndim == 2:
            advice.append("Dropout for (N, C)")
        elif 3 <= x.ndim <= 5:
            advice.append(f"Dropout{x.ndim - 2}d for {self._batch(x.ndim)}")
        if x.ndim == self._rank - 1:
            advice.append(f"x[None] for {self._batch(self._rank).replace('N, ', '')}")
        raise ValueError(
            f"{self.label}: expected {self._batch(self._rank)}, got shape {x.shape}"
            + (f": use {', or '.join(advice)}" if advice else "")
        )

    def _mask_shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _dropout.channel_mask_shape(self.label, shape, self.channel_axis)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", channel_axis=-1" if self.channel_axis == -1 else "")


class Dropout1d(_ChannelDropout):
    """In training, zero each channel of each sample with probability `p`, as `Dropout` does.

    Parameters
    ----------
    p, generator
        As `Dropout`.
    channel_axis : 1 or -1, default 1

    Shape: (N, C, L), or (N, L, C) with channel_axis -1; kept.

    Raises
    ------
    ValueError
        If the input has another rank. (PyTorch takes (C, L) for one sample; here ``x[None]``.)

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> y, backward = nn.Dropout1d(0.5).forward(np.ones((4, 8, 3), np.float32))
    >>> bool((y == y[:, :, :1]).all())
    True
    """

    _rank = 3


class Dropout2d(_ChannelDropout):
    """In training, zero each channel of each sample with probability `p`, as `Dropout` does.

    Neighbouring pixels of one channel are so alike that dropping single ones takes little
    away (Tompson et al., "Efficient object localization using convolutional networks",
    CVPR 2015).

    Parameters
    ----------
    p, generator
        As `Dropout`.
    channel_axis : 1 or -1, default 1

    Shape: (N, C, H, W), or (N, H, W, C) with channel_axis -1; kept.

    Raises
    ------
    ValueError
        If the input has another rank: PyTorch takes (N, C, L) for (C, H, W), or the other way
        round, by version.

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> y, backward = nn.Dropout2d(0.5).forward(np.ones((4, 8, 3, 3), np.float32))
    >>> bool((y == y[:, :, :1, :1]).all())
    True
    """

    _rank = 4


class Dropout3d(_ChannelDropout):
    """In training, zero each channel of each sample with probability `p`, as `Dropout` does.

    Parameters
    ----------
    p, generator
        As `Dropout`.
    channel_axis : 1 or -1, default 1

    Shape: (N, C, D, H, W), or (N, D, H, W, C) with channel_axis -1; kept.

    Raises
    ------
    ValueError
        If the input has another rank. (PyTorch takes (C, D, H, W) for one sample; here
        ``x[None]``.)

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> y, backward = nn.Dropout3d(0.5).forward(np.ones((4, 8, 2, 3, 3), np.float32))
    >>> bool((y == y[:, :, :1, :1, :1]).all())
    True
    """

    _rank = 5


class DropPath(Dropout):
    """In training, zero each sample with probability `p` and scale the others by 1 / (1 - p).

    At the end of a residual branch it takes the whole branch away from some samples: stochastic
    depth. (torchvision calls it `StochasticDepth`, mode "row".)

    Parameters
    ----------
    p, generator
        As `Dropout`. Usual is a `p` that rises linearly with depth, from 0 to some 0.2.

    Shape: (N, \\*), kept.

    References
    ----------
    Huang et al., "Deep networks with stochastic depth", ECCV 2016, arXiv:1603.09382.

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> block = nn.Residual(nn.Sequential(nn.Linear(4, 4), nn.DropPath(1.0)))
    >>> x = np.ones((2, 4), np.float32)
    >>> bool((block.forward(x)[0] == x).all())
    True
    """

    def _checked(self, x: npt.ArrayLike) -> Array:
        x = super()._checked(x)
        _dropout.sample_mask_shape(self.label, x.shape)
        return x

    def _mask_shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _dropout.sample_mask_shape(self.label, shape)
