"""Losses: each returns its value and a closure that gives the gradient.

The closure takes the gradient of what the loss is part of, 1 by default: ``backward(0.5)`` is the
gradient of half the loss. With ``reduction="none"`` that is one value for each loss.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Literal, Protocol, overload

import numpy as np
import numpy.typing as npt

from bnext._dtypes import DATA
from bnext.nn import _check
from bnext.nn.module import Array, Backward, Module, Parameter, number

__all__ = [
    "UncertaintyWeighting",
    "sigmoid_focal_loss",
    "softmax_cross_entropy",
    "softmax_focal_loss",
]

# The factor c of uncertainty weighting.
_FACTORS = {"regression": 0.5, "classification": 1.0}


class LossBackward(Protocol):
    """``backward(grad_loss=1.0) -> grad_logits``."""

    def __call__(self, grad_loss: npt.ArrayLike = 1.0) -> Array: ...


@overload
def softmax_cross_entropy(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[float, LossBackward]: ...


@overload
def softmax_cross_entropy(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: Literal["none"],
) -> tuple[Array, LossBackward]: ...


def softmax_cross_entropy(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[float | Array, LossBackward]:
    r"""Cross-entropy of softmax(logits) against integer labels, `torch.nn.functional`'s formula.

    .. math::
        l_n &= (1 - s)\, w_{y_n} c_{n y_n} + \frac{s}{K} \sum_k w_k c_{nk}, \qquad
        c_{nk} = \log \sum_j e^{z_{nj}} - z_{nk} \\
        L &= \sum_n l_n \Big/ \sum_n w_{y_n} \quad\text{(mean)}

    with the class weights w (ones by default) and the label smoothing s (Szegedy et al.,
    arXiv:1512.00567, section 7). By default, L is the mean of :math:`c_{n y_n}`.

    Computed in float64 from logits shifted by their row's maximum, so that logits of
    any size neither overflow nor lose the small losses.

    Parameters
    ----------
    logits : array of shape (N, K), floating point
    labels : array of shape (N,), integers in [0, K)
    weight : array of shape (K,), optional
        Weight of each class, >= 0.
    label_smoothing : float, default 0
        In [0, 1]: share of the target that is spread evenly over all classes.
    ignore_index : int, optional
        Samples with this label count for nothing and have gradient 0. It need not be in [0, K).
    reduction : {"mean", "sum", "none"}, default "mean"
        The mean divides by the sum of the samples' class weights. If that is 0, because all
        samples are ignored or have weight 0, the loss is 0 and so is its gradient.

    Returns
    -------
    loss : float, or array of shape (N,) if `reduction` is "none"
        Not finite if a logit is NaN or +inf, or the logit of a label is -inf.
    backward : callable
        ``backward(grad_loss=1.0) -> grad_logits``, shape (N, K), dtype of `logits`; by default:
        (softmax(z) - one_hot(y)) / N. With reduction "none", `grad_loss` may have shape (N,).

    Raises
    ------
    ValueError
        If a shape does not fit, the batch is empty or a label or an option is out of range.
    TypeError
        If `logits` is not floating point or `labels` not an integer array.

    Examples
    --------
    >>> loss, backward = softmax_cross_entropy(np.zeros((1, 4), np.float32), [2])
    >>> round(loss, 4)
    1.3863
    >>> backward()
    array([[ 0.25,  0.25, -0.75,  0.25]], dtype=float32)
    >>> softmax_cross_entropy(np.zeros((2, 2)), [0, 1], weight=[1, 3], reduction="none")[0]
    array([0.69314718, 2.07944154])
    """
    where = "softmax_cross_entropy"
    batch = _Classes(where, logits, labels, ignore_index)
    classes = batch.classes
    weights = np.ones(classes) if weight is None else _weights(where, "weight", weight, classes)
    smoothing = number(where, "label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(
            f"{where}: label_smoothing: expected a number in [0, 1], got {label_smoothing!r}"
        )
    _check_reduction(where, reduction, ("mean", "sum", "none"))

    rows, labels = batch.rows, batch.labels
    mine, spread = (1 - smoothing) * weights[labels], smoothing / classes * weights
    # A logit that is not finite gives a loss that is not: no warning needed on top.
    with np.errstate(invalid="ignore", over="ignore"):
        shifted, log_sums = batch.shifted, batch.log_sums
        losses = mine * (log_sums - shifted[rows, labels])
        if smoothing:
            losses += (log_sums[:, np.newaxis] - shifted) @ spread
    count = weights[labels].sum() if reduction == "mean" else 1.0
    loss = _reduced(batch.scattered(losses), count, reduction)

    def backward(grad_loss: npt.ArrayLike = 1.0) -> Array:
        scale = _scale(where, grad_loss, batch.shape[:1], reduction)
        p, miss, grad = batch.split()
        if weight is not None or smoothing:
            grad *= (mine + spread.sum())[:, np.newaxis]
        grad[rows, labels] = -mine * miss
        if smoothing:
            grad[rows, labels] += p * spread.sum()
            grad -= spread
        return batch.gradient(grad, scale, count)

    return loss, backward


@overload
def softmax_focal_loss(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: npt.ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[float, LossBackward]: ...


@overload
def softmax_focal_loss(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: npt.ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: Literal["none"],
) -> tuple[Array, LossBackward]: ...


def softmax_focal_loss(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: npt.ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[float | Array, LossBackward]:
    r"""Focal loss of softmax(logits) against integer labels: easy samples weigh less.

    .. math::
        l_n &= -\alpha_{y_n} (1 - p_n)^\gamma \log p_n, \qquad p_n = \text{softmax}(z_n)_{y_n} \\
        \frac{\partial l_n}{\partial z_{nj}} &= \alpha_{y_n} \bigl(\gamma (1 - p_n)^{\gamma - 1}
        p_n \log p_n - (1 - p_n)^\gamma\bigr)
        (\delta_{j y_n} - \text{softmax}(z_n)_j)

    With ``gamma=0`` and no `alpha` this is `softmax_cross_entropy`. Computed in float64, and
    :math:`1 - p` as a sum of the other classes: logits of any size give their loss and gradient.

    Parameters
    ----------
    logits : array of shape (N, K), floating point
    labels : array of shape (N,), integers in [0, K)
    gamma : float, default 2
        >= 0.
    alpha : float or array of shape (K,), optional
        Factor >= 0 of each sample, or of the samples of each class. Unlike the weight of a
        weighted cross-entropy it does not enter the denominator of the mean.
    ignore_index : int, optional
        Samples with this label count for nothing and have gradient 0. It need not be in [0, K).
    reduction : {"mean", "sum", "none"}, default "mean"
        The mean is over the samples that are not ignored; 0 if there are none.

    Returns
    -------
    loss : float, or array of shape (N,) if `reduction` is "none"
        Not finite if a logit is NaN or +inf, or the logit of a label is -inf.
    backward : callable
        ``backward(grad_loss=1.0) -> grad_logits``, shape (N, K), dtype of `logits`.

    Raises
    ------
    ValueError
        If a shape does not fit, the batch is empty or a label or an option is out of range.
    TypeError
        If `logits` is not floating point or `labels` not an integer array.

    References
    ----------
    Lin et al., "Focal loss for dense object detection", arXiv:1708.02002, equation 5 and
    appendix A; the softmax form replaces the sigmoid's p by the softmax's.

    Examples
    --------
    >>> loss, backward = softmax_focal_loss([[2.0, 0.0], [0.0, 2.0]], [0, 0])
    >>> round(loss, 4)
    0.8259
    >>> softmax_focal_loss([[2.0, 0.0], [0.0, 2.0]], [0, 0], reduction="none")[0].round(4)
    array([0.0018, 1.6501])
    """
    where = "softmax_focal_loss"
    batch = _Classes(where, logits, labels, ignore_index)
    gamma = _at_least_0(where, "gamma", gamma)
    alphas = np.ones(batch.classes)
    if alpha is not None:
        alphas = _weights(where, "alpha", alpha, batch.classes, scalar=True)
    _check_reduction(where, reduction, ("mean", "sum", "none"))

    rows, labels = batch.rows, batch.labels
    p, miss, others = batch.split()
    with np.errstate(invalid="ignore"):
        log_p = batch.shifted[rows, labels] - batch.log_sums
    focal = _Focal(log_p, p, miss, gamma)
    count = float(len(rows)) if reduction == "mean" else 1.0
    loss = _reduced(batch.scattered(alphas[labels] * focal.loss), count, reduction)

    def backward(grad_loss: npt.ArrayLike = 1.0) -> Array:
        scale = _scale(where, grad_loss, batch.shape[:1], reduction)
        slope = alphas[labels] * focal.slope
        grad: Array = others * -slope[:, np.newaxis]
        grad[rows, labels] = slope * miss
        return batch.gradient(grad, scale, count)

    return loss, backward


@overload
def sigmoid_focal_loss(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: npt.ArrayLike | None = 0.25,
    reduction: Literal["mean", "positives", "sum"] = "mean",
) -> tuple[float, LossBackward]: ...


@overload
def sigmoid_focal_loss(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: npt.ArrayLike | None = 0.25,
    reduction: Literal["none"],
) -> tuple[Array, LossBackward]: ...


def sigmoid_focal_loss(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: npt.ArrayLike | None = 0.25,
    reduction: str = "mean",
) -> tuple[float | Array, LossBackward]:
    r"""Focal loss of sigmoid(logits) against targets 0 or 1, `torchvision.ops`' formula.

    .. math::
        l = -\alpha_t (1 - p_t)^\gamma \log p_t, \qquad
        \frac{\partial l}{\partial z} =
        \alpha_t\, s\, (1 - p_t)^\gamma (\gamma\, p_t \log p_t + p_t - 1)

    with s = 1 and :math:`\alpha_t = \alpha` for positive targets, s = -1 and
    :math:`\alpha_t = 1 - \alpha` for negative ones, and :math:`p_t = \text{sigmoid}(s z)`. With
    ``gamma=0, alpha=None`` this is the binary cross-entropy. Computed in float64 without a
    difference that cancels: logits of any size give their loss and gradient.

    Parameters
    ----------
    logits : array of any shape but empty ones, floating point
    targets : array of the same shape, each 0 or 1
    gamma : float, default 2
        >= 0.
    alpha : float or array of shape (K,) for logits (\*, K), or None; default 0.25
        In [0, 1]. None: no weighting.
    reduction : {"mean", "positives", "sum", "none"}, default "mean"
        "positives" divides the sum by the number of positive targets, as detectors do, or by 1 if
        there are none.

    Returns
    -------
    loss : float, or array of the shape of `logits` if `reduction` is "none"
        Not finite if a logit is NaN, or infinite on the wrong side.
    backward : callable
        ``backward(grad_loss=1.0) -> grad_logits``, shape and dtype of `logits`.

    Raises
    ------
    ValueError
        If a shape does not fit, the input is empty, or a target or an option is out of range.
    TypeError
        If `logits` is not floating point or `targets` are not numbers.

    References
    ----------
    Lin et al., "Focal loss for dense object detection", arXiv:1708.02002, equation 5.

    Examples
    --------
    >>> loss, backward = sigmoid_focal_loss([2.0, -2.0, 0.0], [1, 0, 1], reduction="positives")
    >>> round(loss, 4)
    0.0226
    """
    where = "sigmoid_focal_loss"
    logits, targets = _floating(where, logits), np.asarray(targets)
    if not logits.size:
        raise ValueError(f"{where}: logits: expected one value or more, got shape {logits.shape}")
    if targets.shape != logits.shape:
        raise ValueError(f"{where}: targets: expected shape {logits.shape}, got {targets.shape}")
    if targets.dtype.kind not in "biuf":
        raise TypeError(f"{where}: targets: expected numbers, got {targets.dtype}")
    positive = targets == 1
    if not (positive | (targets == 0)).all():
        wrong = targets[~(positive | (targets == 0))]
        raise ValueError(f"{where}: targets: expected 0 or 1 each, got {wrong[0]}")
    gamma = _at_least_0(where, "gamma", gamma)
    alpha_t = np.ones(())
    if alpha is not None:
        classes = logits.shape[-1] if logits.ndim else 1
        alphas = _weights(where, "alpha", alpha, classes, scalar=True, most=1)
        alpha_t = np.where(positive, alphas, 1 - alphas).reshape(logits.shape)
    _check_reduction(where, reduction, ("mean", "positives", "sum", "none"))

    sign = np.where(positive, 1.0, -1.0)
    u = sign * logits.astype(np.float64)
    tail = np.exp(-np.abs(u))
    large, small = 1 / (1 + tail), tail / (1 + tail)
    p, miss = np.where(u > 0, large, small), np.where(u > 0, small, large)
    focal = _Focal(np.minimum(u, 0) - np.log1p(tail), p, miss, gamma)
    counts = {"mean": logits.size, "positives": max(int(positive.sum()), 1)}
    count = float(counts.get(reduction, 1))
    loss = _reduced(alpha_t * focal.loss, count, reduction)

    def backward(grad_loss: npt.ArrayLike = 1.0) -> Array:
        scale = _scale(where, grad_loss, logits.shape, reduction)
        grad = alpha_t * sign * focal.slope * miss * (scale / count)
        return np.asarray(grad, logits.dtype)

    return loss, backward


class _Focal:
    """(1 - p)^gamma log p, given log p, p and 1 - p, each to full precision.

    Attributes
    ----------
    loss : -(1 - p)^gamma log p
    slope : the derivative of `loss` by the log-odds of p, divided by 1 - p
    """

    def __init__(self, log_p: Array, p: Array, miss: Array, gamma: float) -> None:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            modulation = miss**gamma
            self.loss = modulation * -log_p
            # 0 times infinity, where p = 0, has the limit 0.
            p_log_p = np.where(p == 0, 0.0, p * log_p)
            # log p / (1 - p) tends to -1 as p tends to 1: the power gamma - 1 never appears.
            ratio = np.where(miss == 0, -1.0, p_log_p / np.where(miss == 0, 1.0, miss))
            self.slope = modulation * (gamma * ratio - 1)


class UncertaintyWeighting(Module):
    r"""Sum of the losses of several tasks, each with a weight that is learned.

    .. math::
        L = \sum_t c_t\, e^{-s_t} L_t + \tfrac12 s_t, \qquad
        \frac{\partial L}{\partial s_t} = \tfrac12 - c_t\, e^{-s_t} L_t, \qquad
        \frac{\partial L}{\partial L_t} = c_t\, e^{-s_t}

    :math:`s_t = \log \sigma_t^2` is the noise of task t, a parameter to give to the optimizer
    together with the model's. At the optimum :math:`e^{s_t} = 2 c_t L_t`: a task's weight follows
    the size of its loss, so that the units in which a loss is measured do not matter.

    Parameters
    ----------
    tasks : sequence of "regression", "classification" or numbers
        The factor c of each: 1/2 for regression with a squared error, 1 for classification with
        a cross-entropy, or a number > 0.
    dtype : float32 or float64

    Attributes
    ----------
    log_variances : Parameter (T,)
        The s, zeros at first; without weight decay.

    Notes
    -----
    ``total, backward = weighting.forward(losses)`` takes one loss for each task, shape (T,).
    ``backward()`` adds into ``log_variances.grad`` and returns the gradients of the losses, shape
    (T,), each to be given to the backward of its loss.

    Raises
    ------
    ValueError
        If there are no tasks, one is unknown, or the losses have another shape.

    References
    ----------
    Kendall, Gal & Cipolla, "Multi-task learning using uncertainty to weigh losses",
    arXiv:1705.07115, equations 7 to 10.

    Examples
    --------
    >>> weighting = UncertaintyWeighting(["classification", "regression"])
    >>> total, backward = weighting.forward([0.7, 100.0])
    >>> float(total)
    50.7
    >>> backward()  # the factors to be given to the backward of each loss
    array([1. , 0.5])
    >>> weighting.log_variances.grad
    array([ -0.2, -49.5], dtype=float32)
    """

    def __init__(self, tasks: Sequence[str | float], *, dtype: npt.DTypeLike = np.float32) -> None:
        super().__init__()
        kind = type(self).__name__
        if not hasattr(tasks, "__len__"):
            raise TypeError(f"{kind}: tasks: expected one for each loss, got {tasks!r}")
        if isinstance(tasks, str) or not len(tasks):
            raise ValueError(f"{kind}: tasks: expected one for each loss, got {tasks!r}")
        factors = []
        for task in tasks:
            if isinstance(task, str) and task not in _FACTORS:
                known = ", ".join(_FACTORS)
                raise ValueError(f"{kind}: tasks: expected a number or {known}, got {task!r}")
            factor = _FACTORS[task] if isinstance(task, str) else number(kind, "tasks", task)
            if not 0 < factor < np.inf:
                raise ValueError(f"{kind}: tasks: expected finite numbers > 0, got {task!r}")
            factors.append(factor)
        dtype = _check.weight_dtype(kind, dtype)
        self.factors = np.array(factors)
        self.log_variances = Parameter(np.zeros(len(factors), dtype), decay=False)

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        losses = _numbers(self.label, "losses", x)
        if losses.shape != self.factors.shape:
            raise ValueError(
                f"{self.label}: losses: expected shape {self.factors.shape}, got {losses.shape}"
            )
        s = self.log_variances.data.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            weights = self.factors * np.exp(-s)
            weighted = weights * losses
        total = np.asarray(np.sum(weighted + s / 2))

        def backward(grad_loss: npt.ArrayLike = 1.0) -> Array:
            scale = _scale(self.label, grad_loss, (), "sum")
            self.log_variances.accumulate(scale * (0.5 - weighted))
            grad: Array = scale * weights
            return grad

        return total, backward

    def __call__(self, x: npt.ArrayLike) -> Array:
        return self.forward(x)[0]

    def extra_repr(self) -> str:
        return ", ".join(f"{factor:g}" for factor in self.factors)


# -- what losses share -----------------------------------------------------------------
class _Classes:
    """Logits (N, K) and labels (N,), checked; the softmax of the rows that count, in float64."""

    def __init__(
        self,
        where: str,
        logits: npt.ArrayLike,
        labels: npt.ArrayLike,
        ignore_index: int | None,
    ) -> None:
        logits, labels = _floating(where, logits), np.asarray(labels)
        if logits.ndim != 2 or 0 in logits.shape:
            raise ValueError(
                f"{where}: logits: expected a non-empty batch of shape (N, K), got {logits.shape}"
            )
        n, classes = logits.shape
        if labels.shape != (n,):
            raise ValueError(f"{where}: labels: expected shape ({n},), got {labels.shape}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"{where}: labels: expected integers, got {labels.dtype}")
        self.dtype, self.shape = logits.dtype, logits.shape
        self._counted: Array | None = None
        if ignore_index is not None:
            if not isinstance(ignore_index, numbers.Integral):
                raise TypeError(f"{where}: ignore_index: expected an integer, got {ignore_index!r}")
            # What an ignored row holds, NaN for example, must not reach the others.
            self._counted = labels != ignore_index
            logits, labels = logits[self._counted], labels[self._counted]
        if labels.size and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(
                f"{where}: labels: expected values from 0 to {classes - 1}, "
                f"got {labels.min()} to {labels.max()}"
            )
        self.classes: int = classes
        self.labels = labels
        self.rows = np.arange(len(labels))
        with np.errstate(invalid="ignore", over="ignore"):
            self.shifted = logits.astype(np.float64)
            self.shifted -= self.shifted.max(axis=1, keepdims=True)
            self.exponentials = np.exp(self.shifted)
            # Where one class has almost all, the others are all that there is of the loss.
            first = self.shifted.argmax(axis=1)
            largest = self.exponentials[self.rows, first]  # 1, or NaN
            _, rest = self._without(first)
            self.sums = largest + rest
            self.log_sums = np.log1p(rest / largest)

    def _without(self, classes: Array) -> tuple[Array, Array]:
        """The exponentials with 0 in place of one class in each row, and their sums."""
        others = self.exponentials.copy()
        others[self.rows, classes] = 0
        return others, others.sum(axis=1)

    def split(self) -> tuple[Array, Array, Array]:
        """p of the labels, 1 - p, and p of the other classes (N, K), each to full precision."""
        with np.errstate(invalid="ignore"):
            p = self.exponentials[self.rows, self.labels] / self.sums
            others, rest = self._without(self.labels)
            others /= self.sums[:, np.newaxis]
            return p, rest / self.sums, others

    def scattered(self, values: Array) -> Array:
        """`values` of the rows that count, with 0 for the others."""
        if self._counted is None:
            return values
        full = np.zeros((self.shape[0], *values.shape[1:]))
        full[self._counted] = values
        return full

    def gradient(self, grad: Array, scale: Array, count: float) -> Array:
        """`grad` of the rows that count, times `scale` over `count`, for all rows."""
        if scale.ndim and self._counted is not None:
            scale = scale[self._counted]
        grad *= scale[..., np.newaxis]
        if count:
            grad /= count
        else:
            grad[...] = 0
        return self.scattered(grad).astype(self.dtype)


def _floating(where: str, logits: npt.ArrayLike) -> Array:
    array = _check.native(where, "logits", logits)
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name in DATA):
        raise TypeError(f"{where}: logits: expected floating point, got {array.dtype}")
    return array


def _numbers(where: str, name: str, values: npt.ArrayLike) -> Array:
    """`values` in float64."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{where}: {name}: expected numbers, got {array.dtype}")
    return array.astype(np.float64)


