"""Statistics of paired runs: what two variants differ by, over seeds that they share.

Two variants run with the same seed (same split, initial weights, order of the samples) differ by
the variant alone, so each seed gives one difference, and the differences are what is tested.

>>> with_norm, without = [95.1, 94.8, 95.3, 95.0, 94.9, 95.2], [94.2, 94.1, 94.0, 94.3, 94.1, 93.9]
>>> difference = paired_difference(with_norm, without)
>>> print(difference)
+0.95 [+0.66, +1.24], n=6
>>> print(f"{difference.p_sign_flip:.5f}")
0.03125
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from bnext import _extras

__all__ = [
    "PairedDifference",
    "equivalence",
    "holm",
    "paired_difference",
    "sign_flip",
    "t_interval",
]

# Up to so many pairs all flips of signs are walked over; beyond, random ones stand for them.
_EXACT_PAIRS = 14


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``a - b`` over pairs, with what is known about it.

    Attributes
    ----------
    n : int
        Pairs.
    mean, sd : float
        Of the differences; `sd` with n - 1.
    low, high : float
        Confidence interval of the mean, by Student's t.
    confidence : float
        Of the interval.
    p_t, p_sign_flip : float
        Two-sided p-values of "the mean difference is 0": the paired t-test, and the test by
        flipping signs, which assumes symmetry alone. Of n pairs the latter is never below 2^(1-n).
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    confidence: float
    p_t: float
    p_sign_flip: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def bound(self) -> float:
        """The largest difference, in either direction, that the interval leaves possible."""
        return max(abs(self.low), abs(self.high))

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}], n={self.n}"


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike | float = 0.0, *, confidence: float = 0.95
) -> PairedDifference:
    """Compare two variants over the seeds that they share.

    Parameters
    ----------
    a, b : sequence of n numbers
        Results of the same seeds in the same order; or `b` one number, such as 0 if `a` holds
        differences.
    confidence : float, default 0.95
        Of the interval, in (0, 1).

    Returns
    -------
    PairedDifference

    Raises
    ------
    ValueError
        For fewer than 2 pairs, different lengths, values that are not finite.
    ImportError
        Without SciPy.

    Examples
    --------
    >>> paired_difference([2, 4, 3], [1, 1, 1]).mean
    2.0
    """
    if not 0 < confidence < 1:
        raise ValueError(
            f"paired_difference: confidence: expected a number in (0, 1), got {confidence!r}"
        )
    x = _values("paired_difference", "a", a)
    y = np.asarray(b, np.float64)
    if y.ndim and y.shape != x.shape:
        raise ValueError(f"paired_difference: b: expected shape {x.shape} as a, got {y.shape}")
    differences = _values("paired_difference", "a - b", x - y)
    mean = float(differences.mean())
    sd = float(differences.std(ddof=1))
    if _constant(differences):
        low = high = mean
        p_t = 0.0 if mean else 1.0
    else:
        half = float(t_interval(differences, confidence)[1])
        low, high = mean - half, mean + half
        p_t = float(_t_test(differences, 0.0, "two-sided").pvalue)
    return PairedDifference(
        len(differences), mean, sd, low, high, confidence, p_t, sign_flip(differences)
    )


def t_interval(
    values: NDArray[np.float64], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over axis 0, and half the width of its confidence interval by Student's t.

    Examples
    --------
    >>> mean, half = t_interval(np.array([1.0, 2, 3]))
    >>> print(f"{mean} +- {half:.2f}")
    2.0 +- 2.48
    """
    count = len(values)
    quantile = _stats().t.ppf((1 + confidence) / 2, count - 1)
    return values.mean(axis=0), quantile * values.std(axis=0, ddof=1) / np.sqrt(count)


def sign_flip(differences: npt.ArrayLike) -> float:
    r"""Two-sided p-value of "differences are as often positive as negative", by flipping signs.

    Under the hypothesis every one of the :math:`2^n` ways to set the signs is equally likely; p is
    the share of them whose mean is as far from 0 as the one seen. Exact up to 14 pairs, by 9999
    random flips (the same ones each time) beyond.

    References
    ----------
    Fisher, "The design of experiments" (1935), section 21; `scipy.stats.permutation_test`.

    Examples
    --------
    >>> sign_flip([1, 2, 1, 3, 1, 2])  # 2 of 64: all positive, all negative
    0.03125
    """
    values = _values("sign_flip", "differences", differences)
    if not values.any():
        return 1.0
    stats = _stats()
    exact = len(values) <= _EXACT_PAIRS
    result = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else 9999,
        **({} if exact else _seeded(stats)),
    )
    return float(result.pvalue)


def equivalence(differences: npt.ArrayLike, margin: float) -> float:
    r"""p-value of "the mean is at least `margin` away from 0": two one-sided t-tests (TOST).

    A small value shows that there is no difference that matters, which a large p-value of
    `paired_difference` does not.

    Parameters
    ----------
    differences : sequence of n numbers
    margin : float
        The smallest difference that would matter, > 0.

    References
    ----------
    Schuirmann, "A comparison of the two one-sided tests procedure", J. Pharmacokinet. Biopharm. 15
    (1987).

    Examples
    --------
    >>> equivalence([0.1, -0.1, 0.0, 0.1, -0.1, 0.05], margin=0.5) < 0.05
    True
    """
    values = _values("equivalence", "differences", differences)
    if not 0 < margin < math.inf:
        raise ValueError(f"equivalence: margin: expected a finite number > 0, got {margin!r}")
    if _constant(values):
        return 0.0 if abs(values[0]) < margin else 1.0
    return max(
        float(_t_test(values, -margin, "greater").pvalue),
        float(_t_test(values, margin, "less").pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Holm's adjusted p-values: below a level, with that as the chance of any false alarm at all.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"holm: p_values: expected numbers in [0, 1], got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _values(where: str, name: str, values: npt.ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{where}: {name}: expected 2 or more numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: {name}: expected finite numbers, got {array}")
    return array


def _constant(values: NDArray[np.float64]) -> bool:
    """Whether the values differ by no more than rounding: no t-test then."""
    return bool(np.ptp(values) <= 1e-12 * abs(values).max())


def _t_test(values: NDArray[np.float64], against: float, alternative: str) -> Any:
    with warnings.catch_warnings():
        # About differences that vary little beside their mean; `_constant` sorts out the rest.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        return _stats().ttest_1samp(values, against, alternative=alternative)


def _seeded(stats: Any) -> dict[str, Any]:
    """The argument is called `rng` since SciPy 1.15."""
    import inspect

    names = inspect.signature(stats.permutation_test).parameters
    return {"rng" if "rng" in names else "random_state": np.random.default_rng(0)}


def _stats() -> Any:
    return _extras.require("scipy.stats", "comparing runs", extra="study")
