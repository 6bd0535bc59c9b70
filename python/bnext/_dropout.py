"""Dropout of whole channels and whole samples: that of elements with a mask that is broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bnext import _pieces
from bnext._core import (
    DropoutSaved,
    Generator,
    alpha_dropout_forward,
    dropout_backward,
    dropout_forward,
    dropout_mask,
)

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


def channel_mask_shape(operation: str, shape: Shape, channel_axis: int = 1) -> Shape:
    """Shape of a mask with one element for each channel of each sample."""
    axis = _pieces.channel_axis(operation, channel_axis)
    if len(shape) < 2:
        raise ValueError(
            f"{operation}: x: expected 2 or more dimensions, (N, C, *) or (N, *, C), "
            f"got shape {shape}"
        )
    mask_shape = [1] * len(shape)
    mask_shape[0], mask_shape[axis] = shape[0], shape[axis]
    return tuple(mask_shape)


def sample_mask_shape(operation: str, shape: Shape) -> Shape:
    """Shape of a mask with one element for each sample."""
    if not shape:
        raise ValueError(f"{operation}: x: expected 1 or more dimensions, (N, *), got shape ()")
    return (shape[0], *[1] * (len(shape) - 1))


def channel_dropout_forward(
    x: npt.ArrayLike,
    p: float = 0.5,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
    out: Array | None = None,
) -> tuple[Array, DropoutSaved]:
    """Zero each channel of each sample with probability `p`, scale the others by 1 / (1 - p).

    Parameters
    ----------
    x : array_like, (N, C, *) or, with channel_axis -1, (N, *, C)
        float32, float64, float16 or bfloat16.
    p, generator, out
        As `dropout_forward`.
    channel_axis : 1 or -1, default 1

    Returns
    -------
    y : ndarray, like x
    saved : DropoutSaved
        For `channel_dropout_backward`; `channel_dropout_mask` shows the mask.

    Raises
    ------
    ValueError, TypeError
        As `dropout_forward`.

    References
    ----------
    Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> from bnext import functional as F
    >>> x = np.ones((2, 5, 4, 4), np.float32)
    >>> y, saved = F.channel_dropout_forward(x, 0.5, generator=bnext.Generator(0))
    >>> bool((y == y[:, :, :1, :1]).all())
    True
    """
    mask_shape = channel_mask_shape("channel_dropout_forward", np.shape(x), channel_axis)
    return dropout_forward(x, p, mask_shape=mask_shape, generator=generator, out=out)


def drop_path_forward(
    x: npt.ArrayLike,
    p: float = 0.5,
    *,
    generator: Generator | None = None,
    out: Array | None = None,
) -> tuple[Array, DropoutSaved]:
    """Zero each sample with probability `p`, scale the others by 1 / (1 - p).

    Parameters
    ----------
    x : array_like, (N, *)
        float32, float64, float16 or bfloat16.
    p, generator, out
        As `dropout_forward`.

    Returns
    -------
    y : ndarray, like x
    saved : DropoutSaved
        For `drop_path_backward`; `drop_path_mask` shows the mask.

    Raises
    ------
    ValueError, TypeError
        As `dropout_forward`.

    References
    ----------
    Huang et al., "Deep networks with stochastic depth", ECCV 2016, arXiv:1603.09382.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> from bnext import functional as F
    >>> y, saved = F.drop_path_forward(np.ones((6, 2)), 0.5, generator=bnext.Generator(0))
    >>> F.drop_path_mask(saved.seed, saved.offset, (6, 2), 0.5).shape
    (6, 1)
    """
    mask_shape = sample_mask_shape("drop_path_forward", np.shape(x))
    return dropout_forward(x, p, mask_shape=mask_shape, generator=generator, out=out)


def feature_alpha_dropout_forward(
    x: npt.ArrayLike,
    p: float = 0.5,
    *,
    channel_axis: int = 1,
    generator: Generator | None = None,
    out: Array | None = None,
) -> tuple[Array, DropoutSaved]:
    """`alpha_dropout_forward` of whole channels of each sample.

    Parameters
    ----------
    x : array_like, (N, C, *) or, with channel_axis -1, (N, *, C)
        float32, float64, float16 or bfloat16.
    p, generator, out
        As `alpha_dropout_forward`.
    channel_axis : 1 or -1, default 1

    Returns
    -------
    y : ndarray, like x
    saved : DropoutSaved
        For `feature_alpha_dropout_backward`; `channel_dropout_mask` shows the mask.

    Raises
    ------
    ValueError, TypeError
        As `dropout_forward`.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> from bnext import functional as F
    >>> x = np.zeros((1, 6, 2), np.float32)
    >>> y, _ = F.feature_alpha_dropout_forward(x, 0.5, generator=bnext.Generator(1))
    >>> bool((y[..., 0] == y[..., 1]).all()), len(np.unique(y))
    (True, 2)
    """
    mask_shape = channel_mask_shape("feature_alpha_dropout_forward", np.shape(x), channel_axis)
    return alpha_dropout_forward(x, p, mask_shape=mask_shape, generator=generator, out=out)


# What they save says which factors and whose mask: one function serves them all.
alpha_dropout_backward = dropout_backward
channel_dropout_backward = dropout_backward
drop_path_backward = dropout_backward
feature_alpha_dropout_backward = dropout_backward


def channel_dropout_mask(
    seed: int, offset: int, shape: Shape, p: float, *, channel_axis: int = 1
) -> npt.NDArray[np.bool_]:
    """The mask of channels, True where kept, that is broadcast to an x of `shape`.

    It is ``dropout_mask(seed, offset, (N, C), p)`` with axes of extent 1 for the others.

    Examples
    --------
    >>> from bnext import functional as F
    >>> F.channel_dropout_mask(0, 0, (2, 3, 8, 8), 0.5).shape
    (2, 3, 1, 1)
    """
    operation = "channel_dropout_mask"
    shape = _pieces.sizes(operation, "shape", shape)
    mask_shape = channel_mask_shape(operation, shape, channel_axis)
    return dropout_mask(seed, offset, mask_shape, p)


def drop_path_mask(seed: int, offset: int, shape: Shape, p: float) -> npt.NDArray[np.bool_]:
    """The mask of samples, True where kept, that is broadcast to an x of `shape`.

    It is ``dropout_mask(seed, offset, (N,), p)`` with axes of extent 1 for the others.

    Examples
    --------
    >>> from bnext import functional as F
    >>> F.drop_path_mask(0, 0, (2, 3, 8, 8), 0.5).shape
    (2, 1, 1, 1)
    """
    operation = "drop_path_mask"
    shape = _pieces.sizes(operation, "shape", shape)
    return dropout_mask(seed, offset, sample_mask_shape(operation, shape), p)
