"""DropBlock: dropout of blocks of neighbouring pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnext import _core
from bnext._core import Generator, dropout_mask
from bnext._pieces import each_piece, factor, gradient, integer, probability, sizes

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class DropBlock2dSaved:
    """What `drop_block2d_backward` needs: how the mask was drawn, not the mask."""

    p: float
    block_size: int
    seed: int
    offset: int
    shape: Shape
    mask_shape: Shape


def drop_block2d_mask(
    seed: int, offset: int, shape: Shape, p: float, block_size: int = 7
) -> npt.NDArray[np.bool_]:
    """The mask of `drop_block2d_forward`: True where an element is kept.

    Parameters
    ----------
    seed, offset : int
        As `DropBlock2dSaved` has them.
    shape : (N, C, H, W)
        Of x.
    p : float
        In [0, 1].
    block_size : int, default 7

    Returns
    -------
    kept : ndarray of bool (N, C, H, W)

    Examples
    --------
    >>> from bnext import functional as F
    >>> kept = F.drop_block2d_mask(1, 0, (1, 1, 6, 12), 0.25, block_size=3)
    >>> for row in kept[0, 0]:
    ...     print("".join("01"[int(k)] for k in row))
    111111110001
    110000010001
    110000000001
    110000000011
    111111100011
    111111111111
    """
    operation = "drop_block2d_mask"
    n, c, height, width = shape = _images(operation, "shape", sizes(operation, "shape", shape))
    p = probability(operation, p)
    block = min(integer(operation, "block_size", block_size, 1), height, width)
    kept = np.ones((n * c, height, width), np.bool_)
    if kept.size == 0:
        return kept.reshape(shape)
    # Blocks begin where they lie within the image.
    rows, columns = height - block + 1, width - block + 1
    rate = min(1.0, p * height * width / (block**2 * rows * columns)) if p < 1 else 1.0

    def task(planes: slice) -> None:
        count = planes.stop - planes.start
        begin = ~dropout_mask(
            seed, offset, (count, rows, columns), rate, first=planes.start * rows * columns
        )
        across = np.zeros((count, rows, width), np.bool_)
        for j in range(block):
            across[:, :, j : j + columns] |= begin
        dropped = np.zeros((count, height, width), np.bool_)
        for i in range(block):
            dropped[:, i : i + rows] |= across
        np.logical_not(dropped, out=kept[planes])

    each_piece(task, n * c, height * width)
    return kept.reshape(shape)


def drop_block2d_forward(
    x: npt.ArrayLike,
    p: float = 0.1,
    block_size: int = 7,
    *,
    mask_shape: Shape | None = None,
    generator: Generator | None = None,
    out: Array | None = None,
) -> tuple[Array, DropBlock2dSaved]:
    """Zero square blocks of each channel, scale what is left by elements / elements kept.

    With b = min(block_size, H, W), a block begins at each place where it lies within the image
    with probability p H W / (b^2 (H - b + 1) (W - b + 1)). Blocks overlap, so that somewhat less
    than `p` is dropped.

    Parameters
    ----------
    x : array_like, (N, C, H, W)
        float32, float64, float16 or bfloat16.
    p : float, default 0.1
        In [0, 1]: 0 copies and draws nothing, 1 gives zeros.
    block_size : int, default 7
    mask_shape : (N, C, H, W) or (1, C, H, W), optional
        The latter drops the same elements of all samples.
    generator : Generator, optional
        Where to draw from; `bnext.random.default_generator` if not given.
    out : ndarray, optional
        Where to write; may be `x` itself.

    Returns
    -------
    y : ndarray, like x
    saved : DropBlock2dSaved
        For `drop_block2d_backward`; `drop_block2d_mask` shows the mask.

    Raises
    ------
    ValueError
        For shapes and values. Nothing has been written or drawn then.
    TypeError
        For other dtypes and kinds of arguments.

    References
    ----------
    Ghiasi et al., "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    arXiv:1810.12890, eq. 1; the same as `torchvision.ops.drop_block2d`.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> from bnext import functional as F
    >>> x = np.ones((8, 4, 16, 16), np.float32)
    >>> y, saved = F.drop_block2d_forward(x, 0.2, 5, generator=bnext.Generator(0))
    >>> bool(0.7 < (y > 0).mean() < 0.9), round(float(y.mean()), 3)
    (True, 1.0)
    """
    operation = "drop_block2d_forward"
    p = probability(operation, p)
    block_size = integer(operation, "block_size", block_size, 1)
    array, y = _core.prepare(operation, "x", x, out)
    shape = _images(operation, "x", array.shape)
    mask_shape = shape if mask_shape is None else sizes(operation, "mask_shape", mask_shape)
    if mask_shape not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"{operation}: mask_shape: expected {shape} or {(1, *shape[1:])}, got {mask_shape}"
        )
    seed, offset = _core.draw(operation, generator, p > 0)
    saved = DropBlock2dSaved(p, block_size, seed, offset, shape, mask_shape)
    _drop_blocks(array, saved, y)
    return y, saved


def drop_block2d_backward(
    grad_y: npt.ArrayLike, saved: DropBlock2dSaved, *, out: Array | None = None
) -> Array:
    """Gradient of `drop_block2d_forward`: grad_y scaled where x was kept, 0 elsewhere.

    Parameters
    ----------
    grad_y : array_like, like x
    saved : DropBlock2dSaved
        From forward.
    out : ndarray, optional
        Where to write; may be `grad_y` itself.

    Returns
    -------
    grad_x : ndarray, like grad_y

    Raises
    ------
    ValueError, TypeError
        As `drop_block2d_forward`.
    """
    array, grad_x = gradient("drop_block2d_backward", grad_y, saved, DropBlock2dSaved, out)
    _drop_blocks(array, saved, grad_x)
    return grad_x


def _drop_blocks(x: Array, saved: DropBlock2dSaved, y: Array) -> None:
    if saved.p == 0 or x.size == 0:
        np.copyto(y, x)
        return
    kept = drop_block2d_mask(
        saved.seed, saved.offset, saved.mask_shape, saved.p, saved.block_size
    ).reshape(-1, *x.shape[2:])
    count = np.count_nonzero(kept)
    scale = factor(kept.size / count if count else 0.0, x.dtype)
    from_planes, to_planes = x.reshape(-1, *x.shape[2:]), y.reshape(-1, *x.shape[2:])

    def task(planes: slice) -> None:
        part = to_planes[planes]
        np.multiply(from_planes[planes], scale, out=part, casting="unsafe")
        mask = np.take(kept, range(planes.start, planes.stop), axis=0, mode="wrap")
        part[~mask] = 0

    each_piece(task, len(from_planes), from_planes[0].size)


def _images(operation: str, argument: str, shape: Shape) -> tuple[int, int, int, int]:
    if len(shape) != 4:
        raise ValueError(f"{operation}: {argument}: expected (N, C, H, W), got shape {shape}")
    return shape
