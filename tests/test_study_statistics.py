"""Statistics of paired runs against SciPy, brute force and published tables."""

import doctest
import itertools
import sys

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra `study`")

from scipy import stats

from bnext.study import statistics
from bnext.study.statistics import equivalence, holm, paired_difference, sign_flip

# Student's "A" and "B": additional hours of sleep by two drugs (The probable error of a mean, 1908)
SLEEP_A = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_B = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def all_flips(differences):
    """Brute force, in whole numbers so that ties are ties."""
    whole = [round(1000 * value) for value in differences]
    sums = [
        abs(sum(s * d for s, d in zip(signs, whole, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(whole))
    ]
    return sum(value >= abs(sum(whole)) for value in sums) / len(sums)


def test_students_sleep_data():
    difference = paired_difference(SLEEP_B, SLEEP_A)
    # As in R's documentation of t.test(paired = TRUE).
    assert difference.mean == pytest.approx(1.58)
    assert difference.p_t == pytest.approx(0.002833, abs=5e-7)
    assert (difference.low, difference.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert difference.excludes_zero
    assert difference.bound == difference.high


@pytest.mark.parametrize("n", [2, 3, 6, 11])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_paired_difference_is_scipys(n, shift):
    rng = np.random.default_rng(n)
    a, b = rng.normal(shift, 1, n), rng.normal(0, 1, n)
    difference = paired_difference(a, b, confidence=0.9)
    expected = stats.ttest_rel(a, b)
    assert difference.p_t == pytest.approx(expected.pvalue)
    assert (difference.low, difference.high) == pytest.approx(expected.confidence_interval(0.9))
    assert difference.sd == pytest.approx(np.std(a - b, ddof=1))
    assert paired_difference(b, a).mean == -difference.mean
    assert paired_difference(a - b).p_sign_flip == difference.p_sign_flip


@pytest.mark.parametrize("n", [2, 3, 6, 10])
def test_sign_flip_is_all_flips(n):
    rng = np.random.default_rng(n)
    for digits in (1, 3):  # with one digit there are ties and zeros
        differences = rng.normal(0.4, 1, n).round(digits)
        assert sign_flip(differences) == pytest.approx(all_flips(differences))


def test_sign_flip_limits():
    assert sign_flip([0.1] * 6) == 2 / 64
    assert sign_flip([0.0] * 6) == 1
    assert sign_flip([1, -1]) == 1
    many = np.random.default_rng(0).normal(0.3, 1, 40)
    assert sign_flip(many) == sign_flip(many)
    assert sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_holm_known_and_by_definition():
    # Example of Wright, "Adjusted p-values for simultaneous inference" (1992): Holm's column.
    assert holm([0.01, 0.02, 0.022, 0.09]) == pytest.approx([0.04, 0.06, 0.06, 0.09])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    rng = np.random.default_rng(0)
    p = list(rng.uniform(0, 0.1, 7))
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2):
        # Step down: reject while p <= level / (hypotheses that are left).
        rejected, order = set(), np.argsort(p)
        for rank, index in enumerate(order):
            if p[index] > level / (len(p) - rank):
                break
            rejected.add(index)
        assert {i for i, q in enumerate(adjusted) if q <= level} == rejected


def test_equivalence_is_the_interval_inside_the_margin():
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(50):
        differences = rng.normal(rng.uniform(-0.5, 0.5), 0.3, 6)
        p = equivalence(differences, 0.5)
        inner = paired_difference(differences, confidence=0.9)
        assert (p < 0.05) == (-0.5 < inner.low and inner.high < 0.5)
        outcomes.add(p < 0.05)
    assert outcomes == {True, False}


def test_no_variation_is_no_division_by_zero():
    same = paired_difference([1.5] * 6, [1.0] * 6)
    assert (same.low, same.high, same.p_t, same.sd) == (0.5, 0.5, 0.0, 0.0)
    nothing = paired_difference([1.0] * 6, [1.0] * 6)
    assert (nothing.mean, nothing.p_t, nothing.p_sign_flip) == (0.0, 1.0, 1.0)
    assert not nothing.excludes_zero
    assert equivalence([0.1] * 3, 0.2) == 0
    assert equivalence([0.2] * 3, 0.2) == 1
    rounding = paired_difference([0.1 + 0.2] * 3, [0.3 - 0.5, 0.3 - 0.5, 0.3 - 0.5 + 1e-16])
    assert rounding.p_t == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: paired_difference([1.0], [2.0]),
        lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0]),
        lambda: paired_difference([1.0, np.nan], [1.0, 2.0]),
        lambda: paired_difference([1.0, 2.0], [np.inf, 2.0]),
        lambda: paired_difference([[1.0, 2.0]]),
        lambda: paired_difference([1.0, 2.0], confidence=95),
        lambda: sign_flip([]),
        lambda: equivalence([1.0, 2.0], 0),
        lambda: equivalence([1.0, 2.0], -1),
        lambda: equivalence([1.0, 2.0], np.nan),
        lambda: holm([0.5, 1.2]),
        lambda: holm([np.nan]),
    ],
)
def test_bad_input_is_named(call):
    with pytest.raises(ValueError, match=r"^(paired_difference|sign_flip|equivalence|holm): "):
        call()


def test_without_scipy_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'pip install "bnext\[study\]"'):
        paired_difference([1.0, 2.0], [1.0, 1.0])


def test_documentation_examples():
    result = doctest.testmod(statistics)
    assert result.attempted > 0
    assert result.failed == 0
