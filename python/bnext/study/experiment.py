"""What an experiment is: arms, a run, contrasts between arms, and how they are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bnext.study import statistics
from bnext.study.statistics import PairedDifference

if TYPE_CHECKING:
    from bnext.data import Dataset

__all__ = [
    "Arm",
    "Contrast",
    "Experiment",
    "Judged",
    "Outcome",
    "Results",
    "Scale",
    "Settings",
    "Verdict",
    "combined",
    "judge",
]

Settings = Mapping[str, Any]
"""What a run depends on besides seed and data; anything JSON can hold."""

Metrics = Mapping[str, Any]
"""What a run measured: numbers, or lists of numbers for curves. Accuracies are in percent."""

Outcome = Literal["higher", "lower", "same", "open"]
Verdict = Literal["supported", "refined", "refuted", "inconclusive"]
Topic = Literal["when", "where", "how much"]

LEVEL = 0.05
"""Of all tests, after Holm's correction over the contrasts of an experiment."""


@dataclass(frozen=True)
class Scale:
    """How large the runs are.

    Attributes
    ----------
    name : {"quick", "full"}
    train, validation, test : int
        Samples, or all there are if there are fewer.
    seeds : int
        Repetitions.
    epochs : float
        Factor for the epochs of an experiment.
    """

    name: str
    train: int
    validation: int
    test: int
    seeds: int
    epochs: float = 1.0

    def pick(self, quick: Any, full: Any) -> Any:
        """The value for this scale."""
        return quick if self.name == "quick" else full

    def sizes(self, train: int | None = None) -> dict[str, int]:
        """The settings that `bnext.study.training.split` reads; `train` at most, if given."""
        return {
            "train": self.train if train is None else min(train, self.train),
            "validation": self.validation,
            "test": self.test,
        }


QUICK = Scale("quick", train=1000, validation=200, test=600, seeds=6)
FULL = Scale("full", train=4000, validation=2000, test=10_000, seeds=10)


@dataclass(frozen=True)
class Arm:
    """One variant and what its runs measured, a row for each seed."""

    label: str
    settings: Settings
    runs: Sequence[Metrics]

    def values(self, metric: str) -> NDArray[np.float64]:
        """`metric` for each seed; NaN where a run has none."""
        return np.array(
            [np.nan if run[metric] is None else run[metric] for run in self.runs], np.float64
        )

    def mean(self, metric: str) -> float:
        return float(self.values(metric).mean())

    def curves(self, metric: str) -> NDArray[np.float64]:
        """A list-valued `metric`: a row for each seed; NaN where a run has no value."""
        rows = [[np.nan if value is None else value for value in run[metric]] for run in self.runs]
        longest = max(map(len, rows))
        return np.array([row + [np.nan] * (longest - len(row)) for row in rows], np.float64)


class Results:
    """The arms of one experiment, over the same seeds in the same order."""

    def __init__(self, arms: Iterable[Arm], seeds: Sequence[int]) -> None:
        self._arms = {arm.label: arm for arm in arms}
        self.seeds = list(seeds)

    def __iter__(self) -> Any:
        return iter(self._arms.values())

    def __getitem__(self, label: str) -> Arm:
        return self._arms[label]

    def arms(self, **wanted: Any) -> list[Arm]:
        """Those whose settings have these values."""
        return [
            arm
            for arm in self
            if all(arm.settings.get(name) == value for name, value in wanted.items())
        ]

    def arm(self, **wanted: Any) -> Arm:
        """The only one whose settings have these values; KeyError otherwise."""
        found = self.arms(**wanted)
        if len(found) != 1:
            raise KeyError(f"expected one arm with {wanted}, got {[arm.label for arm in found]}")
        return found[0]

    def best(self, *, by: str = "validation_accuracy", **wanted: Any) -> Arm:
        """Of those with these settings the one with the highest mean of `by`.

        How the learning rate of an arm is chosen: on validation data, before the test data is
        looked at.
        """
        found = self.arms(**wanted)
        if not found:
            raise KeyError(f"expected arms with {wanted}, got none")
        return max(found, key=lambda arm: np.nan_to_num(arm.values(by), nan=-np.inf).mean())


