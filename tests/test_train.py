"""Training: it learns, resumes bit for bit, and says what is wrong before it starts."""

import csv
import dataclasses
import re
import struct
import sys

import numpy as np
import pytest

import bnext
from bnext import checkpoint, data, models, nn, schedules
from bnext.checkpoint import CheckpointError
from bnext.losses import softmax_cross_entropy
from bnext.optim import SGD, Adam
from bnext.random import default_generator
from bnext.scaling import BatchNormScaling
from bnext.train import (
    COLUMNS,
    Metrics,
    NonFiniteLossError,
    Snapshot,
    Trainer,
    evaluate,
    plot_history,
)

for _module in ("safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_module, reason="pip install bnext[train]")

EPOCHS = 4
CLASSES = 3
BATCH = 20


def dataset(n=61, n_test=30, shape=(1, 6, 6), noise=0.7, seed=0):
    """One picture for each class, with noise."""
    rng = np.random.default_rng(seed)
    pictures = rng.normal(2, 1, (CLASSES, *shape))

    def split(n):
        y = np.arange(n) % CLASSES
        return (pictures[y] + rng.normal(0, noise, (n, *shape))).astype(np.float32), y

    return data.Dataset("synthetic", *split(n), *split(n_test), CLASSES)


DATA = dataset()


def adam(model):
    return Adam(model.named_parameters(), weight_decay=1e-3)


def sgd(model):
    return SGD(model.named_parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def scaled(model):
    scaling = BatchNormScaling(model, 0.7, ref=2, divide_by_weight=True)
    return SGD(model.named_parameters(), 0.1, momentum=0.9, scaling=scaling, max_norm=1)


def schedule(step):
    return schedules.build("cosine", 0.02, epochs=EPOCHS, steps_per_epoch=3, warmup_epochs=1)(step)


def trainer(dataset=DATA, *, seed=0, optimizer=adam, schedule=schedule, model=None, **options):
    bnext.manual_seed(seed)
    model = model or models.build(
        "cnn",
        dataset.input_shape,
        CLASSES,
        depth=1,
        width=4,
        dropout=0.2,
        dropout_position="after-activation",
    )
    options = {"batch_size": BATCH, "progress": False, "log": lambda line: None, **options}
    return Trainer(model, optimizer(model), schedule, dataset, seed=seed, **options)


def normalizer():
    return data.Normalizer.fit(DATA.x_train)


def bits(value):
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [bits(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value


def state(trained):
    """Everything that a checkpoint holds, except times, in a form that `==` compares exactly."""
    return bits(dataclasses.asdict(trained.snapshot()))


def last(folder):
    return Snapshot.load(folder / "last.safetensors")


def finished(**options):
    trained = trainer(**options)
    trained.fit(EPOCHS)
    return state(trained)


def unchanging():
    """A model that a rate of 0 leaves as it is."""
    return models.build("mlp", (1, 6, 6), CLASSES, norm="none", depth=1, width=4)


# Learning and what it leaves behind


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_it_learns(optimizer):
    images = dataset(n=300)
    bnext.manual_seed(0)
    learning = trainer(
        images,
        model=models.build("cnn", images.input_shape, CLASSES, depth=1, width=16, dropout=0.2),
        optimizer=optimizer,
        schedule=lambda step: 0.03,
        normalizer=data.Normalizer.fit(images.x_train),
    )
    history = learning.fit(6)
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    for split in ("train", "test"):
        assert history[-1][f"{split}_loss"] < 0.5 * history[0][f"{split}_loss"]
        assert history[-1][f"{split}_accuracy"] > 0.9
    metrics = learning.evaluate()
    assert metrics == Metrics(history[-1]["test_loss"], history[-1]["test_accuracy"])


def test_files(tmp_path):
    out = tmp_path / "runs" / "first"
    lines = []
    trained = trainer(out=out, config={"a": [1, None]}, normalizer=normalizer(), log=lines.append)
    history = trained.fit(EPOCHS)
    assert sorted(file.name for file in out.iterdir()) == [
        "best.safetensors",
        "curves.png",
        "last.safetensors",
        "metrics.csv",
    ]

    with open(out / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert [[float(cell) for cell in row] for row in rows] == [list(r.values()) for r in history]
    assert all(tuple(record) == COLUMNS for record in history)

    assert bits(dataclasses.asdict(last(out))) == state(trained)
    assert last(out).config == {"a": [1, None]}
    assert last(out).dataset == {
        "name": "synthetic",
        "digest": DATA.digest,
        "input_shape": [1, 6, 6],
        "num_classes": CLASSES,
    }

    accuracies = [record["test_accuracy"] for record in history]
    best = Snapshot.load(out / "best.safetensors")
    assert len(best.history) == 1 + int(np.argmax(accuracies))
    model = trainer().model
    best.restore_model(model)
    assert evaluate(
        model, DATA.x_test, DATA.y_test, batch_size=BATCH, normalizer=best.normalizer
    ) == Metrics(best.history[-1]["test_loss"], max(accuracies))

    assert len(lines) == EPOCHS
    assert all(f"epoch {i}/{EPOCHS}" in line for i, line in enumerate(lines, 1))
    assert f"accuracy {accuracies[-1]:.2%}" in lines[-1]


def test_the_best_is_the_first_of_equals(tmp_path):
    trainer(out=tmp_path, model=unchanging(), schedule=lambda step: 0.0).fit(2)
    assert len(Snapshot.load(tmp_path / "best.safetensors").history) == 1


def assert_is_png(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1200, 504)


@pytest.mark.parametrize("epochs", [1, 3])
def test_curves(tmp_path, epochs):
    record = dict.fromkeys(COLUMNS, 0.5)
    history = [{**record, "epoch": epoch + 1} for epoch in range(epochs)]
    plot_history(history, tmp_path / "curves.png", title="run")
    assert_is_png(tmp_path / "curves.png")


def test_curves_of_a_run(tmp_path):
    trainer(out=tmp_path).fit(1)
    assert_is_png(tmp_path / "curves.png")


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    trainer().fit(1)
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_sets_the_rate_of_every_step():
    asked = []

    def recording(step):
        asked.append(step)
        return 0.001 * (step + 1)

    history = trainer(schedule=recording).fit(2)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert [record["lr"] for record in history] == [0.003, 0.006]


def test_the_default_log_is_print(capsys):
    bnext.manual_seed(0)
    model = models.build("mlp", (1, 6, 6), CLASSES, depth=1, width=4)
    Trainer(model, sgd(model), schedule, DATA).fit(1)
    captured = capsys.readouterr()
    assert captured.out.startswith("epoch 1/1  lr ")
    assert captured.out.count("\n") == 1
    assert captured.err == ""


# Exact resume


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("augment", [None, data.Augment(crop=1, flip=True)])
@pytest.mark.parametrize("optimizer", [adam, sgd, scaled])
def test_resume_is_bit_for_bit(tmp_path, optimizer, augment, stop):
    options = dict(optimizer=optimizer, augment=augment, normalizer=normalizer())
    trainer(out=tmp_path, **options).fit(stop)

    resumed = trainer(seed=99, optimizer=optimizer, augment=augment, out=tmp_path)
    resumed.restore(last(tmp_path))
    assert resumed.epoch == stop
    resumed.fit(EPOCHS)
    assert state(resumed) == finished(**options)
    assert bits(dataclasses.asdict(last(tmp_path))) == state(resumed)
    with open(tmp_path / "metrics.csv") as file:
        assert len(file.readlines()) == 1 + EPOCHS


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(optimizer=sgd),
        dict(optimizer=scaled),
        dict(augment=data.Augment(crop=1)),
        dict(normalizer=normalizer()),
        dict(batch_size=BATCH + 1),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_depends_on_its_options_alone(change):
    """That two states can differ is what makes their equality worth testing."""
    once = finished()
    assert once == finished()
    assert once["model"] != finished(**change)["model"]


@pytest.mark.parametrize(("threads", "threads_after"), [(1, 1), (2, 2), (1, 2)])
def test_resume_with_any_number_of_threads(tmp_path, restore_threads, threads, threads_after):
    """With images and layers large enough that the threads share the work."""
    images = dataset(n=65, shape=(1, 12, 12))

    def wide(seed=0, **options):
        bnext.manual_seed(seed)
        model = models.build("cnn", (1, 12, 12), CLASSES, depth=1, width=24, dropout=0.2)
        return trainer(images, model=model, seed=seed, batch_size=32, **options)

    bnext.set_num_threads(threads)
    straight = wide()
    straight.fit(2)
    wide(out=tmp_path).fit(1)
    bnext.set_num_threads(threads_after)
    resumed = wide(seed=99)
    resumed.restore(last(tmp_path))
    resumed.fit(2)
    assert state(resumed) == state(straight)


def interrupting_schedule(at):
    def interrupted(step):
        if step == at:
            raise KeyboardInterrupt
        return schedule(step)

    return dict(schedule=interrupted)


def interrupting_log(at):
    def log(line):
        if line.startswith(f"epoch {at}/"):
            raise KeyboardInterrupt

    return dict(log=log)


@pytest.mark.parametrize(
    ("interruption", "epoch"),
    [
        (interrupting_schedule(0), 0),
        (interrupting_schedule(2), 0),
        (interrupting_schedule(3), 1),
        (interrupting_schedule(7), 2),
        (interrupting_log(2), 1),
    ],
)
def test_interrupted_and_resumed(tmp_path, interruption, epoch):
    with pytest.raises(KeyboardInterrupt):
        trainer(out=tmp_path, **interruption).fit(EPOCHS)
    assert not list(tmp_path.glob("*.tmp"))
    snapshot = last(tmp_path)
    assert (len(snapshot.history), snapshot.step) == (epoch, 3 * epoch)
    resumed = trainer(seed=99, out=tmp_path)
    resumed.restore(snapshot)
    resumed.fit(EPOCHS)
    assert state(resumed) == finished()


@pytest.mark.parametrize("write", range(2, 9))
def test_interrupted_while_it_saves(tmp_path, monkeypatch, write):
    """At each file from the best of epoch 1 on; the first of all is the last of epoch 0."""
    written = []

    def replace(source, target, replace=checkpoint.os.replace):
        written.append(target.name)
        if len(written) == write:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        trainer(out=tmp_path).fit(EPOCHS)
    monkeypatch.undo()
    snapshot = last(tmp_path)
    assert len(snapshot.history) == written[1:-1].count("last.safetensors")
    resumed = trainer(seed=99, out=tmp_path)
    resumed.restore(snapshot)
    resumed.fit(EPOCHS)
    assert state(resumed) == finished()
    history = Snapshot.load(tmp_path / "best.safetensors").history
    assert history[-1]["test_accuracy"] == max(r["test_accuracy"] for r in resumed.history)


def test_fit_counts_the_epochs_of_the_restored_run(tmp_path):
    trainer(out=tmp_path / "first").fit(2)
    resumed = trainer()
    resumed.restore(last(tmp_path / "first"))
    before = state(resumed)
    for epochs in (1, 2):
        assert len(resumed.fit(epochs)) == 2
    assert state(resumed) == before


# Batches


class _Recorder(nn.Module):
    """Passes its input on and records it."""

    def __init__(self):
        super().__init__()
        self.trained, self.evaluated = [], []

    def forward(self, x):
        self.trained.append(x)
        return x, lambda grad_y: grad_y

    def __call__(self, x):
        self.evaluated.append(x)
        return x


def recorded(dataset):
    recorder = _Recorder()
    net = models.build("mlp", (1, 6, 6), CLASSES, depth=1, width=4)
    return recorder, trainer(dataset, model=nn.Sequential({"recorder": recorder, "net": net}))


@pytest.mark.parametrize(
    ("n", "trained", "evaluated"),
    [(61, [20, 20, 21], [20, 10]), (62, [20, 20, 20, 2], [20, 10]), (21, [21], [20, 10])],
)
def test_a_single_sample_joins_the_last_batch(n, trained, evaluated):
    """BatchNorm on (N, C) could not train on a batch of one."""
    recorder, recording = recorded(dataset(n))
    recording.fit(2)
    assert [len(x) for x in recorder.trained] == 2 * trained
    assert [len(x) for x in recorder.evaluated] == 2 * evaluated


def test_every_epoch_has_an_order_of_its_own():
    recorder, recording = recorded(DATA)
    recording.fit(2)
    half = len(recorder.trained) // 2
    first, second = (
        np.concatenate(epoch)[:, 0, 0, 0]
        for epoch in (recorder.trained[:half], recorder.trained[half:])
    )
    np.testing.assert_array_equal(np.sort(first), np.sort(DATA.x_train[:, 0, 0, 0]))
    np.testing.assert_array_equal(np.sort(second), np.sort(first))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, DATA.x_train[:, 0, 0, 0])


def test_batches_of_one_are_refused_by_the_layer():
    net = models.build("mlp", (1, 6, 6), CLASSES, depth=1, width=4)
    with pytest.raises(ValueError, match="BatchNorm 'norm1': 1 value per channel"):
        trainer(model=net, batch_size=1).fit(1)


# Evaluation


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_evaluate_equals_a_direct_computation(batch_size, training):
    trained = trainer(normalizer=normalizer())
    trained.fit(1)
    model = trained.model.train(training)
    before, generator = state(trained), default_generator.state

    metrics = evaluate(
        model, DATA.x_test, DATA.y_test, batch_size=batch_size, normalizer=trained.normalizer
    )
    assert (state(trained), default_generator.state) == (before, generator)
    assert all(module.training is training for module in model.modules())

    logits, _ = model.eval().forward(normalizer()(DATA.x_test))
    loss, _ = softmax_cross_entropy(logits, DATA.y_test)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    assert metrics.accuracy == np.mean(logits.argmax(axis=1) == DATA.y_test)


def test_the_training_metrics_are_means_over_samples():
    model = unchanging()
    [record] = trainer(model=model, schedule=lambda step: 0.0).fit(1)
    expected = evaluate(model, DATA.x_train, DATA.y_train)
    np.testing.assert_allclose(record["train_loss"], expected.loss, rtol=1e-6)
    assert record["train_accuracy"] == expected.accuracy


# What goes wrong


def from_step(first, rate):
    return lambda step: schedule(step) if step < first else rate


@pytest.mark.filterwarnings("ignore:BatchNorm .* not finite")
@pytest.mark.parametrize(
    ("rate", "culprit"),
    [(1e38, ""), (1e300, "; the first parameter that is not finite is 'conv1a.weight'")],
)
@pytest.mark.parametrize(("first", "what", "step"), [(3, "training", 4), (5, "test", 6)])
def test_divergence_keeps_the_checkpoint(tmp_path, first, what, step, rate, culprit):
    options = dict(schedule=from_step(first, rate), optimizer=sgd)
    message = (
        f"the {what} loss became (nan|inf) in epoch 2 after step {step}{re.escape(culprit)}; the "
        rf"checkpoint of epoch 1 is kept; try a learning rate below {re.escape(f'{rate:.3g}')}"
    )
    diverging = trainer(out=tmp_path, **options)
    with pytest.raises(NonFiniteLossError, match=message):
        diverging.fit(EPOCHS)
    assert [record["epoch"] for record in diverging.history] == [1]
    reached = trainer(**options)
    reached.fit(1)
    assert bits(dataclasses.asdict(last(tmp_path))) == state(reached)


X, Y = DATA.x_train, DATA.y_train


def with_value(array, value):
    array = array.copy()
    array.flat[7] = value
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x_train=X[:1], y_train=Y[:1]), "train split: expected 2 or more samples, got 1"),
        (dict(x_train=X[:0], y_train=Y[:0]), "train split: expected 2 or more samples, got 0"),
        (dict(x_test=X[:0], y_test=Y[:0]), "test split: expected 1 or more samples, got 0"),
        (dict(y_train=Y[:-1]), r"train split: labels: expected shape \(61,\), got \(60,\)"),
        (dict(y_test=DATA.y_test[:, None]), r"test split: labels: .* \(30,\), got \(30, 1\)"),
        (dict(y_train=Y.astype(float)), "train split: labels: expected integers, got float64"),
        (dict(y_train=with_value(Y, 3)), "train split: labels: expected 0 to 2, got 0 to 3"),
        (dict(y_test=with_value(DATA.y_test, -1)), "test split: labels: .* got -1 to 2"),
        (dict(num_classes=2), "train split: labels: expected 0 to 1, got 0 to 2"),
        (
            dict(x_test=DATA.x_test[..., :5]),
            r"test split: expected samples of shape \(1, 6, 6\), got \(1, 6, 5\)",
        ),
        (dict(x_train=with_value(X, np.nan)), "train split: the inputs hold NaN or infinity"),
        (dict(x_test=with_value(DATA.x_test, np.inf)), "test split: the inputs hold NaN or inf"),
    ],
)
def test_bad_data_are_refused_before_training(changes, message):
    with pytest.raises(data.DataError, match=f"^synthetic: {message}"):
        trainer(dataclasses.replace(DATA, **changes), model=models.build("mlp", (3,), CLASSES))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            dict(dataset=dataset(seed=1)),
            f"trained on other data: synthetic, digest {DATA.digest[:12]}; got synthetic, digest "
            f"{dataset(seed=1).digest[:12]}",
        ),
        (
            dict(model=models.build("cnn", (1, 6, 6), CLASSES, depth=1, width=5)),
            r"of another model: .*'conv1a\.weight': expected shape \(5, 1, 3, 3\), got \(4, 1, 3",
        ),
        (
            dict(model=models.build("cnn", (1, 6, 6), CLASSES, depth=1, width=4, norm="none")),
            r"of another model: .*unexpected key 'norm1a\.bias'",
        ),
        (dict(optimizer=sgd), r"of another optimizer: .*missing key 'momentum\.conv1a\.weight'"),
        (dict(optimizer=scaled), r"of another optimizer: .*missing key 'scaling\.alpha'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, other, message):
    trainer(out=tmp_path).fit(1)
    resumed = trainer(**other)
    with pytest.raises(CheckpointError, match=f"^the checkpoint (is|was) {message}"):
        resumed.restore(last(tmp_path))
    assert resumed.epoch == resumed.step == 0


def test_a_checkpoint_that_is_not_of_a_training_run(tmp_path):
    checkpoint.save(tmp_path / "a", {"model/x": np.ones(3)}, {"other": 1})
    with pytest.raises(CheckpointError, match="a: a checkpoint of bnext, but not of a training"):
        Snapshot.load(tmp_path / "a")


def test_a_checkpoint_with_other_arrays(tmp_path):
    checkpoint.save(tmp_path / "a", {"other/x": np.ones(3)}, {"training": {}})
    with pytest.raises(CheckpointError, match="a: 'other/x': expected an array of one of model, "):
        Snapshot.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: trainer(batch_size=0), ValueError, "Trainer: batch_size: expected 1 or more"),
        (lambda: trainer(seed=2.5), TypeError, "seed: expected an integer, got"),
        (lambda: Trainer(None, None, schedule, DATA), TypeError, "Trainer: model: expected a Mod"),
        (lambda: trainer().fit(1.5), TypeError, "Trainer.fit: epochs: expected an integer, got 1"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epochs(epochs):
    with pytest.raises(ValueError, match=f"fit: epochs: expected 1 or more, got {epochs}"):
        trainer().fit(epochs)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("matplotlib", dict(out="run")),
        ("safetensors.numpy", dict(out="run")),
        ("tqdm", dict(progress=True)),
    ],
)
def test_a_missing_package_shows_before_the_first_step(monkeypatch, tmp_path, module, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    fresh = trainer(**options)
    package = module.partition(".")[0]
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "bnext\[train\]"'):
        fresh.fit(1)
    assert fresh.step == 0


def test_a_folder_that_cannot_be_made_shows_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    fresh = trainer(out=tmp_path / "file")
    with pytest.raises(FileExistsError):
        fresh.fit(1)
    assert fresh.step == 0


# Progress


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [
        (True, False, True),
        (False, True, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_progress_bar(capsys, monkeypatch, progress, terminal, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    trainer(progress=progress).fit(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    if shown:
        assert "epoch 1/2" in captured.err
        assert "epoch 2/2" in captured.err
        assert "/3" in captured.err
    else:
        assert captured.err == ""
