"""`bnext.compare` and `bnext.advise`: pairing, statistics, sentences, the command."""

import doctest
import json
import re

import numpy as np
import pytest

import bnext
from bnext import cli, comparison, data, models, nn, random
from bnext.comparison import Variant

stats = pytest.importorskip("scipy.stats", reason="bnext.compare needs SciPy")

X, Y = np.zeros((20, 3), np.float32), np.arange(20) % 2
NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def generators(restore_threads):
    bnext.set_num_threads(1)
    before = random.default_generator.state, random._initial_rng
    yield
    random.default_generator.state, random._initial_rng = before


def blobs(n=240, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(n, 6)) + 2 * np.eye(6)[y]
    return x.astype(np.float32), y


def mlp(norm="batch", dropout=0.0):
    return lambda: models.build("mlp", (6,), 3, norm=norm, dropout=dropout, depth=1, width=8)


def scored(scores, **options):
    """A comparison whose results are given."""
    seeds = list(range(len(next(iter(scores.values())))))
    return bnext.compare(
        {name: lambda name=name: name for name in scores},
        (X, Y),
        seeds=seeds,
        train=lambda name, dataset, seed: scores[name][seed],
        **options,
    )


BASE = [95.0, 94.5, 95.2, 94.8, 95.1, 94.9]


# -- pairing ---------------------------------------------------------------------------
def test_all_variants_see_the_same_split_weights_and_dropout():
    seen = {}

    def train(model, dataset, seed):
        weights = model[1].weight.data if hasattr(model[1], "weight") else None
        mask = nn.Dropout(0.5).forward(np.ones((3, 3), np.float32))[0]
        seen.setdefault(seed, []).append((dataset, weights.tobytes(), mask.tobytes()))
        return 1.0 + seed

    bnext.compare({name: mlp() for name in NAMES}, blobs(), seeds=3, train=train)
    splits = set()
    for seed, runs in seen.items():
        assert len(runs) == 3, seed
        assert len({run[1:] for run in runs}) == 1
        assert len({run[0].digest for run in runs}) == 1
        splits.add(runs[0][0].digest)
    assert len(splits) == 3
    assert len({runs[0][1] for runs in seen.values()}) == 3


def test_splits_are_of_all_samples():
    x, y = blobs(100)
    x[:, 0] = np.arange(100)

    def train(model, dataset, seed):
        every = np.concatenate([dataset.x_train[:, 0], dataset.x_test[:, 0]])
        assert sorted(every) == list(range(100))
        assert len(dataset.x_test) == 20
        assert dataset.num_classes == 3
        return 0.0

    bnext.compare({"a": mlp(), "b": mlp()}, (x, y), seeds=2, train=train)


def test_a_split_that_is_given_stays():
    x, y = blobs(60)
    dataset = data.Dataset("here", x[:40], y[:40], x[40:], y[40:], 3)
    seen = []
    bnext.compare(
        {"a": mlp(), "b": mlp()},
        dataset,
        seeds=2,
        train=lambda model, dataset, seed: float(len(seen)) + bool(seen.append(dataset)),
    )
    assert all(one is dataset for one in seen)
    assert len(seen) == 4


def test_equal_variants_give_the_same_result():
    result = bnext.compare({"a": mlp(), "b": mlp()}, blobs(), seeds=3, epochs=2)
    assert result.scores["a"] == result.scores["b"]
    assert result.sentences == ['"b" and "a" gave the same result with each of 3 seeds.']
    assert not result.differences[0].shown


def test_training_is_repeatable_and_leaves_the_generators_alone():
    random.manual_seed(5)
    before = random.default_generator.state, random.initial_rng().bit_generator.state
    results = [
        bnext.compare({"a": mlp(), "b": mlp(dropout=0.3)}, blobs(), seeds=[4, 7], epochs=1)
        for _ in range(2)
    ]
    assert results[0].to_json() == results[1].to_json()
    assert results[0].seeds == [4, 7]
    after = random.default_generator.state, random.initial_rng().bit_generator.state
    assert after == before