@dataclass(frozen=True)
class Contrast:
    """``a - b`` over the seeds, or ``a / b``, and what it says.

    Attributes
    ----------
    name : str
        What is compared, such as "accuracy at the best learning rate: BN - plain".
    a, b : array (seeds,)
    unit : str
        Of the difference: "points" (of accuracy), "nats", ...; "times" makes it a ratio.
    margin : float, optional
        The smallest difference that matters (for ratios a factor above 1). Only with one can
        "no difference" be shown.
    claims : mapping of claim to {outcome: verdict}
        Which claims of `bnext.study.claims` it decides, and how. An outcome that is left out
        decides nothing.
    says : mapping of outcome to str
        A sentence for each outcome, for the first page; "{effect}" stands for the figures, "{size}"
        for those without a sign. What is left out is not said there.
    anchors : mapping of anchor to outcome
        Published results of `bnext.study.anchors` that it repeats, and what came out there.
    topic : {"when", "where", "how much"}
        Under which question of the first page.
    """

    name: str
    a: NDArray[np.float64]
    b: NDArray[np.float64] | float = 0.0
    unit: str = "points"
    margin: float | None = None
    claims: Mapping[str, Mapping[Outcome, Verdict]] = field(default_factory=dict)
    says: Mapping[Outcome, str] = field(default_factory=dict)
    anchors: Mapping[str, Outcome] = field(default_factory=dict)
    topic: Topic = "when"

    @property
    def ratio(self) -> bool:
        return self.unit == "times"


@dataclass(frozen=True)
class Judged:
    """A contrast with its statistics.

    Attributes
    ----------
    difference : PairedDifference
        Of the logarithms, for a ratio. None if a run has no value: then the outcome is "open".
    p_holm, p_equivalence : float
        Of the t-test and of equivalence, after Holm's correction.
    outcome : {"higher", "lower", "same", "open"}
    """

    contrast: Contrast
    difference: PairedDifference | None
    p_holm: float
    p_equivalence: float | None
    outcome: Outcome

    @property
    def figures(self) -> tuple[float, float, float]:
        """Estimate and confidence interval: differences, or factors for a ratio."""
        if self.difference is None:
            return math.nan, math.nan, math.nan
        found = (self.difference.mean, self.difference.low, self.difference.high)
        return tuple(map(math.exp, found)) if self.contrast.ratio else found  # type: ignore[return-value]

    @property
    def effect(self) -> str:
        """Such as "+1.3 points [+0.9, +1.7]" or "1.30 times [1.13, 1.50]"."""
        return self._shown(self.figures, "" if self.contrast.ratio else "+")

    @property
    def size(self) -> str:
        """`effect` without its direction, for words that have it: "costs 1.3 points [0.9, 1.7]"."""
        middle, low, high = self.figures
        turned = middle < 0 and not self.contrast.ratio
        return self._shown((-middle, -high, -low) if turned else self.figures, "")

    def _shown(self, figures: tuple[float, float, float], sign: str) -> str:
        """Estimate and interval, with two digits of the distance between them."""
        if self.difference is None:
            return "no figure: runs without a value"
        middle, low, high = figures
        reach = float(f"{min(high - middle, middle - low):.1e}")  # rounded: 0.996 counts as 1
        digits = min(max(1 - math.floor(math.log10(reach)), 0), 3) if reach > 0 else 2
        shown = (
            # Not a negative zero.
            f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "\u2212")
            for value in figures
        )
        return "{} {unit} [{}, {}]".format(*shown, unit=self.contrast.unit)

    @property
    def sentence(self) -> str | None:
        """What the first page says."""
        text = self.contrast.says.get(self.outcome)
        if text is None:
            return None
        return text.replace("{effect}", self.effect).replace("{size}", self.size)

    def verdict(self, claim: str) -> Verdict:
        return self.contrast.claims[claim].get(self.outcome, "inconclusive")


