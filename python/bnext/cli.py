"""The command line: ``bnext train``, ``evaluate``, ``doctor``, ``compare``, ``study``, ``info``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import bnext
from bnext import _core, _extras, comparison, data, diagnosis, models, optim, schedules, train
from bnext.checkpoint import CheckpointError
from bnext.data import DataError, Dataset
from bnext.nn.module import Module
from bnext.study import command as study

Options = dict[str, Any]

# What each optimizer takes, with its defaults.
_OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], Options]] = {
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}),
    "adam": (optim.Adam, {"lr": 1e-3, "weight_decay": 0.0}),
    "adamw": (optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}
# Options that a run may be resumed with; the others would change its course.
_FREE = ("epochs", "threads", "out", "progress")
_CHECKPOINT = "last.safetensors"


class _Error(Exception):
    """What the user asked for cannot be done; shown as one line."""


class _Parser(argparse.ArgumentParser):
    """Reports errors by `_Error`, whatever the command."""

    def error(self, message: str) -> NoReturn:
        raise _Error(f"{message} (see {self.prog} --help)")


# -- types of options ------------------------------------------------------------------
def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number, {least} or more, got {text!r}"
            )
        return value

    return whole


def _number(expected: str, good: Callable[[float], bool]) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not good(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return number


_AT_LEAST_0 = _number("a number, 0 or more", lambda value: 0 <= value < math.inf)
_ABOVE_0 = _number("a number above 0", lambda value: 0 < value < math.inf)
_BELOW_1 = _number("a number from 0 to below 1", lambda value: 0 <= value < 1)


def _seed(text: str) -> int:
    value = _whole(0)(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"expected a number below 2**64, got {text!r}")
    return value


# -- the parser ------------------------------------------------------------------------
_THREADS = "threads to use (default: OMP_NUM_THREADS, or as many as there are processors)"


class _TrainOptions:
    """The options of ``bnext train`` that may also stand in a configuration file."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.defaults: Options = {}
        self.switches: list[str] = []
        self._parser = parser
        self._group: argparse._ArgumentGroup

        self._title("data")
        self._add(
            "data",
            "digits",
            "digits, fashion-mnist, idx:DIR (files in MNIST's format), npz:FILE (x_train, y_train, "
            "x_test, y_test) or cifar10:DIR (the binary version)",
            metavar="SPEC",
        )
        self._add(
            "augment-crop",
            0,
            "crop training images at random, after padding each side by this many pixels",
            type=_whole(0),
            metavar="PIXELS",
        )
        self._switch("flip", False, "mirror training images left to right at random")

        self._title("model")
        self._choice("model", "cnn", "architecture", models.names())
        self._choice("norm", "batch", "batch normalization, or none", models.NORMS)
        self._choice(
            "norm-position", "before", "before or after the activation", models.NORM_POSITIONS
        )
        self._add("dropout", 0.2, "probability; 0: no dropout", type=_BELOW_1, metavar="P")
        self._choice(
            "dropout-position",
            "head",
            "before the last linear layer, after each activation or before each normalization",
            models.DROPOUT_POSITIONS,
        )
        self._add(
            "depth",
            None,
            "mlp: hidden layers (default: 2); cnn: stages of two convolutions (2); "
            "resnet: blocks in each of the 3 stages (1)",
            type=_whole(1),
            metavar="N",
        )
        self._add(
            "width",
            None,
            "mlp: units of a layer (256); cnn and resnet: channels of the first stage (32)",
            type=_whole(1),
            metavar="N",
        )

        self._title("training")
        self._add("epochs", 30, "passes over the training data", type=_whole(1), metavar="N")
        self._add("batch-size", 64, "samples in a step", type=_whole(2), metavar="N")
        self._choice("optimizer", "sgd", "update rule", tuple(_OPTIMIZERS))
        self._add("lr", None, "learning rate" + _defaults("lr"), type=_ABOVE_0, metavar="RATE")
        self._add("momentum", None, _defaults("momentum"), type=_BELOW_1, metavar="M")
        self._switch("nesterov", None, "Nesterov's momentum" + _defaults("nesterov"))
        self._add(
            "weight-decay",
            None,
            "not applied to biases and to the weights of normalization" + _defaults("weight_decay"),
            type=_AT_LEAST_0,
            metavar="RATE",
        )
        self._choice(
            "schedule",
            "cosine",
            "of the learning rate; step: a tenth after each third; cosine: to 0",
            schedules.names(),
        )
        self._add(
            "warmup-epochs",
            None,
            "over which the learning rate first rises from 0 (default: 1, at most half of all)",
            type=_AT_LEAST_0,
            metavar="N",
        )
        self._add(
            "seed",
            0,
            "of initial weights, order, augmentation and dropout",
            type=_seed,
            metavar="N",
        )

        self._title("run")
        self._add("threads", None, _THREADS, type=_whole(1), metavar="N")
        self._add(
            "out",
            None,
            "folder for the results (default: a new one, runs/DATA-MODEL-seedN)",
            metavar="DIR",
        )
        self._switch("progress", None, "progress bar (default: on a terminal)")

    def _title(self, title: str) -> None:
        self._group = self._parser.add_argument_group(title)

    def _add(self, name: str, default: Any, text: str, **settings: Any) -> None:
        """One option. It is in the parsed namespace only if it was given."""
        self.defaults[name.replace("-", "_")] = default
        if default is not None:
            text += f" (default: {'no' if default is False else default})"
        self._group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **settings)

    def _choice(self, name: str, default: str, text: str, choices: tuple[str, ...]) -> None:
        self._add(name, default, text, choices=choices)

    def _switch(self, name: str, default: bool | None, text: str) -> None:
        self.switches.append(name)
        self._add(name, default, text, action=argparse.BooleanOptionalAction)


