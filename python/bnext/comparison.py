"""Two or more variants of a network on the same data, seed by seed: `compare` and `advise`."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bnext import data as data_sets
from bnext import optim, random, schedules, train
from bnext._table import Table
from bnext.data import Dataset, Normalizer
from bnext.diagnosis import Report
from bnext.nn import _check
from bnext.nn.module import Module, number

__all__ = ["Comparison", "Difference", "Variant", "advise", "compare"]

_LEVEL = 0.05
# Below this, even if all seeds agree the sign-flip test cannot reach the level: 2^(1 - 5) > 0.05.
_LEAST_SEEDS = 6
_SHARE_HELD_OUT = 0.2
# Trainings of each learning rate on data that are not tested on, with seeds of their own.
_TRIALS = 2


@dataclass(frozen=True)
class Variant:
    """A network and how it is trained, where that is not as for the others.

    Attributes
    ----------
    factory : callable
        ``factory() -> Module`` with fresh weights, drawn from `bnext.random.initial_rng`.
    options : mapping
        Options of `compare` for this variant alone: lr, epochs, batch_size, weight_decay.
    """

    factory: Callable[[], Any]
    options: Mapping[str, Any]

    def __init__(self, factory: Callable[[], Any], **options: Any) -> None:
        unknown = sorted(options.keys() - set(_SETTINGS))
        if unknown:
            raise ValueError(
                f"Variant: {unknown[0]}: expected one of {', '.join(_SETTINGS)} as option"
            )
        object.__setattr__(self, "factory", factory)
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline, over seeds.

    Attributes
    ----------
    name, baseline : str
    paired : `bnext.study.statistics.PairedDifference`
        Mean, interval, p-values.
    p_holm : float
        p of the t-test, corrected for the number of variants.
    shown : bool
        Whether there is a difference: `p_holm` and the sign-flip test are both below 0.05.
    p_equivalent : float or None
        Of "they differ by `margin` or more", if a margin was given.
    sentence : str
    """

    name: str
    baseline: str
    paired: Any
    p_holm: float
    shown: bool
    p_equivalent: float | None
    sentence: str