def judge(contrasts: Sequence[Contrast], level: float = LEVEL) -> list[Judged]:
    """Test the contrasts of one experiment, as one family.

    - "same": equivalence within the margin is shown (TOST, Holm). It comes first: a difference
      smaller than what matters does not matter, even if it is one.
    - "higher", "lower": the paired t-test shows a difference after Holm's correction, and so does
      the exact test by flipping signs without it. (Of 6 seeds its smallest value is 1/32, which
      no correction survives, so it only confirms.)
    - "open": neither.
    """
    differences = [_difference(contrast) for contrast in contrasts]
    known = [i for i, difference in enumerate(differences) if difference is not None]
    p_holm = dict(zip(known, statistics.holm([_p_t(differences[i]) for i in known]), strict=True))
    bounded = [i for i in known if contrasts[i].margin is not None]
    p_same = dict(
        zip(
            bounded,
            statistics.holm([_p_equivalence(contrasts[i]) for i in bounded]),
            strict=True,
        )
    )
    judged = []
    for i, (contrast, difference) in enumerate(zip(contrasts, differences, strict=True)):
        outcome: Outcome = "open"
        if difference is not None:
            if p_same.get(i, 1.0) <= level:
                outcome = "same"
            elif p_holm[i] <= level and difference.p_sign_flip <= level:
                outcome = "higher" if difference.mean > 0 else "lower"
        judged.append(Judged(contrast, difference, p_holm.get(i, 1.0), p_same.get(i), outcome))
    return judged


def _pairs(contrast: Contrast) -> NDArray[np.float64]:
    if contrast.ratio:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log(contrast.a) - np.log(contrast.b))
    return np.asarray(contrast.a - contrast.b)


def _difference(contrast: Contrast) -> PairedDifference | None:
    pairs = _pairs(contrast)
    return statistics.paired_difference(pairs) if np.isfinite(pairs).all() else None


def _p_t(difference: PairedDifference | None) -> float:
    assert difference is not None
    return difference.p_t


def _p_equivalence(contrast: Contrast) -> float:
    assert contrast.margin is not None
    margin = math.log(contrast.margin) if contrast.ratio else contrast.margin
    return statistics.equivalence(_pairs(contrast), margin)


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """Of one claim, from all contrasts about it.

    What is inconclusive has no say unless all are; if the others disagree, the claim is right in
    part: refined.
    """
    decided = {verdict for verdict in verdicts if verdict != "inconclusive"}
    if len(decided) > 1:
        return "refined"
    return decided.pop() if decided else "inconclusive"


@dataclass(frozen=True)
class Experiment:
    """One question, answered by runs.

    Attributes
    ----------
    name : str
        For ``--only``: words with hyphens.
    number : int
        Order in the report.
    title, question, design, expected : str
        For the report: what it is called; what it asks; data, model, factors and metrics;
        what the literature says should come out.
    claims : tuple of str
        Identifiers of `bnext.study.claims`, all that its contrasts may decide.
    arms : callable
        ``arms(scale) -> {label: settings}``. Settings are complete: with seed and data they
        decide all bits of a run.
    run : callable
        ``run(settings, dataset, seed) -> metrics``, a pure function.
    contrasts : callable
        ``contrasts(results) -> [Contrast, ...]``.
    plot : callable
        ``plot(figure, results)`` draws into a matplotlib Figure.
    columns : tuple of (metric, title)
        Of the table of arms.
    """

    name: str
    number: int
    title: str
    question: str
    design: str
    expected: str
    claims: tuple[str, ...]
    arms: Callable[[Scale], dict[str, Settings]]
    run: Callable[[Settings, Dataset, int], dict[str, Any]]
    contrasts: Callable[[Results], list[Contrast]]
    plot: Callable[[Any, Results], None]
    columns: tuple[tuple[str, str], ...] = (
        ("validation_accuracy", "validation accuracy, %"),
        ("test_accuracy", "test accuracy, %"),
        ("test_loss", "test loss, nats"),
    )