def _defaults(name: str) -> str:
    known = [(key, values[name]) for key, (_, values) in _OPTIMIZERS.items() if name in values]
    shown = ", ".join(f"{key} {'no' if value is False else value}" for key, value in known)
    return f" (default: {shown})"


_EXAMPLES = """\
examples:
  bnext train                                    a small CNN on 8x8 digits, under a minute
  bnext train --norm none --dropout 0.3          the same without normalization
  bnext train --data fashion-mnist --model resnet --epochs 10 --augment-crop 2 --flip
  bnext train --config run.toml --seed 1         options from a file: epochs = 10, lr = 0.05, ...
  bnext train --resume runs/digits-cnn-seed0     continue an interrupted training
"""


def _build_parser() -> tuple[argparse.ArgumentParser, _TrainOptions]:
    parser = _Parser(
        prog="bnext",
        description="Train and evaluate networks with Batch Normalization and Dropout.",
    )
    parser.add_argument("--version", action="version", version=f"bnext {bnext.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    command = commands.add_parser(
        "train",
        help="train a network on images",
        description="Train a network and write metrics, curves and checkpoints into a folder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file with values for the options below; those given here come first",
    )
    command.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue the run in this folder, or from this checkpoint (default: in --out), "
        "with its options, exactly as if it had never stopped",
    )
    options = _TrainOptions(command)
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "evaluate",
        help="measure a checkpoint on its test data",
        description="Loss and accuracy of a checkpoint on the test split of its data set.",
    )
    command.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run")
    command.add_argument("--data", metavar="SPEC", help="another data set; see bnext train --help")
    command.add_argument("--batch-size", type=_whole(1), default=256, metavar="N")
    command.add_argument("--threads", type=_whole(1), metavar="N", help=_THREADS)
    command.set_defaults(run=_evaluate)

    _add_doctor(commands)
    _add_compare(commands)

    command = commands.add_parser(
        "study",
        help="measure when Batch Normalization and Dropout help",
        description="Run experiments with paired seeds and write a report: when to use Batch "
        "Normalization and Dropout, where and how much, each with its confidence interval.",
        allow_abbrev=False,
    )
    study.add_options(command, _whole)
    command.set_defaults(run=_study)

    command = commands.add_parser(
        "info",
        help="show the version, the kernels and the threads in use",
        description="Version, backends compiled and in use, threads, OpenMP and CUDA.",
    )
    command.set_defaults(run=_info)
    return parser, options


