"""Losses: each returns its value and a closure that gives the gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bnext.nn.module import Array

__all__ = ["softmax_cross_entropy"]


def softmax_cross_entropy(
    logits: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[float, Callable[[], Array]]:
    r"""Mean cross-entropy of softmax(logits) against integer labels.

    .. math:: L = \frac1N \sum_n \Bigl(\log \sum_k e^{z_{nk}} - z_{n,y_n}\Bigr)

    Computed in float64 from logits shifted by their row's maximum, so that logits of
    any size neither overflow nor lose the small losses.

    Parameters
    ----------
    logits : array of shape (N, K), floating point
    labels : array of shape (N,), integers in [0, K)

    Returns
    -------
    loss : float
        Not finite if a logit is NaN or +inf, or the logit of a label is -inf.
    backward : callable
        ``backward() -> grad_logits``, shape (N, K), dtype of `logits`:
        (softmax(z) - one_hot(y)) / N.

    Raises
    ------
    ValueError
        If a shape does not fit, the batch is empty or a label is out of range.
    TypeError
        If `logits` is not floating point or `labels` not an integer array.

    Examples
    --------
    >>> loss, backward = softmax_cross_entropy(np.zeros((1, 4), np.float32), [2])
    >>> round(loss, 4)
    1.3863
    >>> backward()
    array([[ 0.25,  0.25, -0.75,  0.25]], dtype=float32)
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    where = "softmax_cross_entropy"
    if not np.issubdtype(logits.dtype, np.floating):
        raise TypeError(f"{where}: logits: expected floating point, got {logits.dtype}")
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(
            f"{where}: logits: expected a non-empty batch of shape (N, K), got {logits.shape}"
        )
    n, classes = logits.shape
    if labels.shape != (n,):
        raise ValueError(f"{where}: labels: expected shape ({n},), got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{where}: labels: expected integers, got {labels.dtype}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{where}: labels: expected values from 0 to {classes - 1}, "
            f"got {labels.min()} to {labels.max()}"
        )

    rows = np.arange(n)
    # A logit that is not finite gives a loss that is not: no warning needed on top.
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(axis=1, keepdims=True)
        loss = float(np.mean(np.log(sums[:, 0]) - shifted[rows, labels]))

    def backward() -> Array:
        with np.errstate(invalid="ignore"):
            grad: Array = exponentials / sums
        grad[rows, labels] -= 1
        grad /= n
        return grad.astype(logits.dtype)

    return loss, backward
