"""Gaussian dropout: multiplicative noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnext import _core
from bnext._core import Generator, gaussian_dropout_noise
from bnext._pieces import each_piece, gradient, probability, sizes

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class GaussianDropoutSaved:
    """What `gaussian_dropout_backward` needs: how the noise was drawn, not the noise."""

    p: float
    seed: int
    offset: int
    shape: Shape
    mask_shape: Shape


def gaussian_dropout_forward(
    x: npt.ArrayLike,
    p: float = 0.5,
    *,
    mask_shape: Shape | None = None,
    generator: Generator | None = None,
    out: Array | None = None,
) -> tuple[Array, GaussianDropoutSaved]:
    """Multiply each element by a random number of its own from N(1, p / (1 - p)).

    The product has the mean and the variance that dropout with `p` gives it.

    Parameters
    ----------
    x : array_like, any shape
        float32, float64, float16 or bfloat16.
    p : float, default 0.5
        In [0, 1): at 1 the variance would be infinite. 0 copies and draws nothing.
    mask_shape : tuple of int, optional
        Shape of noise that is broadcast to x. By default that of x.
    generator : Generator, optional
        Where to draw from; `bnext.random.default_generator` if not given.
    out : ndarray, optional
        Where to write; may be `x` itself.

    Returns
    -------
    y : ndarray, like x
    saved : GaussianDropoutSaved
        For `gaussian_dropout_backward`; `gaussian_dropout_noise` shows the factors.

    Raises
    ------
    ValueError
        For shapes and values. Nothing has been written or drawn then.
    TypeError
        For other dtypes and kinds of arguments.

    Notes
    -----
    The factor of element i in C order follows from (seed, offset), i and `p` alone, and is computed
    in float32 for every dtype: it depends neither on threads nor on the processor.

    References
    ----------
    Srivastava et al., "Dropout", JMLR 15 (2014), section 10.

    Examples
    --------
    >>> import numpy as np, bnext
    >>> from bnext import functional as F
    >>> y, saved = F.gaussian_dropout_forward(np.ones(5), 0.1, generator=bnext.Generator(0))
    >>> noise = F.gaussian_dropout_noise(saved.seed, saved.offset, (5,), saved.p)
    >>> bool((y == noise).all())
    True
    """
    operation = "gaussian_dropout_forward"
    p = _gaussian_probability(operation, p)
    array, y = _core.prepare(operation, "x", x, out)
    if mask_shape is None:
        mask_shape = array.shape
    else:
        mask_shape = sizes(operation, "mask_shape", mask_shape)
    if len(mask_shape) != array.ndim or any(
        m not in (1, s) for m, s in zip(mask_shape, array.shape, strict=True)
    ):
        raise ValueError(
            f"{operation}: mask_shape: expected the extents of x, {array.shape}, or 1, "
            f"got {mask_shape}"
        )
    seed, offset = _core.draw(operation, generator, p > 0)
    saved = GaussianDropoutSaved(p, seed, offset, array.shape, mask_shape)
    _multiply_noise(array, saved, y)
    return y, saved


def gaussian_dropout_backward(
    grad_y: npt.ArrayLike, saved: GaussianDropoutSaved, *, out: Array | None = None
) -> Array:
    """Gradient of `gaussian_dropout_forward`: grad_y times the same random numbers.

    Parameters
    ----------
    grad_y : array_like, like x
    saved : GaussianDropoutSaved
        From forward.
    out : ndarray, optional
        Where to write; may be `grad_y` itself.

    Returns
    -------
    grad_x : ndarray, like grad_y

    Raises
    ------
    ValueError, TypeError
        As `gaussian_dropout_forward`.
    """
    array, grad_x = gradient("gaussian_dropout_backward", grad_y, saved, GaussianDropoutSaved, out)
    _multiply_noise(array, saved, grad_x)
    return grad_x


def _multiply_noise(x: Array, saved: GaussianDropoutSaved, y: Array) -> None:
    if saved.p == 0 or x.size == 0:
        np.copyto(y, x)
        return
    if saved.mask_shape != x.shape:
        noise = gaussian_dropout_noise(saved.seed, saved.offset, saved.mask_shape, saved.p)
        with np.errstate(all="ignore"):  # arithmetic goes where IEEE sends it
            np.multiply(x, noise, out=y, casting="unsafe")
        return
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)

    def task(part: slice) -> None:
        noise = gaussian_dropout_noise(
            saved.seed, saved.offset, (part.stop - part.start,), saved.p, first=part.start
        )
        np.multiply(flat_x[part], noise, out=flat_y[part], casting="unsafe")

    each_piece(task, flat_x.size, 1)


def _gaussian_probability(operation: str, p: float) -> float:
    p = probability(operation, p)
    if p == 1:
        raise ValueError(f"{operation}: p: expected a probability in [0, 1), got 1")
    return p