_DOCTOR_EXAMPLES = """\
MODEL is a checkpoint or the folder of a run; a model of bnext train with options, such as
cnn:norm=batch,dropout=0.3,width=16; or FILE.py:NAME or PACKAGE.MODULE:NAME, a function without
arguments that returns a network of bnext.nn or PyTorch (its code runs).

exit status: 0 no findings, 1 findings, 2 a wrong option, file, model or data set

examples:
  bnext doctor runs/digits-cnn-seed0                 a trained network, on its data
  bnext doctor cnn:dropout=0.5,dropout_position=before-norm
  bnext doctor model.py:make --data npz:data.npz --batch-size 8 --json
"""

_COMPARE_EXAMPLES = """\
A VARIANT is [LABEL=]MODEL, a model of bnext train with options; the first is the baseline.

examples:
  bnext compare mlp:norm=none mlp                    is Batch Normalization better?
  bnext compare cnn cnn:dropout=0.3 --lr 0.02 0.05 0.1 --seeds 10 --margin 0.5
"""


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="look for what is wrong with BatchNorm and Dropout in a network",
        description="Findings about the BatchNorm and Dropout layers of a network.",
        epilog=_DOCTOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("model", nargs="?", default="cnn", metavar="MODEL", help="default: cnn")
    command.add_argument(
        "--data",
        metavar="SPEC",
        help="data set; see bnext train --help (default: that of the checkpoint, or digits)",
    )
    command.add_argument(
        "--batch-size",
        type=_whole(1),
        metavar="N",
        help="samples in a step of training (default: that of the checkpoint, or 64)",
    )
    command.add_argument(
        "--no-shuffle",
        action="store_true",
        help="training takes the samples in their order",
    )
    command.add_argument(
        "--samples", type=_whole(2), default=2048, metavar="N", help="to look at (default: 2048)"
    )
    for name, text in (("select", "report these alone"), ("ignore", "do not report these")):
        command.add_argument(f"--{name}", nargs="+", metavar="CODE", help=text)
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--threads", type=_whole(1), metavar="N", help=_THREADS)
    command.set_defaults(run=_doctor)


def _add_compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare",
        help="train variants of a model and say what they differ by",
        description="Train each variant with the same seeds and compare their test accuracies.",
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("variants", nargs="+", metavar="VARIANT")
    command.add_argument("--data", default="digits", metavar="SPEC", help="default: digits")
    command.add_argument("--seeds", type=_whole(2), default=6, metavar="N", help="default: 6")
    command.add_argument("--epochs", type=_whole(1), default=10, metavar="N", help="default: 10")
    command.add_argument(
        "--batch-size", type=_whole(2), default=64, metavar="N", help="default: 64"
    )
    command.add_argument(
        "--lr",
        type=_ABOVE_0,
        nargs="+",
        default=[0.05],
        metavar="RATE",
        help="of several, each variant gets the best on held-out data (default: 0.05)",
    )
    command.add_argument(
        "--margin",
        type=_ABOVE_0,
        metavar="POINTS",
        help="the smallest difference that would matter: test for equivalence within it",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--threads", type=_whole(1), metavar="N", help=_THREADS)
    command.set_defaults(run=_compare)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, _TrainOptions]:
    parser, options = _build_parser()
    args = parser.parse_args(argv)
    if getattr(args, "config", None) is not None:
        given = _read_config(args.config, options)
        try:
            from_file = parser.parse_args(["train", *given])
        except _Error as error:
            raise _Error(f"{args.config}: {error}") from None
        for name in options.defaults.keys() & vars(from_file).keys():
            if not hasattr(args, name):
                setattr(args, name, getattr(from_file, name))
    return args, options