class _Row(NamedTuple):
    variant: str
    mean: float
    sd: float
    difference: str
    p_holm: float | None
    p_sign_flip: float | None
    lr: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; ``print`` shows it.

    Attributes
    ----------
    baseline : str
    scores : dict of lists
        One score for each seed, in the order of `seeds`.
    seeds : list of int
    unit : str
    differences : list of Difference
        Of all other variants to the baseline.
    lr : dict
        Learning rate of each variant; None with a `train` of your own.
    """

    baseline: str
    scores: dict[str, list[float]]
    seeds: list[int]
    unit: str
    differences: list[Difference]
    lr: dict[str, float | None]

    @property
    def sentences(self) -> list[str]:
        """One for each difference."""
        return [difference.sentence for difference in self.differences]

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        return {
            "version": 1,
            "baseline": self.baseline,
            "seeds": self.seeds,
            "unit": self.unit,
            "scores": self.scores,
            "lr": self.lr,
            "differences": [
                {
                    "name": one.name,
                    "mean": one.paired.mean,
                    "sd": one.paired.sd,
                    "low": one.paired.low,
                    "high": one.paired.high,
                    "confidence": one.paired.confidence,
                    "p_t": one.paired.p_t,
                    "p_sign_flip": one.paired.p_sign_flip,
                    "p_holm": one.p_holm,
                    "p_equivalent": one.p_equivalent,
                    "shown": one.shown,
                    "sentence": one.sentence,
                }
                for one in self.differences
            ],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        differences = {one.name: one for one in self.differences}
        rows = []
        for name, scores in self.scores.items():
            one = differences.get(name)
            rows.append(
                _Row(
                    name,
                    float(np.mean(scores)),
                    float(np.std(scores, ddof=1)),
                    "(baseline)" if one is None else str(one.paired),
                    None if one is None else one.p_holm,
                    None if one is None else one.paired.p_sign_flip,
                    self.lr[name],
                )
            )
        return "\n".join([str(Table(_Row, rows)), "", *_filled(self.sentences)])


def compare(
    variants: Mapping[str, Callable[[], Any] | Variant],
    data: Any,
    *,
    seeds: int | Sequence[int] = 6,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float | Sequence[float] = 0.05,
    weight_decay: float = 5e-4,
    margin: float | None = None,
    confidence: float = 0.95,
    train: Callable[[Any, Dataset, int], float] | None = None,
    unit: str = "points",
    higher_is_better: bool = True,
    log: Callable[[str], object] | None = None,
) -> Comparison:
    """Train each variant with each seed and say what can be said about their differences.

    A seed fixes the split (if `data` are not split), the initial weights, the order of the samples
    and dropout, for all variants alike: they are compared seed by seed. Training is SGD with
    momentum 0.9 and a cosine schedule; the score is the test accuracy after the last epoch, in
    percentage points.

    Parameters
    ----------
    variants : mapping of names to factories or `Variant`
        ``factory() -> Module``; the first is the baseline. With `train`, a factory may return
        anything, such as a PyTorch module.
    data : Dataset, str or (x, y)
        A str as `bnext.data.load` takes it. Of x and y, a fifth is tested on.
    seeds : int or sequence of int, default 6
        So many, from 0, or these. With fewer than 6 no difference can be shown.
    epochs, batch_size, weight_decay
        Of training.
    lr : float or sequence of float, default 0.05
        Of several, each variant gets the one with the highest mean accuracy in trainings on four
        fifths of the training data, measured on the rest, with seeds of their own: the test data
        are not looked at. A claim about accuracy needs that, as the best rate depends on the
        variant.
    margin : float, optional
        The smallest difference that would matter: whether all larger ones can be ruled out is
        tested too (TOST).
    confidence : float, default 0.95
        Of the intervals.
    train : callable, optional
        ``train(model, dataset, seed) -> score``, in place of the training above.
    unit : str, default "points"
        Of the score of `train`.
    higher_is_better : bool, default True
    log : callable, optional
        Receives a line for each training.

    Returns
    -------
    Comparison
        ``print`` shows it; ``.sentences`` says it.

    Raises
    ------
    ValueError
        For fewer than 2 variants or seeds, options out of range, scores that are not finite.
    TypeError
        For data or variants of another kind.
    ImportError
        Without SciPy.

    Notes
    -----
    A difference is shown if the p-value of the paired t-test, after Holm's correction for the
    number of variants, and that of the exact sign-flip test are both below 0.05. Otherwise the
    sentence says how large a difference the interval leaves possible.

    Examples
    --------
    >>> scores = {"a": [95.0] * 6, "b": [97.0, 96.5, 97.2, 96.8, 97.1, 96.9]}
    >>> variants = {"a": lambda: "a", "b": lambda: "b"}
    >>> x, y = np.zeros((10, 1)), np.arange(10) % 2
    >>> result = compare(variants, (x, y), train=lambda name, dataset, seed: scores[name][seed])
    >>> print(result.sentences[0])
    "b" is better than "a" by 1.92 points (95 % interval 1.66 to 2.18, 6 seeds, p = 7.63e-06).
    """
    from bnext.study import statistics

    chosen = _variants(variants)
    numbers = _seeds(seeds)
    statistics.paired_difference([0.0, 1.0], confidence=confidence)  # SciPy and the argument
    if margin is not None and not 0 < number("compare", "margin", margin) < math.inf:
        raise ValueError(f"compare: margin: expected a finite number > 0, got {margin}")
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
    }
    each = {name: _settings({**settings, **one.options}) for name, one in chosen.items()}
    split = _splits(data)
    say = log or _silent

    scores: dict[str, list[float]] = {name: [] for name in chosen}
    rates: dict[str, float | None] = dict.fromkeys(chosen)
    with _generators():
        if train is None:
            for name, one in chosen.items():
                rates[name] = _rate(name, one, each[name], split, numbers, say)
        for seed in numbers:
            dataset = split(seed)
            for name, one in chosen.items():
                random.manual_seed(seed)
                if train is None:
                    options = {**each[name], "lr": rates[name]}
                    score = 100 * _accuracy(name, one, dataset, seed, options)
                else:
                    score = float(train(one.factory(), dataset, seed))
                if not math.isfinite(score):
                    raise ValueError(f"compare: {name}: seed {seed}: the score is {score}")
                scores[name].append(score)
                say(f"seed {seed}  {name}: {score:.2f} {unit}")

    baseline, *others = chosen
    paired = [
        statistics.paired_difference(scores[name], scores[baseline], confidence=confidence)
        for name in others
    ]
    corrected = statistics.holm([one.p_t for one in paired])
    differences = []
    for name, pairs, p_holm in zip(others, paired, corrected, strict=True):
        values = np.subtract(scores[name], scores[baseline])
        equivalent = None if margin is None else statistics.equivalence(values, margin)
        shown = p_holm < _LEVEL and pairs.p_sign_flip < _LEVEL
        sentence = _sentence(
            name, baseline, pairs, p_holm, shown, equivalent, margin, unit, higher_is_better
        )
        differences.append(Difference(name, baseline, pairs, p_holm, shown, equivalent, sentence))
    return Comparison(baseline, scores, numbers, unit, differences, rates)


def advise(*results: Report | Comparison) -> str:
    """What findings of `bnext.doctor` and comparisons come to, in sentences.

    Critical findings come first, then warnings, then comparisons.

    Parameters
    ----------
    *results : Report or Comparison

    Examples
    --------
    >>> import bnext
    >>> from bnext import nn
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm(32))
    >>> print(bnext.advise(bnext.doctor(model, input_shape=(64,), dataset_size=1000)))
    - Bias without effect before BatchNorm ('0', BNX104). Make the layer with bias=False.
    """
    lines: list[str] = []
    for result in results:
        if isinstance(result, Report):
            lines += _advice(result)
        elif isinstance(result, Comparison):
            lines += result.sentences
        else:
            raise TypeError(
                f"advise: results: expected a Report or Comparison, got {type(result).__name__}"
            )
    if not lines:
        raise TypeError("advise: results: expected a Report or Comparison, got none")
    return "\n".join(_filled([f"- {line}" for line in lines]))


def _advice(report: Report) -> list[str]:
    lines = []
    for severity in ("critical", "warning"):
        for code in report.codes:
            found = [one for one in report.findings if one.code == code]
            worst = "critical" if any(f.severity == "critical" for f in found) else "warning"
            if worst != severity:
                continue
            layers = ", ".join(repr(one.layer) for one in found if one.layer)
            title = found[0].rule.title
            where = f"{layers}, {code}" if layers else code
            urgent = "Critical: " if severity == "critical" else ""
            title = title if urgent else title[0].upper() + title[1:]
            lines.append(f"{urgent}{title} ({where}). {found[0].advice}")
    if not lines:
        unchecked = f"; not checked: {', '.join(report.skipped)}" if report.skipped else ""
        lines.append(f"No findings{unchecked}.")
    return lines


def _filled(lines: Sequence[str]) -> list[str]:
    return [textwrap.fill(line, 100, subsequent_indent="  ") for line in lines]


# -- checks ----------------------------------------------------------------------------
_SETTINGS = ("lr", "epochs", "batch_size", "weight_decay")


def _variants(variants: Mapping[str, Any]) -> dict[str, Variant]:
    if not isinstance(variants, Mapping) or len(variants) < 2:
        got = f"{len(variants)}" if isinstance(variants, Mapping) else type(variants).__name__
        raise ValueError(f"compare: variants: expected a mapping of 2 or more, got {got}")
    chosen = {}
    for name, one in variants.items():
        if not (isinstance(one, Variant) or callable(one)) or isinstance(one, Module):
            raise TypeError(
                f"compare: variants: {name}: expected a factory, which makes a fresh network for "
                f"each seed, or a Variant, got {type(one).__name__}"
            )
        chosen[str(name)] = one if isinstance(one, Variant) else Variant(one)
    return chosen


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, Sequence):
        numbers = [_check.integer("compare", "seeds", seed, 0) for seed in seeds]
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"compare: seeds: expected different ones, got {numbers}")
    else:
        numbers = list(range(_check.integer("compare", "seeds", seeds, 0)))
    if len(numbers) < 2:
        raise ValueError(f"compare: seeds: expected 2 or more, got {len(numbers)}")
    return numbers


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    rates = given["lr"] if isinstance(given["lr"], Sequence | np.ndarray) else [given["lr"]]
    rates = [number("compare", "lr", rate) for rate in rates]
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"compare: lr: expected finite numbers > 0, got {given['lr']}")
    decay = number("compare", "weight_decay", given["weight_decay"])
    if not 0 <= decay < math.inf:
        raise ValueError(f"compare: weight_decay: expected a finite number >= 0, got {decay}")
    return {
        "lr": rates,
        "epochs": _check.integer("compare", "epochs", given["epochs"], 1),
        "batch_size": _check.integer("compare", "batch_size", given["batch_size"], 2),
        "weight_decay": decay,
    }


def _splits(data: Any) -> Callable[[int], Dataset]:
    """The split for a seed."""
    if isinstance(data, str):
        data = data_sets.load(data)
    if isinstance(data, Dataset):
        whole: Dataset = data
        return lambda seed: whole
    if not (isinstance(data, tuple) and len(data) == 2):
        raise TypeError(
            f"compare: data: expected a Dataset, a str or (x, y), got {type(data).__name__}"
        )
    x, y = np.asarray(data[0]), np.asarray(data[1])
    if y.ndim != 1 or len(x) != len(y) or y.dtype.kind not in "iu":
        raise ValueError(
            f"compare: data: y: expected {len(x)} integers, got {y.dtype} of shape {y.shape}"
        )
    if len(x) < 10:
        raise ValueError(f"compare: data: x: expected 10 or more samples, got {len(x)}")
    return lambda seed: _split("data", x, y, int(y.max()) + 1, seed)


def _split(name: str, x: Any, y: Any, num_classes: int, seed: int) -> Dataset:
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    test, rest = np.split(order, [max(1, round(_SHARE_HELD_OUT * len(x)))])
    return Dataset(name, x[rest], y[rest], x[test], y[test], num_classes)


@contextmanager
def _generators() -> Iterator[None]:
    """Afterwards the default generators are what they were."""
    dropout, initial = random.default_generator.state, random._initial_rng
    try:
        yield
    finally:
        random.default_generator.state = dropout
        random._initial_rng = initial


# -- training --------------------------------------------------------------------------
def _rate(
    name: str,
    variant: Variant,
    options: dict[str, Any],
    split: Callable[[int], Dataset],
    seeds: list[int],
    say: Callable[[str], object],
) -> float:
    """The learning rate that is best on data held out of the training data."""
    rates: list[float] = options["lr"]
    if len(rates) == 1:
        return rates[0]
    means = []
    for rate in rates:
        results = []
        for trial in range(_TRIALS):
            seed = max(seeds) + 1 + trial
            whole = split(seed)
            part = _split(whole.name, whole.x_train, whole.y_train, whole.num_classes, seed)
            random.manual_seed(seed)
            try:
                results.append(_accuracy(name, variant, part, seed, {**options, "lr": rate}))
            except train.NonFiniteLossError:
                results.append(0.0)
        means.append(float(np.mean(results)))
        say(f"{name}: lr {rate:g}: {100 * means[-1]:.2f} points on held-out data")
    return rates[int(np.argmax(means))]


def _accuracy(
    name: str, variant: Variant, dataset: Dataset, seed: int, options: dict[str, Any]
) -> float:
    model = variant.factory()
    if not isinstance(model, Module):
        raise TypeError(
            f"compare: variants: {name}: expected a bnext.nn.Module from the factory, got "
            f"{type(model).__name__}; compare(..., train=) trains others"
        )
    epochs = options["epochs"]
    steps = data_sets.num_batches(len(dataset.x_train), options["batch_size"])
    trainer = train.Trainer(
        model,
        optim.SGD(
            model.named_parameters(),
            options["lr"],
            momentum=0.9,
            weight_decay=options["weight_decay"],
        ),
        schedules.build(
            "cosine",
            options["lr"],
            epochs=epochs,
            steps_per_epoch=steps,
            warmup_epochs=min(1.0, epochs / 2),
        ),
        dataset,
        batch_size=options["batch_size"],
        seed=seed,
        normalizer=Normalizer.fit(dataset.x_train),
        progress=False,
        log=_silent,
    )
    try:
        return trainer.fit(epochs)[-1]["test_accuracy"]
    except train.NonFiniteLossError as error:
        raise train.NonFiniteLossError(f"compare: {name}: seed {seed}: {error}") from error


def _silent(line: str) -> None:
    pass


# -- words -----------------------------------------------------------------------------
def _sentence(
    name: str,
    baseline: str,
    paired: Any,
    p: float,
    shown: bool,
    equivalent: float | None,
    margin: float | None,
    unit: str,
    higher_is_better: bool,
) -> str:
    interval = f"{100 * paired.confidence:g} % interval"
    if shown:
        sign = 1 if paired.mean > 0 else -1
        word = "better" if (sign > 0) == higher_is_better else "worse"
        low, high = sorted((sign * paired.low, sign * paired.high))
        text = (
            f'"{name}" is {word} than "{baseline}" by {abs(paired.mean):.2f} {unit} '
            f"({interval} {low:.2f} to {high:.2f}, {paired.n} seeds, p = {p:.3g})."
        )
    elif paired.bound == 0:
        text = f'"{name}" and "{baseline}" gave the same result with each of {paired.n} seeds.'
    else:
        text = (
            f'Between "{name}" and "{baseline}" no difference larger than '
            f"{_rounded_up(paired.bound)} {unit} could be shown with {paired.n} seeds (mean "
            f"{paired.mean:+.2f}, {interval} {paired.low:+.2f} to {paired.high:+.2f}, "
            f"p = {p:.3g})."
        )
        if paired.n < _LEAST_SEEDS:
            text += f" Fewer than {_LEAST_SEEDS} seeds cannot show any."
    if equivalent is not None:
        verdict = "are" if equivalent < _LEVEL else "have not been shown to be"
        text += f" They {verdict} equivalent within {margin:g} {unit} (p = {equivalent:.3g})."
    return text


def _rounded_up(value: float) -> str:
    """With two digits, none of which understates."""
    digits = 1 - math.floor(math.log10(value))
    scaled = math.ceil(value * 10**digits - 1e-9) / 10**digits
    return f"{scaled:.{max(digits, 0)}f}".rstrip("0").rstrip(".") if digits > 0 else f"{scaled:g}"