def test_one_seed_is_what_the_trainer_gives():
    from bnext import optim, schedules, train

    x, y = blobs()
    dataset = data.Dataset("here", x[:200], y[:200], x[200:], y[200:], 3)
    options = {"epochs": 2, "batch_size": 32, "lr": 0.1, "weight_decay": 0.01}
    result = bnext.compare({"a": mlp(), "b": mlp("none")}, dataset, seeds=[0, 3], **options)
    random.manual_seed(3)
    model = mlp("none")()
    steps = data.num_batches(200, 32)
    trainer = train.Trainer(
        model,
        optim.SGD(model.named_parameters(), 0.1, momentum=0.9, weight_decay=0.01),
        schedules.build("cosine", 0.1, epochs=2, steps_per_epoch=steps, warmup_epochs=1),
        dataset,
        batch_size=32,
        seed=3,
        normalizer=data.Normalizer.fit(dataset.x_train),
        log=lambda line: None,
    )
    assert result.scores["b"][1] == 100 * trainer.fit(2)[-1]["test_accuracy"]


def test_variants_may_have_options_of_their_own():
    x, y = blobs()
    plain = bnext.compare({"a": mlp(), "b": mlp()}, (x, y), seeds=2, epochs=3, lr=0.1)
    same = bnext.compare(
        {"a": mlp(), "b": Variant(mlp(), epochs=3, lr=0.1)}, (x, y), seeds=2, epochs=3, lr=0.1
    )
    other = bnext.compare(
        {"a": mlp(), "b": Variant(mlp(), lr=0.0001)}, (x, y), seeds=2, epochs=3, lr=0.1
    )
    assert same.scores == plain.scores
    assert other.scores["a"] == plain.scores["a"]
    assert np.mean(other.scores["b"]) < np.mean(plain.scores["b"])


def test_each_variant_gets_the_best_learning_rate_on_held_out_data():
    lines = []
    result = bnext.compare(
        {"a": mlp(), "b": Variant(mlp(), lr=0.02)},
        blobs(),
        seeds=2,
        epochs=2,
        lr=[1e-5, 0.1],
        log=lines.append,
    )
    assert result.lr == {"a": 0.1, "b": 0.02}
    assert [line.partition(":")[0] for line in lines[:2]] == ["a", "a"]
    assert sum("held-out" in line for line in lines) == 2


# -- statistics and words --------------------------------------------------------------
def test_difference_is_the_paired_t_test():
    other = [96.5, 96.0, 96.9, 96.1, 96.8, 96.2]
    result = scored({"a": BASE, "b": other})
    (one,) = result.differences
    test = stats.ttest_rel(other, BASE)
    interval = test.confidence_interval(0.95)
    assert one.paired.mean == pytest.approx(np.mean(np.subtract(other, BASE)))
    assert (one.paired.low, one.paired.high) == pytest.approx((interval.low, interval.high))
    assert one.p_holm == pytest.approx(test.pvalue)
    assert one.paired.p_sign_flip == 2 / 64
    assert one.shown
    assert one.sentence == (
        f'"b" is better than "a" by {one.paired.mean:.2f} points (95 % interval '
        f"{interval.low:.2f} to {interval.high:.2f}, 6 seeds, p = {test.pvalue:.3g})."
    )


def test_what_is_worse_and_what_lower_is_better_for():
    other = [value - 2 for value in BASE[:5]] + [BASE[5] - 2.5]
    (sentence,) = scored({"a": BASE, "b": other}).sentences
    assert '"b" is worse than "a" by 2.08 points (95 % interval 1.87 to 2.30' in sentence
    (sentence,) = scored({"a": BASE, "b": other}, higher_is_better=False, unit="ms").sentences
    assert '"b" is better than "a" by 2.08 ms' in sentence


def test_no_difference_is_said_with_its_bound():
    other = [95.2, 94.4, 95.1, 95.0, 94.9, 95.0]
    result = scored({"a": BASE, "b": other})
    (one,) = result.differences
    assert not one.shown
    bound = one.paired.bound
    match = re.fullmatch(
        r'Between "b" and "a" no difference larger than ([\d.]+) points could be shown with '
        r"6 seeds \(mean .*\)\.",
        one.sentence,
    )
    assert bound <= float(match[1]) <= bound * 1.1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.294, "0.3"), (0.3, "0.3"), (0.31, "0.31"), (0.0712, "0.072")),
        *((2.34, "2.4"), (12.3, "13"), (100, "100"), (123, "130"), (0.999, "1")),
    ],
)
def test_bounds_are_rounded_up(value, text):
    assert comparison._rounded_up(value) == text