def _read_config(path: Path, options: _TrainOptions) -> list[str]:
    """The options in a TOML file, as they would be written on the command line."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = _extras.require("tomli", "reading a configuration file")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _Error(f"--config: {error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _Error(f"{path}: not a TOML file: {error}") from None
    known = [name.replace("_", "-") for name in options.defaults]
    arguments = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise _Error(f"{path}: unknown option {key!r}{hint}")
        switch = name in options.switches
        if switch != isinstance(value, bool) or not isinstance(value, bool | int | float | str):
            expected = "true or false" if switch else "a number or a string"
            raise _Error(f"{path}: {key}: expected {expected}, got {value!r}")
        arguments.append(
            f"--{'' if value is not False else 'no-'}{name}" if switch else f"--{name}={value}"
        )
    return arguments


# -- bnext train -----------------------------------------------------------------------
def _train(args: argparse.Namespace, known: _TrainOptions) -> int:
    given = {name: value for name, value in vars(args).items() if name in known.defaults}
    wanted = {**known.defaults, **given}
    if args.resume is None:
        snapshot, options = None, _complete(wanted, given)
        out: Path | None = Path(wanted["out"]) if wanted["out"] else None
        if out is not None:
            _check_free(out)
    else:
        start = Path(args.resume or wanted["out"] or _latest_folder(_default_folder(wanted)))
        checkpoint = _checkpoint(start)
        snapshot = train.Snapshot.load(checkpoint)
        options = _resumed(snapshot, given, checkpoint, known)
        out = Path(wanted["out"] or checkpoint.parent)
        if out.resolve() != checkpoint.parent.resolve():
            _check_free(out)

    bnext.manual_seed(options["seed"])
    dataset = data.load(options["data"])
    try:
        trainer = _trainer(options, dataset, wanted["progress"])
    except ValueError as error:
        raise _Error(str(error)) from error
    if snapshot is not None:
        trainer.restore(snapshot)
    # Now that nothing is wrong with the options.
    trainer.out = _new_folder(_default_folder(wanted)) if out is None else out
    return _run(trainer, options["epochs"], trainer.out)


def _check_free(out: Path) -> None:
    if (out / _CHECKPOINT).exists():
        raise _Error(
            f"{out} already holds a run: continue it with --resume, or choose another --out"
        )


def _complete(wanted: Options, given: Options) -> Options:
    """What a checkpoint keeps of the options, with the defaults that depend on others."""
    options = {name: value for name, value in wanted.items() if name not in _FREE[1:]}
    if options["warmup_epochs"] is None:
        options["warmup_epochs"] = min(1.0, options["epochs"] / 2)
    _, defaults = _OPTIMIZERS[options["optimizer"]]
    for name in {name for _, other in _OPTIMIZERS.values() for name in other}:
        if name not in defaults and name in given:
            raise _Error(f"--{name.replace('_', '-')}: {options['optimizer']} does not have it")
        options[name] = given.get(name, defaults.get(name))
    return options


def _kept_options(snapshot: train.Snapshot, checkpoint: Path, known: _TrainOptions) -> Options:
    missing = known.defaults.keys() - _FREE[1:] - snapshot.config.keys()
    if missing:
        raise _Error(
            f"{checkpoint} was not written by bnext train: config: expected all of its options, "
            f"got none for {', '.join(sorted(missing))}"
        )
    return dict(snapshot.config)


def _resumed(
    snapshot: train.Snapshot, given: Options, checkpoint: Path, known: _TrainOptions
) -> Options:
    """The options of the run in `checkpoint`; those given must not change its course."""
    options = _kept_options(snapshot, checkpoint, known)
    for name, value in given.items():
        if name not in _FREE and options.get(name) != value:
            raise _Error(
                f"--{name.replace('_', '-')}: {checkpoint} was trained with "
                f"{options.get(name)}, got {value}; a resumed run keeps its options"
            )
    options["epochs"] = given.get("epochs", options["epochs"])
    if options["epochs"] < len(snapshot.history):
        raise _Error(
            f"--epochs: {checkpoint} already has {len(snapshot.history)}, got {options['epochs']}"
        )
    return options


def _default_folder(options: Options) -> Path:
    name = re.sub(r"[^\w.-]+", "-", options["data"].rstrip("/")).strip("-")
    return Path("runs") / f"{name}-{options['model']}-seed{options['seed']}"


def _numbered(folder: Path) -> list[Path]:
    """`folder`, folder-2, folder-3, ... up to the first that does not exist."""
    paths = [folder]
    while os.path.lexists(paths[-1]):
        paths.append(folder.with_name(f"{folder.name}-{len(paths) + 1}"))
    return paths


def _new_folder(folder: Path) -> Path:
    """Make the first of `_numbered` that does not exist, also if another run is about to."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = _numbered(folder)[-1]
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def _latest_folder(folder: Path) -> Path:
    existing = _numbered(folder)[:-1]
    if not existing:
        raise _Error(f"--resume: there is no run in {folder}")
    return existing[-1]


