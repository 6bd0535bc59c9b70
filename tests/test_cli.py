"""The command line, as a user sees it: status, output, files."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bnext
from bnext import _core, cli, random
from bnext.train import Snapshot

RUN = [sys.executable, "-m", "bnext"]
COMMANDS = ("train", "evaluate", "doctor", "compare", "info")
# Small enough to train in a moment.
SMALL = ["--width", "4", "--depth", "1", "--no-progress"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, restore_threads):
    monkeypatch.chdir(tmp_path)
    before = random.default_generator.state
    yield
    random.default_generator.state = before


@pytest.fixture
def spec(tmp_path):
    """A data set of three classes that differ in brightness."""
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = rng.normal(0, 20, (96, 8, 8)) + 60 * y[:, np.newaxis, np.newaxis] + 50
    x = x.clip(0, 255).astype(np.uint8)
    path = tmp_path / "three.npz"
    np.savez(path, x_train=x[:65], y_train=y[:65], x_test=x[65:], y_test=y[65:])
    return f"npz:{path}"


def run(capsys, *arguments):
    """Status and the two streams of ``bnext ARGUMENTS``."""
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def state(path):
    snapshot = Snapshot.load(path)
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in snapshot.history]
    return snapshot, history


def assert_same_run(path, other):
    (a, history), (b, other_history) = state(path), state(other)
    assert history == other_history
    assert (a.step, a.seed, a.dropout, a.config) == (b.step, b.seed, b.dropout, b.config)
    for mine, theirs in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)


def test_train_writes_a_run_and_evaluate_agrees(capsys, spec):
    status, out, err = run(capsys, "train", "--data", spec, "--epochs", 2, "--out", "r", *SMALL)
    assert (status, err) == (0, "")
    assert sorted(os.listdir("r")) == [
        "best.safetensors",
        "curves.png",
        "last.safetensors",
        "metrics.csv",
    ]
    with open("r/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    accuracy = f"test accuracy {float(rows[-1]['test_accuracy']):.4f}"
    assert accuracy in out
    for checkpoint in ("r", "r/last.safetensors"):
        status, out, _ = run(capsys, "evaluate", checkpoint, "--batch-size", 7)
        assert status == 0
        assert accuracy in out


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_every_model_trains(capsys, spec, model, norm, position):
    places = ["head", "after-activation"] + ["before-norm"] * (norm == "batch")
    for place in places:
        status, _, err = run(
            capsys,
            *("train", "--data", spec, "--model", model, "--norm", norm),
            *("--norm-position", position, "--dropout", 0.3, "--dropout-position", place),
            *("--epochs", 1, "--lr", 0.01, "--out", place, *SMALL),
        )
        assert (status, err) == (0, "")


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "adam"],
        ["--optimizer", "adamw", "--lr", "0.003", "--weight-decay", "0.1"],
        ["--nesterov", "--momentum", "0.5", "--schedule", "step", "--warmup-epochs", "0"],
        ["--augment-crop", "1", "--flip", "--schedule", "constant", "--batch-size", "10"],
    ],
)
def test_options_train_and_resume_bit_for_bit(capsys, spec, options):
    common = ["--data", spec, "--epochs", 4, "--seed", 5, *options, *SMALL]
    assert run(capsys, "train", "--out", "whole", *common)[0] == 0

    saved, save = [], Snapshot.save

    def save_and_stop(self, path):
        save(self, path)
        saved.append(path)
        if str(path).endswith("last.safetensors") and len(self.history) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshot, "save", save_and_stop)
        status, _, err = run(capsys, "train", "--out", "parts", *common)
    assert status == 130
    assert "bnext train --resume parts" in err
    # Whatever the process did in between does not matter, nor do the threads.
    bnext.manual_seed(99)
    status, out, err = run(capsys, "train", "--resume", "parts", "--threads", 1, "--no-progress")
    assert (status, err) == (0, "")
    assert "2 epochs in" in out
    assert_same_run("whole/last.safetensors", "parts/last.safetensors")
    with open("whole/metrics.csv") as a, open("parts/metrics.csv") as b:
        assert [line.split(",")[:-1] for line in a] == [line.split(",")[:-1] for line in b]


def test_seeds_differ_and_repeat(capsys, spec):
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        arguments = ["--data", spec, "--epochs", 1, "--seed", seed, "--out", out, *SMALL]
        assert run(capsys, "train", *arguments)[0] == 0
    assert_same_run("a/last.safetensors", "b/last.safetensors")
    assert state("a/last.safetensors")[1] != state("c/last.safetensors")[1]


def test_default_folders_are_new_ones(capsys, spec):
    for _ in range(2):
        assert run(capsys, "train", "--data", spec, "--epochs", 1, *SMALL)[0] == 0
    names = sorted(os.listdir("runs"))
    assert len(names) == 2
    assert names[0].endswith("three.npz-cnn-seed0")
    assert names[1] == names[0] + "-2"
    # The newest is the one that --resume takes.
    status, out, _ = run(
        capsys, "train", "--data", spec, "--resume", "--epochs", 2, "--no-progress"
    )
    assert status == 0
    assert names[1] in out


def test_configuration_file_gives_way_to_the_command_line(capsys, spec):
    with open("run.toml", "w") as file:
        file.write(
            f'data = "{spec}"\nepochs = 3\nlr = 0.01\nnesterov = true\nbatch-size = 16\n'
            'norm_position = "after"\nout = "configured"\nprogress = false\nwidth = 4\n'
        )
    assert run(capsys, "train", "--config", "run.toml", "--epochs", 1, "--no-nesterov")[0] == 0
    options = Snapshot.load("configured/last.safetensors").config
    expected = {
        "data": spec,
        "epochs": 1,
        "lr": 0.01,
        "nesterov": False,
        "batch_size": 16,
        "norm_position": "after",
        "width": 4,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup_epochs": 0.5,
    }
    assert expected.items() <= options.items()
    assert not {"threads", "out", "progress"} & options.keys()


def test_threads(capsys, spec):
    arguments = ["--data", spec, "--epochs", 1, "--threads", 1, "--out", "r", *SMALL]
    assert "1 threads" in run(capsys, "train", *arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "command"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--epoch", 3], "unrecognized arguments: --epoch"),
        (["train", "extra"], "unrecognized arguments: extra"),
        (["train", "--epochs", 0], "--epochs: expected a whole number, 1 or more, got '0'"),
        (["train", "--epochs", 1.5], "--epochs: expected a whole number, 1 or more, got '1.5'"),
        (["train", "--batch-size", 1], "--batch-size: expected a whole number, 2 or more"),
        (["train", "--lr", 0], "--lr: expected a number above 0, got '0'"),
        (["train", "--lr", "nan"], "--lr: expected a number above 0, got 'nan'"),
        (["train", "--lr", "inf"], "--lr: expected a number above 0, got 'inf'"),
        (["train", "--dropout", 1], "--dropout: expected a number from 0 to below 1, got '1'"),
        (["train", "--momentum", -1], "--momentum: expected a number from 0"),
        (["train", "--weight-decay", "x"], "--weight-decay: expected a number, 0 or more"),
        (["train", "--seed", -1], "--seed: expected a whole number, 0 or more"),
        (["train", "--seed", 2**64], "--seed: expected a number below 2**64"),
        (["train", "--threads", 0], "--threads: expected a whole number, 1 or more"),
        (["train", "--model", "vgg"], "--model: invalid choice: 'vgg'"),
        (["train", "--norm", "layer"], "--norm: invalid choice: 'layer'"),
        (["train", "--depth", 0], "--depth: expected a whole number, 1 or more"),
        (["train", "--augment-crop", -1], "--augment-crop: expected a whole number, 0 or more"),
        (["train", "--optimizer", "adam", "--momentum", 0.5], "--momentum: adam does not have it"),
        (["train", "--nesterov", "--momentum", 0], "nesterov: expected a momentum > 0"),
        (["train", "--warmup-epochs", 30], "warmup_epochs: expected a number from 0 to below 30"),
        (["train", "--model", "cnn", "--depth", 4], "images of 16x16 or more, got (1, 8, 8)"),
        (
            ["train", "--norm", "none", "--dropout-position", "before-norm"],
            'dropout_position: "before-norm" needs norm "batch"',
        ),
        (["train", "--data", "nope"], "unknown data set 'nope'"),
        (["train", "--data", "npz:nope"], "nope"),
        (["train", "--resume"], "there is no run in runs/digits-cnn-seed0"),
        (["train", "--resume", "nope"], "nope: no such checkpoint file"),
        (["train", "--config", "nope.toml"], "No such file or directory: 'nope.toml'"),
        (["evaluate"], "checkpoint"),
        (["evaluate", "nope"], "nope: no such checkpoint file"),
        (["evaluate", "."], "last.safetensors: no such checkpoint file"),
        (["info", "--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_wrong_calls(capsys, arguments, expected):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("bnext: error: ")
    assert expected in err
    assert err.count("\n") == 1
    assert not os.path.exists("runs")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch = 3", "unknown option 'epoch'; did you mean 'epochs'?"),
        ("Batch_Size = 3", "did you mean 'batch-size'?"),
        ("zzz = 3", "unknown option 'zzz'; known: data, "),
        ("flip = 1", "flip: expected true or false, got 1"),
        ("epochs = true", "epochs: expected a number or a string, got True"),
        ("epochs = [1]", "epochs: expected a number or a string, got [1]"),
        ('epochs = "many"', "--epochs: expected a whole number"),
        ('model = "vgg"', "--model: invalid choice: 'vgg'"),
        ("[train]\nepochs = 1", "unknown option 'train'"),
        ("epochs = ", "not a TOML file"),
        ("\xff", "not a TOML file"),
    ],
)
def test_wrong_configuration(capsys, text, expected):
    with open("run.toml", "w", encoding="latin-1") as file:
        file.write(text)
    status, _, err = run(capsys, "train", "--config", "run.toml")
    assert status == 2
    assert "run.toml: " in err
    assert expected in err


def test_resume_refuses_what_would_change_the_run(capsys, spec):
    common = ["--data", spec, "--epochs", 2, "--out", "r", *SMALL]
    assert run(capsys, "train", *common)[0] == 0
    status, _, err = run(capsys, "train", *common)
    assert status == 2
    assert "r already holds a run: continue it with --resume" in err
    for arguments, expected in (
        (["--lr", 0.2], "--lr: r/last.safetensors was trained with 0.1, got 0.2"),
        (["--data", "digits"], "--data: r/last.safetensors was trained with npz:"),
        (["--epochs", 1], "--epochs: r/last.safetensors already has 2, got 1"),
    ):
        status, _, err = run(capsys, "train", "--resume", "r", *arguments)
        assert status == 2
        assert expected in err
    # The same options again are no contradiction.
    assert run(capsys, "train", "--resume", *common)[0] == 0


def test_resume_into_another_folder(capsys, spec):
    assert run(capsys, "train", "--data", spec, "--epochs", 1, "--out", "a", *SMALL)[0] == 0
    arguments = ["--resume", "a/last.safetensors", "--epochs", 2, "--out", "b", "--no-progress"]
    assert run(capsys, "train", *arguments)[0] == 0
    assert len(Snapshot.load("a/last.safetensors").history) == 1
    assert len(Snapshot.load("b/last.safetensors").history) == 2
    status, _, err = run(capsys, "train", *arguments)
    assert status == 2
    assert "b already holds a run" in err


def test_a_new_folder_is_of_one_run_alone(tmp_path, monkeypatch):
    exists = cli.os.path.lexists
    hidden = [True]  # as if another run made it just after the look

    def late(path):
        return exists(path) and not (hidden and hidden.pop())

    folder = tmp_path / "runs" / "run"
    assert cli._new_folder(folder) == folder
    monkeypatch.setattr(cli.os.path, "lexists", late)
    assert cli._new_folder(folder) == folder.with_name("run-2")


def test_wrong_options_leave_no_folder(capsys, tmp_path):
    for arguments in (
        ["--data", "nowhere"],
        ["--model", "mlp", "--norm", "none", "--dropout-position", "before-norm"],
    ):
        assert run(capsys, "train", *arguments, "--epochs", 1)[0] == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["evaluate", "doctor", "train --resume"])
def test_checkpoints_of_other_programs(capsys, spec, command):
    assert run(capsys, "train", "--data", spec, "--epochs", 1, "--out", "r", *SMALL)[0] == 0
    snapshot = Snapshot.load("r/last.safetensors")
    for name in ("norm", "epochs"):
        config = {key: value for key, value in snapshot.config.items() if key != name}
        replace(snapshot, config=config).save("other.safetensors")
        status, _, err = run(capsys, *command.split(), "other.safetensors")
        assert status == 2
        assert "was not written by bnext train: config: expected all" in err
        assert err.endswith(f"got none for {name}\n")
    if command != "train --resume":
        replace(snapshot, config=snapshot.config | {"norm": 3}).save("other.safetensors")
        status, _, err = run(capsys, command, "other.safetensors")
        assert (status, err.count("\n")) == (2, 1)


def test_files_that_may_not_be_read(capsys, monkeypatch, tmp_path):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    monkeypatch.setattr(Path, "is_dir", refused)
    for arguments in (
        ["evaluate", tmp_path],
        ["doctor", tmp_path],
        ["train", "--resume", tmp_path],
        ["train", "--data", f"idx:{tmp_path}"],
        ["train", "--data", f"cifar10:{tmp_path}"],
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2
        assert "cannot be read" in err
        assert "permission denied" in err.lower()
        assert err.count("\n") == 1


def test_evaluate_other_data(capsys, spec, tmp_path):
    assert run(capsys, "train", "--data", spec, "--epochs", 1, "--out", "r", *SMALL)[0] == 0
    status, _, err = run(capsys, "evaluate", "r", "--data", "digits")
    assert status == 2
    assert "10 classes, but the checkpoint is for 3" in err

    path = tmp_path / "three.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "x_test": 255 - arrays["x_test"]})
    status, _, err = run(capsys, "evaluate", "r")
    assert status == 2
    assert "has changed since the training" in err
    assert run(capsys, "evaluate", "r", "--data", spec)[0] == 0

    wide = np.zeros((6, 8, 9))
    np.savez("wide.npz", x_train=wide, y_train=arrays["y_train"][:6], x_test=wide, y_test=[0] * 6)
    status, _, err = run(capsys, "evaluate", "r", "--data", "npz:wide.npz")
    assert status == 2
    assert "samples 1x8x9, but the checkpoint is for 1x8x8" in err


def test_divergence_is_one_line_and_keeps_the_checkpoint(capsys, spec):
    status, _, err = run(
        capsys,
        *("train", "--data", spec, "--norm", "none", "--lr", 1e30, "--epochs", 3),
        *("--warmup-epochs", 0, "--out", "r", *SMALL),
    )
    assert status == 1
    assert err.startswith("bnext: error: the t")
    assert "try a learning rate below" in err
    assert Snapshot.load("r/last.safetensors").history == []


def test_a_file_in_the_way_is_one_line(capsys, spec):
    open("r", "w").close()
    status, _, err = run(capsys, "train", "--data", spec, "--out", "r/s", *SMALL)
    assert status == 1
    assert err.startswith("bnext: error: ")
    assert "r/s" in err


def test_info(capsys):
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    assert bnext.__version__ in out
    assert f"{_core.backend()} (in use)" in out
    for word in ("threads", "OpenMP", "CUDA"):
        assert word in out


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_names_every_option_and_imports_no_extra(arguments):
    code = (
        "import sys; from bnext.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('imported', sorted({'sklearn', 'matplotlib', 'safetensors', 'tqdm'} "
        "& set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert "imported []" in result.stdout
    if arguments[0] == "train":
        _, options = cli._build_parser()
        for name in options.defaults:
            assert f"--{name.replace('_', '-')}" in result.stdout
    elif arguments == ["--help"]:
        for command in COMMANDS:
            assert command in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"bnext {bnext.__version__}\n"


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_exactly(capsys, spec, kill):
    common = ["--data", spec, "--epochs", "80", "--batch-size", "5", *SMALL]
    assert run(capsys, "train", "--out", "whole", *common)[0] == 0

    # Nothing is read ahead, and a page is all that is kept: a run that gets far ahead of this test
    # on a busy machine waits for it, and cannot end.
    # A job in the background of a shell ignores the signal, and what it starts would, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*RUN, "train", "--out", "parts", *common],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pipesize=4096,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    for line in process.stdout:
        if line.startswith(b"epoch  4/80"):  # that of the third has been kept
            break
    time.sleep(0.02)  # somewhere in the next epoch
    process.send_signal(kill)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL), err
    if kill == signal.SIGINT:
        assert "bnext: interrupted; epoch" in err
        assert "Traceback" not in err
    assert 3 <= len(Snapshot.load("parts/last.safetensors").history) < 80
    assert run(capsys, "train", "--resume", "parts", "--no-progress")[0] == 0
    assert_same_run("whole/last.safetensors", "parts/last.safetensors")