def test_fewer_than_six_seeds_show_nothing():
    other = [value + 10 for value in BASE[:4]] + [BASE[4] + 10.1]
    (one,) = scored({"a": BASE[:5], "b": other}).differences
    assert one.p_holm < 1e-6
    assert not one.shown
    assert one.sentence.endswith("Fewer than 6 seeds cannot show any.")


def test_several_variants_are_corrected_by_holm():
    rng = np.random.default_rng(0)
    scores = {"a": BASE} | {
        name: list(np.add(BASE, rng.normal(shift, 0.3, 6)))
        for name, shift in (("b", 0.2), ("c", 0.5), ("d", 0))
    }
    result = scored(scores)
    p = [stats.ttest_rel(scores[name], BASE).pvalue for name in "bcd"]
    order = np.argsort(p)
    expected, largest = [0.0] * 3, 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (3 - rank) * p[index]))
        expected[index] = largest
    assert [one.p_holm for one in result.differences] == pytest.approx(expected)


def test_equivalence():
    other = [
        value + delta for value, delta in zip(BASE, [0.1, -0.1, 0, 0.05, -0.1, 0.1], strict=True)
    ]
    (one,) = scored({"a": BASE, "b": other}, margin=0.5).differences
    values = np.subtract(other, BASE)
    expected = max(
        stats.ttest_1samp(values, -0.5, alternative="greater").pvalue,
        stats.ttest_1samp(values, 0.5, alternative="less").pvalue,
    )
    assert one.p_equivalent == pytest.approx(expected)
    assert "They are equivalent within 0.5 points" in one.sentence
    (one,) = scored({"a": BASE, "b": other}, margin=0.01).differences
    assert "They have not been shown to be equivalent within 0.01 points" in one.sentence


def test_text_and_json():
    result = scored({"a": BASE, "b": [value + 1 for value in BASE], "c": BASE[::-1]}, margin=1)
    text = " ".join(str(result).split())
    for sentence in result.sentences:
        assert sentence in text
    for name in "abc":
        assert f"{np.mean(result.scores[name]):.4g}" in text
    document = json.loads(result.to_json())
    assert document["version"] == 1
    assert document["scores"] == result.scores
    assert [one["name"] for one in document["differences"]] == ["b", "c"]
    assert [one["sentence"] for one in document["differences"]] == result.sentences


# -- advise ----------------------------------------------------------------------------
def test_advice_begins_with_what_is_critical():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm(8), nn.ReLU(), nn.Dropout(0.7), nn.BatchNorm(8)
    )
    report = bnext.doctor(model, input_shape=(6,), dataset_size=640)
    text = bnext.advise(report, scored({"a": BASE, "b": BASE[::-1]}))
    lines = text.replace("\n  ", " ").splitlines()
    assert [line[:12] for line in lines] == ["- Critical: ", "- Bias witho", '- Between "b']
    assert "('4', BNX105)" in lines[0]
    assert report.findings[0].advice in lines[1]
    assert max(map(len, text.splitlines())) <= 100


def test_advice_without_findings_says_what_was_not_checked():
    report = bnext.doctor(nn.BatchNorm(6), input_shape=(6,), dataset_size=640)
    text = bnext.advise(report).replace("\n  ", " ")
    assert text.startswith("- No findings; not checked: BNX201, ")


def test_advise_wants_results():
    for arguments in ((), ("report",)):
        with pytest.raises(TypeError, match="advise: results: expected a Report or Comparison"):
            bnext.advise(*arguments)


# -- wrong calls -----------------------------------------------------------------------
TWO = {"a": mlp(), "b": mlp()}