def _checkpoint(path: Path) -> Path:
    """The file `path`, or the last checkpoint of this folder."""
    # os.path does not raise where it may not look; what reads the file says so.
    return path / _CHECKPOINT if os.path.isdir(path) else path


def _model(options: Options, input_shape: Sequence[int], num_classes: int) -> Module:
    names = ("norm", "norm_position", "dropout", "dropout_position", "depth", "width")
    return models.build(
        options["model"],
        tuple(input_shape),
        num_classes,
        **{name: options[name] for name in names},
    )


def _trainer(options: Options, dataset: Dataset, progress: bool | None) -> train.Trainer:
    model = _model(options, dataset.input_shape, dataset.num_classes)
    optimizer, defaults = _OPTIMIZERS[options["optimizer"]]
    crop, flip = options["augment_crop"], options["flip"]
    if (crop or flip) and len(dataset.input_shape) != 3:
        raise _Error("--augment-crop and --flip: expected images, got " + _shape(dataset))
    return train.Trainer(
        model,
        optimizer(model.named_parameters(), **{name: options[name] for name in defaults}),
        schedules.build(
            options["schedule"],
            options["lr"],
            epochs=options["epochs"],
            steps_per_epoch=data.num_batches(len(dataset.x_train), options["batch_size"]),
            warmup_epochs=options["warmup_epochs"],
        ),
        dataset,
        batch_size=options["batch_size"],
        seed=options["seed"],
        normalizer=data.Normalizer.fit(dataset.x_train),
        augment=data.Augment(crop, flip) if crop or flip else None,
        config=options,
        progress=progress,
        log=_say,
    )


def _run(trainer: train.Trainer, epochs: int, out: Path) -> int:
    dataset = trainer.dataset
    parameters = sum(parameter.data.size for parameter in trainer.model.parameters())
    _say(
        f"{dataset.name}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test "
        f"samples {_shape(dataset)}, {dataset.num_classes} classes"
    )
    _say(
        f"{trainer.config['model']}: {parameters:,} parameters; "
        f"{_core.backend()}, {bnext.get_num_threads()} threads; results in {out}"
    )
    started, before = time.perf_counter(), trainer.epoch
    try:
        history = trainer.fit(epochs)
    except KeyboardInterrupt:
        print(
            f"\nbnext: interrupted; epoch {trainer.epoch} is kept: bnext train --resume {out}",
            file=sys.stderr,
        )
        return 130
    best = max(history, key=lambda record: record["test_accuracy"])
    _say(
        f"test accuracy {history[-1]['test_accuracy']:.4f} after epoch {epochs} "
        f"(highest {best['test_accuracy']:.4f} after epoch {best['epoch']:.0f}); "
        f"{epochs - before} epochs in {time.perf_counter() - started:.1f} s; curves in "
        f"{out / 'curves.png'}"
    )
    return 0