def _at_least_0(where: str, name: str, value: float) -> float:
    if not 0 <= number(where, name, value) < np.inf:
        raise ValueError(f"{where}: {name}: expected a finite number >= 0, got {value!r}")
    return float(value)


def _weights(
    where: str,
    name: str,
    values: npt.ArrayLike,
    classes: int,
    *,
    scalar: bool = False,
    most: float = np.inf,
) -> Array:
    """One weight in [0, most] for each class; with `scalar`, also one for all of them."""
    array = _numbers(where, name, values)
    if array.ndim == 0 and scalar:
        array = np.full(classes, array)
    if array.shape != (classes,):
        raise ValueError(f"{where}: {name}: expected shape ({classes},), got {array.shape}")
    if not ((array >= 0) & (array <= most) & np.isfinite(array)).all():
        expected = "finite values >= 0" if most == np.inf else f"values in [0, {most:g}]"
        raise ValueError(f"{where}: {name}: expected {expected}, got {values!r}")
    return array


def _check_reduction(where: str, reduction: str, known: tuple[str, ...]) -> None:
    if reduction not in known:
        raise ValueError(
            f"{where}: reduction: expected one of {', '.join(known)}, got {reduction!r}"
        )


def _reduced(losses: Array, count: float, reduction: str) -> float | Array:
    if reduction == "none":
        return np.asarray(losses)
    return float(losses.sum() / count) if count else 0.0


def _scale(where: str, grad_loss: npt.ArrayLike, shape: tuple[int, ...], reduction: str) -> Array:
    """`grad_loss` checked: one number, or with reduction "none" also one for each loss."""
    scale = _numbers(where, "grad_loss", grad_loss)
    if scale.shape != () and (reduction != "none" or scale.shape != shape):
        expected = "a number" if reduction != "none" else f"a number or shape {shape}"
        raise ValueError(f"{where}: grad_loss: expected {expected}, got shape {scale.shape}")
    return scale