@pytest.mark.parametrize(
    ("variants", "given", "options", "kind", "message"),
    [
        ({"a": mlp()}, (X, Y), {}, ValueError, "a mapping of 2 or more, got 1"),
        ([mlp(), mlp()], (X, Y), {}, ValueError, "got list"),
        ({"a": mlp(), "b": mlp()()}, (X, Y), {}, TypeError, "b: expected a factory"),
        ({"a": mlp(), "b": 3}, (X, Y), {}, TypeError, "b: expected a factory"),
        (TWO, (X, Y), {"seeds": 1}, ValueError, "seeds: expected 2 or more, got 1"),
        (TWO, (X, Y), {"seeds": [1, 1]}, ValueError, "seeds: expected different ones"),
        (TWO, (X, Y), {"lr": 0}, ValueError, "lr: expected finite numbers > 0"),
        (TWO, (X, Y), {"lr": []}, ValueError, "lr: expected finite numbers > 0"),
        (TWO, (X, Y), {"epochs": 0}, ValueError, "epochs: expected 1 or more"),
        (TWO, (X, Y), {"batch_size": 1}, ValueError, "batch_size: expected 2 or more"),
        (TWO, (X, Y), {"weight_decay": -1}, ValueError, "weight_decay: expected a finite"),
        (TWO, (X, Y), {"margin": 0}, ValueError, "margin: expected a finite number > 0"),
        (TWO, (X, Y), {"confidence": 1}, ValueError, "confidence: expected a number in (0, 1)"),
        (TWO, X, {}, TypeError, "data: expected a Dataset, a str or (x, y)"),
        (TWO, (X, Y[:3]), {}, ValueError, "y: expected 20 integers"),
        (TWO, (X, Y / 2), {}, ValueError, "y: expected 20 integers"),
        (TWO, (X[:5], Y[:5]), {}, ValueError, "expected 10 or more samples"),
        (TWO, "nowhere", {}, data.DataError, "unknown data set 'nowhere'"),
        (TWO, (X, Y), {"train": lambda *_: np.nan}, ValueError, "a: seed 0: the score is nan"),
        (
            {"a": mlp(), "b": object},
            blobs(),
            {"epochs": 1},
            TypeError,
            "expected a bnext.nn.Module",
        ),
    ],
)
def test_wrong_calls(variants, given, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        bnext.compare(variants, given, **options)


def test_wrong_variant():
    with pytest.raises(ValueError, match="Variant: seed: expected one of lr, epochs"):
        Variant(mlp(), seed=3)


# -- the command -----------------------------------------------------------------------
@pytest.fixture
def spec(tmp_path):
    x, y = blobs(300)
    path = tmp_path / "blobs.npz"
    np.savez(path, x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    return f"npz:{path}"


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command(capsys, spec):
    small = "depth=1,width=8"
    arguments = [f"plain=mlp:norm=none,{small}", f"mlp:{small}", "--data", spec]
    arguments += ["--seeds", 2, "--epochs", 1, "--lr", 0.01, 0.1, "--margin", 5]
    status, out, err = run(capsys, "compare", *arguments)
    assert status == 0
    rows = [line.split()[0] for line in out.splitlines()[1:3]]
    assert rows == ["plain", f"mlp:{small}"]
    assert " 2 seeds" in " ".join(out.split())
    assert err.count("\n") == 2 * 2 + 2 * 2  # a line for each training or rate
    status, out, _ = run(capsys, "compare", *arguments, "--json")
    assert status == 0
    document = json.loads(out)
    assert list(document["scores"]) == ["plain", f"mlp:{small}"]
    assert document["seeds"] == [0, 1]
    assert set(document["lr"].values()) <= {0.01, 0.1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mlp"], "2 or more, got 1"),
        (["mlp", "mlp"], "'mlp' appears twice; LABEL=MODEL"),
        (["mlp", "vgg"], "expected one of mlp, cnn, resnet, got 'vgg'"),
        (["mlp", "cnn"], "cnn expects images"),
        (["mlp", "b=mlp:norm=layer"], "norm: expected one of batch, none"),
        (["mlp", "b=mlp:depth"], "expected OPTION=VALUE"),
        (["mlp", "b=mlp", "--seeds", "1"], "--seeds"),
    ],
)
def test_wrong_commands(capsys, spec, arguments, message):
    status, out, err = run(capsys, "compare", *arguments, "--data", spec)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_examples_of_docstrings():
    assert doctest.testmod(comparison).failed == 0