def _shape(dataset: Dataset) -> str:
    return "x".join(map(str, dataset.input_shape))


def _say(line: str) -> None:
    # At once, also into a pipe.
    print(line, flush=True)


# -- the other commands ----------------------------------------------------------------
def _load(
    checkpoint: Path, spec: str | None, known: _TrainOptions
) -> tuple[train.Snapshot, Options, Module, Dataset]:
    """A checkpoint or the last one of a folder, its model, and its data or those of `spec`."""
    checkpoint = _checkpoint(checkpoint)
    snapshot = train.Snapshot.load(checkpoint)
    described, options = snapshot.dataset, _kept_options(snapshot, checkpoint, known)
    try:
        model = _model(options, described["input_shape"], described["num_classes"])
    except (ValueError, TypeError, KeyError) as error:
        raise _Error(f"{checkpoint} was not written by bnext train: {error}") from error
    snapshot.restore_model(model)
    dataset = data.load(spec or described["name"])
    if list(dataset.input_shape) != described["input_shape"]:
        raise _Error(
            f"{dataset.name}: samples {_shape(dataset)}, but the checkpoint is for "
            + "x".join(map(str, described["input_shape"]))
        )
    if dataset.num_classes > described["num_classes"]:
        raise _Error(
            f"{dataset.name}: {dataset.num_classes} classes, but the checkpoint is for "
            f"{described['num_classes']}"
        )
    if spec is None and dataset.digest != described["digest"]:
        raise _Error(
            f"{dataset.name} has changed since the training; --data {dataset.name} uses it anyway"
        )
    return snapshot, options, model, dataset


def _evaluate(args: argparse.Namespace, known: _TrainOptions) -> int:
    snapshot, _options, model, dataset = _load(args.checkpoint, args.data, known)
    metrics = train.evaluate(
        model,
        dataset.x_test,
        dataset.y_test,
        batch_size=args.batch_size,
        normalizer=snapshot.normalizer,
    )
    _say(
        f"{dataset.name}, {len(dataset.x_test):,} test samples, epoch {len(snapshot.history)}: "
        f"test loss {metrics.loss:.4f}, test accuracy {metrics.accuracy:.4f}"
    )
    return 0


def _doctor(args: argparse.Namespace, known: _TrainOptions) -> int:
    model, dataset, found = _patient(args, known)
    # PyTorch modules and models of one's own know nothing of the data: their inputs are normalized
    # as those of bnext train.
    found.setdefault("normalizer", data.Normalizer.fit(dataset.x_train))
    try:
        report = diagnosis.doctor(
            model,
            dataset,
            shuffle=not args.no_shuffle,
            samples=args.samples,
            select=args.select,
            ignore=args.ignore or (),
            seed=args.seed,
            **found,
        )
    except Exception as error:  # whatever is in the user's model
        message = str(error)
        raise _Error(_line(error) if not message.startswith("doctor: ") else message) from error
    _say(report.to_json() if args.json else str(report))
    return 0 if report.ok else 1


