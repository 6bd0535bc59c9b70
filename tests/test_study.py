"""The study: its experiments, how they are judged, and its report."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra `study`")
pytest.importorskip("matplotlib", reason="needs the extra `study`")

from bnext import data, nn, random
from bnext.nn import Parameter
from bnext.study import experiments, networks, plots, report, runner, training
from bnext.study.anchors import ANCHORS
from bnext.study.claims import CLAIMS
from bnext.study.experiment import FULL, QUICK, Arm, Contrast, Results, combined, judge
from gradcheck import gradcheck

EXPERIMENTS = list(experiments.registry().values())
CURVES = {"checks": 30, "pruning": 4}  # metrics that are lists, with their lengths


@pytest.fixture(autouse=True)
def generators_as_before():
    before = random.default_generator.state
    yield
    random.default_generator.state = before


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return data.load("digits")


class Anything(dict):
    """Metrics of a run that has all of them: numbers that differ from run to run."""

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def __missing__(self, name):
        values = self._rng.uniform(1, 90, CURVES.get(name, 1)).tolist()
        self[name] = values if name in CURVES else values[0]
        return self[name]


def made_up(experiment, scale=QUICK, seeds=6):
    arms = experiment.arms(scale)
    return Results(
        [
            Arm(label, settings, [Anything([number, seed]) for seed in range(seeds)])
            for number, (label, settings) in enumerate(arms.items())
        ],
        range(seeds),
    )


# -- the registry ------------------------------------------------------------------------
def test_there_is_every_experiment_of_the_plan_and_names_are_unique():
    assert set(range(1, 18)) <= {experiment.number for experiment in EXPERIMENTS}
    assert len({experiment.number for experiment in EXPERIMENTS}) == len(EXPERIMENTS)
    assert list(experiments.registry()) == [experiment.name for experiment in EXPERIMENTS]


def test_every_claim_is_decided_by_an_experiment():
    decided = {claim for experiment in EXPERIMENTS for claim in experiment.claims}
    assert decided == set(CLAIMS)
    for claim in CLAIMS.values():
        assert all(field for field in claim)
        assert any("\u4e00" <= character <= "\u9fff" for character in claim.chinese)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_experiment_is_complete(experiment):
    for scale in (QUICK, FULL):
        arms = experiment.arms(scale)
        assert len(arms) >= 2
        # Settings tell arms apart, and survive JSON.
        texts = [json.dumps(item, sort_keys=True, allow_nan=False) for item in arms.values()]
        assert len(set(texts)) == len(texts)
        assert [json.loads(text) for text in texts] == [dict(item) for item in arms.values()]
        results = made_up(experiment, scale)
        contrasts = experiment.contrasts(results)
        assert {claim for item in contrasts for claim in item.claims} == set(experiment.claims)
        assert len({item.name for item in contrasts}) == len(contrasts)
        for item in contrasts:
            assert set(item.anchors) <= set(ANCHORS)
            assert set(item.says) <= {"higher", "lower", "same", "open"}
            assert "same" not in {*item.says, *item.anchors.values()} or item.margin is not None
            for sentence in item.says.values():
                assert "{effect}" in sentence or "{size}" in sentence, sentence
                # Words that have a direction already.
                assert not re.search(r"costs? \{effect}|(more|less)\b.*by \{effect}", sentence)
            for outcomes in item.claims.values():
                assert "open" not in outcomes, "what is open decides nothing"
                assert "same" not in outcomes or item.margin is not None


def test_every_anchor_is_repeated():
    repeated = {
        anchor
        for experiment in EXPERIMENTS
        for contrast in experiment.contrasts(made_up(experiment))
        for anchor in contrast.anchors
    }
    assert repeated == set(ANCHORS)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_runs_are_pure_functions(experiment, digits):
    # The first and the last arm, shrunk: twice the same, and other seeds differ.
    arms = list(experiment.arms(QUICK).items())
    for label, settings in {arms[0][0]: arms[0][1], arms[-1][0]: arms[-1][1]}.items():
        small = {**settings, "train": 100, "validation": 40, "test": 100, "epochs": 2}
        job = runner.Job("", experiment.name, label, 3, small)
        metrics, seconds = runner.measure(job, digits)
        again, _ = runner.measure(job, digits)
        for found in (metrics, again):
            found.pop("milliseconds", None)
        assert metrics == again
        assert seconds > 0
        json.dumps(metrics, allow_nan=False)
        assert 0 <= metrics["test_accuracy"] <= 100
        other, _ = runner.measure(runner.Job("", experiment.name, label, 4, small), digits)
        assert other != metrics


# -- data and parts ----------------------------------------------------------------------
def test_split_of_digits_is_new_for_each_seed_and_disjoint(digits):
    sizes = {"train": 1000, "validation": 200, "test": 597}
    one, again, other = (training.split(digits, sizes, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.x_train, again.x_train)
    assert not np.array_equal(one.x_train, other.x_train)
    parts = (one.x_train, one.x_validation, one.x_test)
    assert [len(part) for part in parts] == [1000, 200, 597]
    # All 1797 digits, each once.
    everything = np.concatenate([digits.x_train, digits.x_test]).reshape(1797, -1)
    assert abs(one.x_train.mean()) < 1e-3
    together = np.concatenate(parts).reshape(1797, -1)
    assert len(np.unique(together, axis=0)) == len(np.unique(everything, axis=0))


def test_split_keeps_a_users_test_part_apart():
    x = np.arange(60, dtype=np.float32).reshape(60, 1)
    y = np.arange(60) % 2
    dataset = data.Dataset("npz:mine", x[:40], y[:40], x[40:], y[40:], 2)
    split = training.split(dataset, {"train": 100, "validation": 100, "test": 100}, 0)
    # Too few for all: each part gets its share.
    assert (len(split.x_train), len(split.x_validation), len(split.x_test)) == (20, 20, 20)
    assert split.x_test.min() > max(split.x_train.max(), split.x_validation.max())


def test_arms_of_a_seed_begin_with_the_same_weights():
    plain = networks.mlp((1, 8, 8), 10, [16, 16], networks.plain)
    normed = networks.mlp((1, 8, 8), 10, [16, 16], networks.batch_norm)
    training.initialize(plain, 5)
    training.initialize(normed, 5, scale=2.0)
    a, b = ([m for m in model if isinstance(m, nn.Linear)] for model in (plain, normed))
    for index, (one, two) in enumerate(zip(a, b, strict=True)):
        factor = 2 if index < 2 else 1
        np.testing.assert_allclose(two.weight.data, factor * one.weight.data, rtol=1e-6)


def test_batches_by_class_hold_one_class(digits):
    split = training.split(digits, {"train": 500, "validation": 10, "test": 10}, 0)
    mixed = 0
    seen = []
    for x, y in training._by_class(split, 10, seed=0, epoch=0):
        mixed += len(np.unique(y)) > 1
        seen.append(x)
    assert mixed <= 9  # where one class ends and the next begins
    assert len(np.concatenate(seen)) == 500


def test_group_norm_is_its_definition_and_its_gradient():
    rng = np.random.default_rng(0)
    layer = networks.GroupNorm(6, groups=3)
    layer.weight = Parameter(rng.normal(1, 0.2, 6))
    layer.bias = Parameter(rng.normal(size=6))
    for shape in ((5, 6), (2, 6, 3, 2)):
        x = rng.normal(2, 3, shape)
        groups = x.reshape(shape[0], 3, -1)
        n = groups - groups.mean(axis=2, keepdims=True)
        n /= np.sqrt(groups.var(axis=2, keepdims=True) + 1e-5)
        channels = (1, 6, *[1] * (x.ndim - 2))
        expected = n.reshape(shape) * layer.weight.data.reshape(channels)
        expected += layer.bias.data.reshape(channels)
        np.testing.assert_allclose(layer(x), expected, rtol=1e-9, atol=1e-9)
        gradcheck(layer, x)


def test_detached_batch_norm_takes_the_statistics_for_constants():
    rng = np.random.default_rng(0)
    x, grad = rng.normal(1, 2, (2, 8, 3)).astype(np.float32)
    layer, exact = (
        networks.DetachedBatchNorm(3, activation="relu"),
        nn.BatchNorm(3, activation="relu"),
    )
    for norm in (layer, exact):
        norm.weight.data[...] = [1, 2, -1]
    y, backward = layer.forward(x)
    y_exact, backward_exact = exact.forward(x)
    np.testing.assert_array_equal(y, y_exact)
    expected = grad * (y > 0) * [1, 2, -1] / np.sqrt(x.var(axis=0) + 1e-5)
    np.testing.assert_allclose(backward(grad), expected, rtol=1e-5)
    backward_exact(grad)
    np.testing.assert_array_equal(layer.weight.grad, exact.weight.grad)
    np.testing.assert_array_equal(layer.bias.grad, exact.bias.grad)


def test_step_noise_is_of_training_and_differentiable():
    x = np.random.default_rng(0).normal(size=(4, 3))
    layer = networks.StepNoise(0)
    first, second = layer.forward(x)[0], layer.forward(x)[0]
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(layer(x), x)
    gradcheck(layer, x, before=lambda: layer.__init__(0))
    layer.eval()
    np.testing.assert_array_equal(layer.forward(x)[0], x)


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    rng = np.random.default_rng(0)
    y, predicted = rng.integers(0, 5, (2, 200))
    predicted[predicted == 3] = 0  # a class that is never predicted
    expected = 100 * metrics.f1_score(y, predicted, average="macro", zero_division=0)
    assert training.macro_f1(y, predicted, 5) == pytest.approx(expected)
    # Confidence 0.9, right 3 times of 4; confidence 0.6, right every time.
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 4)
    labels = np.array([0, 0, 0, 1, 0, 0, 0, 0])
    assert training.calibration_error(probabilities, labels) == pytest.approx((0.15 + 0.4) / 2)


def test_a_run_that_diverges_has_figures(digits):
    split = training.split(digits, {"train": 100, "validation": 20, "test": 50}, 0)
    model = networks.mlp(split.input_shape, 10, [16], networks.plain)
    fit, found = training.trained(model, split, {"lr": 1e30, "epochs": 3}, 0)
    assert fit.diverged
    assert found["diverged"] == 1
    assert found["test_loss"] is None
    assert 0 <= found["test_accuracy"] < 50


# -- judging -----------------------------------------------------------------------------
ONE_SIDE = np.array([1.0, 1.2, 0.9, 1.1, 1.3, 1.0])
TINY = np.array([0.05, -0.02, 0.03, -0.04, 0.01, 0.02])
NOISE = np.array([3.0, -2.0, 1.0, -4.0, 2.5, 0.3])
READ = {"higher": "supported", "lower": "refuted", "same": "refined"}


@pytest.mark.parametrize(
    ("values", "margin", "outcome", "verdict"),
    [
        (ONE_SIDE, None, "higher", "supported"),
        (-ONE_SIDE, None, "lower", "refuted"),
        (ONE_SIDE, 0.5, "higher", "supported"),
        (ONE_SIDE, 5.0, "same", "refined"),  # a difference, but none that matters
        (TINY, 0.5, "same", "refined"),
        (TINY, None, "open", "inconclusive"),
        (NOISE, 0.5, "open", "inconclusive"),
        (NOISE, None, "open", "inconclusive"),
        (np.zeros(6), 0.5, "same", "refined"),
        (np.array([*ONE_SIDE[:5], np.nan]), 0.5, "open", "inconclusive"),
    ],
)
def test_verdicts_of_one_contrast(values, margin, outcome, verdict):
    (judged,) = judge([Contrast("c", values, margin=margin, claims={"L7": READ})])
    assert judged.outcome == outcome
    assert judged.verdict("L7") == verdict


def test_one_seed_on_the_other_side_is_no_difference_with_six():
    # The t-test would call it one; of the flips of signs, too many are as far.
    values = np.array([1.0, 1.1, 1.0, 0.9, 1.0, -0.05])
    (judged,) = judge([Contrast("c", values)])
    assert judged.difference.p_t < 0.05 < judged.difference.p_sign_flip
    assert judged.outcome == "open"


def test_holm_is_over_the_contrasts_of_the_experiment():
    weak = Contrast("weak", np.array([1.0, 0.4, 1.8, 0.3, 2.0, 0.2]))
    assert judge([weak])[0].outcome == "higher"
    family = judge([weak, *(Contrast(f"{i}", NOISE) for i in range(9))])
    assert family[0].outcome == "open"
    assert family[0].p_holm == pytest.approx(10 * family[0].difference.p_t)


def test_ratios_are_tested_as_logarithms():
    a = np.array([2.0, 2.2, 1.9, 2.1, 2.0, 2.3])
    (judged,) = judge([Contrast("c", a, np.ones(6), unit="times", margin=1.1)])
    middle, low, high = judged.figures
    assert middle == pytest.approx(np.exp(np.log(a).mean()))
    assert low < middle < high
    assert judged.outcome == "higher"
    assert judged.effect == judged.size == "2.08 times [1.93, 2.24]"
    (zero,) = judge([Contrast("c", np.zeros(6), np.ones(6), unit="times")])
    assert zero.outcome == "open"
    assert math.isnan(zero.figures[0])


def test_sentences_carry_their_figures_or_are_not_said():
    says = {"higher": "It helps by {effect}.", "lower": "It costs {size}."}
    helps, nothing, costs = judge(
        [
            Contrast(name, values, says=says)
            for name, values in (("a", ONE_SIDE), ("b", NOISE), ("c", -ONE_SIDE))
        ]
    )
    assert helps.sentence == "It helps by +1.08 points [+0.93, +1.24]."
    assert nothing.sentence is None
    assert costs.effect == "\N{MINUS SIGN}1.08 points [\N{MINUS SIGN}1.24, \N{MINUS SIGN}0.93]"
    assert costs.sentence == "It costs 1.08 points [0.93, 1.24]."


@pytest.mark.parametrize(
    ("factors", "effect"),
    [
        ([0.999, 1.001, 1.0, 1.0], "1.000 times [0.999, 1.001]"),
        ([3.0, 9.0, 7.0, 12.0], "6.9 times [2.7, 17.9]"),
        ([200.0, 400.0, 250.0, 300.0], "278 times [175, 444]"),
        ([0.25] * 4, "0.25 times [0.25, 0.25]"),
    ],
)
def test_figures_have_the_digits_that_their_interval_has(factors, effect):
    (judged,) = judge([Contrast("c", np.array(factors), np.ones(4), unit="times")])
    assert judged.effect == effect


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "inconclusive"),
        (["inconclusive"], "inconclusive"),
        (["supported", "inconclusive"], "supported"),
        (["refuted", "refuted"], "refuted"),
        (["supported", "refuted"], "refined"),
        (["refined", "supported", "inconclusive"], "refined"),
    ],
)
def test_verdict_from_several_contrasts(verdicts, expected):
    assert combined(verdicts) == expected


def test_the_learning_rate_is_chosen_on_validation_data():
    def arm(label, lr, validation, test):
        runs = [{"validation_accuracy": validation, "test_accuracy": test}] * 2
        return Arm(label, {"norm": "batch", "lr": lr}, runs)

    broken = Arm("c", {"norm": "batch", "lr": 3}, [{"validation_accuracy": None}] * 2)
    results = Results([arm("a", 1, 90, 99), arm("b", 2, 91, 50), broken], [0, 1])
    assert results.best(norm="batch").label == "b"
    with pytest.raises(KeyError, match="expected arms"):
        results.best(norm="group")
    with pytest.raises(KeyError, match="expected one arm"):
        results.arm(norm="batch")


# -- the report --------------------------------------------------------------------------
class Page(HTMLParser):
    """Tags that stay open, everything that is referred to, and all text."""

    # No end tag, or none needed.
    VOID = frozenset({"meta", "br", "link", "img", "input", "hr", "th"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def whole_study(digits):
    """All experiments with figures that were made up."""
    records = [
        {
            "key": f"{experiment.name}{number}{seed}",
            "experiment": experiment.name,
            "arm": label,
            "seed": seed,
            "settings": settings,
            "data": digits.digest,
            "version": "v",
            "metrics": Anything([number, seed]),
            "seconds": 0.5,
        }
        for experiment in EXPERIMENTS
        for number, (label, settings) in enumerate(experiment.arms(QUICK).items())
        for seed in range(6)
    ]
    return report.study(EXPERIMENTS, records, digits, QUICK, "bnext study --quick <&>")


@pytest.fixture(scope="module")
def written(whole_study, tmp_path_factory):
    return report.write(whole_study, tmp_path_factory.mktemp("study")).parent


def test_report_is_one_page_that_needs_nothing_else(written):
    text = (written / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text.replace("url(#", "")
    assert page.links
    assert [link for link in page.links if not link.startswith("#")] == []
    assert {link[1:] for link in page.links} <= page.ids
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "bnext study --quick &lt;&amp;&gt;" in text
    assert text.count("<svg") == len(EXPERIMENTS)
    for claim in CLAIMS.values():
        assert claim.chinese in page.text
        assert claim.english in page.text
    for experiment in EXPERIMENTS:
        assert experiment.question in page.text
        assert f"--only {experiment.name}" in page.text
    for anchor in ANCHORS.values():
        assert anchor.result in page.text
    # Nothing on the first page without its interval.
    answers = text[text.index('<section class="answer">') : text.index("</section>")]
    for item in answers.split("<li>")[1:]:
        assert 'class="figure"' in item
        assert "[" in item


def test_data_files_of_the_report(whole_study, written):
    with open(written / "runs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(whole_study.records)
    first = whole_study.records[0]
    assert float(rows[0]["test_accuracy"]) == pytest.approx(
        first["metrics"]["test_accuracy"], rel=1e-5
    )
    found = json.loads((written / "results.json").read_text("utf-8"))
    assert list(found["experiments"]) == [experiment.name for experiment in EXPERIMENTS]
    for name, claim in found["claims"].items():
        assert claim["here"] == whole_study.verdict(name)
        assert claim["here"] in ("supported", "refined", "refuted", "inconclusive")


def test_report_of_some_experiments_says_what_was_not_run(digits):
    experiment = experiments.registry()["depth"]
    records = [
        {
            "key": f"{number}{seed}",
            "experiment": "depth",
            "arm": label,
            "seed": seed,
            "settings": settings,
            "data": digits.digest,
            "version": "v",
            "metrics": Anything([number, seed]),
            "seconds": 0.5,
        }
        for number, (label, settings) in enumerate(experiment.arms(QUICK).items())
        for seed in range(6)
    ]
    study = report.study([experiment], records, digits, QUICK)
    assert study.verdict("L65") is None
    assert study.verdict("L25c") is not None
    assert "not run" in Page(report.page(study)).text


def test_equal_results_give_equal_bytes():
    experiment = experiments.registry()["depth"]
    drawn = [plots.svg(experiment, made_up(experiment)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert "currentColor" in drawn[0]
