"""What is measured on data: the inputs of each BatchNorm in several passes, and losses.

Notation: x is the input of a BatchNorm, (N, C, S), S positions of each image; mean and variance of
a channel are those of all samples, not of one batch. Images count as independent, positions of one
image do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bnext.diagnosis._network import Network, Norm
from bnext.diagnosis.rules import NEAR_ZERO, PASSES, STANDARD_ERRORS
from bnext.losses import softmax_cross_entropy
from bnext.nn.module import Array

Loss = Callable[[Any, Any], Any]


class Channels:
    """Moments of one BatchNorm's input, collected batch by batch.

    Values are taken relative to the first batch's mean and in units of its standard deviation, so
    that fourth powers neither cancel nor overflow.
    """

    def __init__(self) -> None:
        self._powers: Array = np.zeros(0)
        self._positive: Array = np.zeros(0)
        self._means: list[Array] = []  # of images, (N, C) for each batch
        self._squares: list[Array] = []
        self.count = 0  # values per channel
        self.finite = True

    def add(self, x: Array, y: Array | None = None) -> None:
        x = np.asarray(x, np.float64)
        if not x.size:
            return
        with np.errstate(all="ignore"):
            if not self.count:
                mean, std = x.mean((0, 2)), x.std((0, 2))
                self._shift = np.where(np.isfinite(mean), mean, 0)
                self._scale = np.where(np.isfinite(std) & (std > 0), std, 1)
                self._powers = np.zeros((5, x.shape[1]))
                self._positive = np.zeros(x.shape[1])
            self.finite = self.finite and bool(np.isfinite(x).all())
            d = (x - self._shift[:, np.newaxis]) / self._scale[:, np.newaxis]
            square = np.square(d)
            for power, values in ((1, d), (2, square), (3, d * square), (4, np.square(square))):
                self._powers[power] += values.sum((0, 2))
            self._means.append(d.mean(2))
            self._squares.append(square.mean(2))
            if y is not None:
                y = np.asarray(y)
                self._positive += np.count_nonzero(y > 0, (0, 2))
                self._positive[np.isnan(y).any((0, 2))] = np.nan
        self.count += x.shape[0] * x.shape[2]
        self._spatial = x.shape[2]

    # -- figures of each channel -------------------------------------------------------
    @property
    def mean(self) -> Array:
        mean: Array = self._shift + self._scale * self._powers[1] / self.count
        return mean

    @property
    def var(self) -> Array:
        return np.square(self._scale) * self._central[0]

    @property
    def _central(self) -> tuple[Array, Array]:
        """Second and fourth central moments, in units of `_scale`."""
        with np.errstate(all="ignore"):
            m = self._powers / self.count
            second = np.maximum(m[2] - m[1] ** 2, 0)
            fourth = m[4] - 4 * m[1] * m[3] + 6 * m[1] ** 2 * m[2] - 3 * m[1] ** 4
        return second, fourth

    @property
    def kurtosis(self) -> Array:
        """Excess, fourth moment / variance^2 - 3."""
        second, fourth = self._central
        with np.errstate(all="ignore"):
            return fourth / np.square(second) - 3

    @property
    def positive(self) -> Array:
        """Share of outputs above 0; NaN where one of them is."""
        return self._positive / self.count

    def rse(self, samples: int) -> Array:
        """Relative standard error of the variance of a batch of `samples` images.

        Var_B is the mean over images of q_n = mean_S (x - mean)^2, so its standard error is
        std(q_n) / sqrt(samples), however the positions of an image depend on each other.
        """
        delta = self._powers[1] / self.count
        means, squares = np.concatenate(self._means), np.concatenate(self._squares)
        with np.errstate(all="ignore"):
            q = squares - 2 * delta * means + delta**2
            error: Array = q.std(0) / q.mean(0) / math.sqrt(samples)
        return error

    @property
    def correlation(self) -> Array:
        """Of two positions of one image: Var(image mean) = var (1 + (S - 1) correlation) / S."""
        means = np.concatenate(self._means)
        if self._spatial < 2:
            return np.full(means.shape[1], np.nan)
        with np.errstate(all="ignore"):
            effect = self._spatial * means.var(0) / self._central[0]
        correlation: Array = (effect - 1) / (self._spatial - 1)
        return correlation

    @property
    def imbalance(self) -> Array:
        """F of an analysis of variance of image means between and within batches; 1 if random."""
        batches = len(self._means)
        images = sum(len(m) for m in self._means)
        total = np.concatenate(self._means).mean(0)
        with np.errstate(all="ignore"):
            between = sum(len(m) * np.square(m.mean(0) - total) for m in self._means)
            within = sum(np.square(m - m.mean(0)).sum(0) for m in self._means)
            ratio: Array = (between / (batches - 1)) / (within / (images - batches))
        return ratio

    @property
    def batches(self) -> int:
        return len(self._means)


class Scores(NamedTuple):
    """Of one pass: the loss of each sample and the share that is right.

    None and NaN: not measured; nothing is right or wrong without integer labels and outputs
    (N, K), K 2 or more.
    """

    losses: Array | None
    accuracy: float

    @property
    def loss(self) -> float:
        return math.nan if self.losses is None else float(self.losses.mean())


def passed(
    network: Network,
    items: list[tuple[Any, Any]],
    mode: str,
    loss: Loss | None = None,
    *,
    collect: bool = True,
    outputs: bool = False,
) -> tuple[dict[str, Channels], Scores]:
    """All batches through the network: moments of inputs if `collect`, scores if there is a `loss`.

    `outputs`: also count those above 0.
    """
    channels: dict[str, Channels] = {}

    def watch(name: str, x: Array, y: Array) -> None:
        channels.setdefault(name, Channels()).add(x, y if outputs else None)

    losses: list[Array] = []
    right: list[Array] = []
    for x, y in items:
        output = network.run(x, mode, watch if collect else None)
        if loss is None:
            continue
        values = np.asarray(network.array(loss(output, network.labels(y))), np.float64)
        if values.shape != (len(x),):
            raise ValueError(
                f"doctor: loss: expected one value for each of {len(x)} samples, "
                f"got shape {values.shape}"
            )
        losses.append(values)
        array = network.array(output)
        if array.ndim == 2 and array.shape[1] > 1 and y.ndim == 1 and y.dtype.kind in "iu":
            right.append(array.argmax(1) == y)
    accuracy = float(np.concatenate(right).mean()) if right else math.nan
    return channels, Scores(np.concatenate(losses) if losses else None, accuracy)


def default_loss(network: Network) -> Loss:
    def cross_entropy(output: Any, y: Any) -> Array:
        labels = network.array(y).astype(np.int64)
        return np.asarray(softmax_cross_entropy(network.array(output), labels, reduction="none")[0])

    return cross_entropy


def significant(a: Array, b: Array) -> bool:
    """Whether the losses `a` are above `b`, sample by sample, by `STANDARD_ERRORS`."""
    difference = a - b
    if len(difference) < 2:
        return False
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return bool(difference.mean() > STANDARD_ERRORS * error)


def gap(norm: Norm, channels: Channels) -> tuple[Array, Array]:
    """(running mean - mean) / sigma and log (running variance / variance) of each channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    var = channels.var + norm.eps
    with np.errstate(all="ignore"):
        shift: Array = (norm.running_mean - channels.mean) / np.sqrt(var)
        ratio: Array = np.log((norm.running_var + norm.eps) / var)
    return shift, ratio


def near_zero(norm: Norm) -> float:
    """Share of weights that are small beside their 90th percentile."""
    if norm.weight is None:
        return math.nan
    size = np.abs(norm.weight)
    return float(np.mean(size <= NEAR_ZERO * np.quantile(size, 0.9)))


def predicted_dead(norm: Norm) -> float:
    """Share of channels where Phi(bias / |weight|), what normal inputs pass, is below `PASSES`."""
    if norm.weight is None or norm.bias is None:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        z = norm.bias / np.abs(norm.weight)
    share = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z])
    return float(np.mean(share < PASSES))