def _patient(args: argparse.Namespace, known: _TrainOptions) -> tuple[Any, Dataset, Options]:
    """The network, the data, and what is known about its training."""
    given = {} if args.batch_size is None else {"batch_size": args.batch_size}
    name, _, called = args.model.rpartition(":")
    if args.model.partition(":")[0] in models.names():
        dataset = data.load(args.data or "digits")
        try:
            kind, options = models.parse(args.model)
            bnext.manual_seed(args.seed)
            model: Any = models.build(kind, dataset.input_shape, dataset.num_classes, **options)
        except ValueError as error:
            raise _Error(str(error)) from error
        return model, dataset, given
    if name and called.isidentifier():
        return _imported(name, called), data.load(args.data or "digits"), given
    if not os.path.exists(args.model):
        raise _Error(
            f"{args.model}: expected a checkpoint, FILE.py:NAME, or one of "
            f"{', '.join(models.names())} with options"
        )
    snapshot, kept, model, dataset = _load(Path(args.model), args.data, known)
    # The initial weights follow from the seed.
    bnext.manual_seed(kept["seed"])
    initial = _model(kept, dataset.input_shape, snapshot.dataset["num_classes"]).state_dict()
    from_run = {"batch_size": kept["batch_size"], "initial": initial}
    return model, dataset, {**from_run, **given, "normalizer": snapshot.normalizer}


def _imported(name: str, called: str) -> Any:
    """What the function `called` of a file or module returns."""
    # As Python does for a script and for -m: what is beside them can be imported.
    folder = os.path.abspath(os.path.dirname(name) if name.endswith(".py") else "")
    sys.path.insert(0, folder)
    try:
        if name.endswith(".py"):
            own_name = f"_doctor_{Path(name).stem}"  # takes the place of no other module
            spec = importlib.util.spec_from_file_location(own_name, name)
            if spec is None or spec.loader is None or not Path(name).is_file():
                raise _Error(f"{name}: no such file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[own_name] = module  # dataclasses, for one, look there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(name)
        return getattr(module, called)()
    except _Error:
        raise
    except (Exception, SystemExit) as error:  # whatever is in the user's file
        raise _Error(f"{name}:{called}: {_line(error)}") from error
    finally:
        with suppress(ValueError):  # the user's file may have removed it
            sys.path.remove(folder)


def _line(error: BaseException) -> str:
    """Kind and message, without the lines that PyTorch adds."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _compare(args: argparse.Namespace, _: _TrainOptions) -> int:
    dataset = data.load(args.data)
    variants: dict[str, Callable[[], Module]] = {}
    for text in args.variants:
        label, equals, spec = text.partition("=")
        # The first "=" of MODEL:OPTION=VALUE belongs to an option.
        if not equals or ":" in label:
            label = spec = text
        if label in variants:
            raise _Error(f"{label!r} appears twice; LABEL=MODEL gives it another name")
        variants[label] = _factory(spec, dataset)
    try:
        result = comparison.compare(
            variants,
            dataset,
            seeds=args.seeds,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            margin=args.margin,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ValueError as error:
        raise _Error(str(error)) from error
    _say(result.to_json() if args.json else str(result))
    return 0


def _factory(spec: str, dataset: Dataset) -> Callable[[], Module]:
    def make() -> Module:
        return models.build(kind, dataset.input_shape, dataset.num_classes, **options)

    try:
        kind, options = models.parse(spec)
        make()  # wrong options show before the first training
    except ValueError as error:
        raise _Error(str(error)) from error
    return make


def _study(args: argparse.Namespace, _: _TrainOptions) -> int:
    try:
        return study.main(args)
    except ValueError as error:
        raise _Error(str(error)) from error


def _info(_: argparse.Namespace, __: _TrainOptions) -> int:
    bnext.show_config()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process; return the exit status.

    0: done; 1: the training failed, or the doctor has findings; 2: a wrong option, file or data
    set; 130: Ctrl-C.
    """
    try:
        args, options = _parse(sys.argv[1:] if argv is None else argv)
        if getattr(args, "threads", None) is not None:
            bnext.set_num_threads(args.threads)
        return int(args.run(args, options))
    except KeyboardInterrupt:
        print("bnext: interrupted", file=sys.stderr)
        return 130
    except (train.NonFiniteLossError, OSError) as error:
        status, message = 1, str(error)
    except (_Error, DataError, CheckpointError, ImportError) as error:
        status, message = 2, str(error)
    print(f"bnext: error: {message}", file=sys.stderr)
    return status
