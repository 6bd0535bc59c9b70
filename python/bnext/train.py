"""The training loop: metrics, curves, checkpoints, and an exact resume."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnext import _extras, checkpoint, random
from bnext._pieces import integer
from bnext.checkpoint import CheckpointError
from bnext.data import Augment, DataError, Dataset, Normalizer, batches, num_batches
from bnext.losses import softmax_cross_entropy
from bnext.nn import _check
from bnext.nn.module import Array, Module
from bnext.optim import Optimizer

if TYPE_CHECKING:
    from bnext._core import _GeneratorState

__all__ = [
    "Metrics",
    "NonFiniteLossError",
    "Snapshot",
    "Trainer",
    "evaluate",
    "plot_history",
]

Record = dict[str, float]
"""One epoch: a value for each of `COLUMNS`."""

COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
)


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; checkpoints written before are untouched."""


class Metrics(NamedTuple):
    """Mean cross-entropy (nats per sample) and share of correct predictions."""

    loss: float
    accuracy: float


class _Tally:
    """Running means over batches of different sizes."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._correct = 0
        self._seen = 0

    def add(self, loss: float, logits: Array, labels: Array) -> None:
        self._loss += loss * len(labels)
        self._correct += int(np.count_nonzero(logits.argmax(axis=1) == labels))
        self._seen += len(labels)

    @property
    def metrics(self) -> Metrics:
        return Metrics(self._loss / self._seen, self._correct / self._seen)


def evaluate(
    model: Module,
    x: Array,
    y: Array,
    *,
    batch_size: int = 256,
    normalizer: Normalizer | None = None,
) -> Metrics:
    """Loss and accuracy of ``model(x)``: running statistics, no dropout, all samples.

    Parameters
    ----------
    model : Module
        Maps (B, ...) to logits (B, num_classes).
    x : array of shape (N, ...)
    y : integer array of shape (N,)
    batch_size : int, default 256
    normalizer : Normalizer, optional
        Applied to each batch.
    """
    tally = _Tally()
    for inputs, labels in batches(x, y, batch_size, normalizer=normalizer, last_batch="keep"):
        logits = model(inputs)
        tally.add(softmax_cross_entropy(logits, labels)[0], logits, labels)
    return tally.metrics


@dataclass(frozen=True)
class Snapshot:
    """All that a training run is between two epochs; what a checkpoint file holds.

    Attributes
    ----------
    model : dict of arrays
        Parameters and buffers.
    optimizer : dict
        State of the optimizer.
    normalizer : Normalizer or None
    history : list of dict
        One record for each finished epoch.
    step : int
        Number of optimizer steps so far; the position in the schedule.
    seed : int
        Of the order and augmentation of the batches.
    dropout : dict
        State of the default generator of dropout.
    dataset : dict
        Name, digest, input shape and number of classes.
    config : dict
        Whatever the caller wants to keep; the command line keeps its options.
    """

    model: dict[str, Array]
    optimizer: dict[str, Any]
    normalizer: Normalizer | None
    history: list[Record]
    step: int
    seed: int
    dropout: _GeneratorState
    dataset: dict[str, Any]
    config: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path` atomically; see `bnext.checkpoint.save`."""
        numbers = {k: v for k, v in self.optimizer.items() if not isinstance(v, np.ndarray)}
        groups: dict[str, Mapping[str, Array]] = {
            "model": self.model,
            "optimizer": {k: v for k, v in self.optimizer.items() if k not in numbers},
            "normalizer": self.normalizer.to_dict() if self.normalizer else {},
        }
        arrays = {f"{group}/{k}": v for group, items in groups.items() for k, v in items.items()}
        training = {
            "optimizer": numbers,
            "history": self.history,
            "step": self.step,
            "seed": self.seed,
            "dropout": self.dropout,
            "dataset": self.dataset,
            "config": self.config,
        }
        checkpoint.save(path, arrays, {"training": training})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read what `save` wrote.

        Raises
        ------
        CheckpointError
            See `bnext.checkpoint.load`; also if the file cannot be read or holds something
            else than a training run.
        """
        try:
            arrays, metadata = checkpoint.load(path)
        except OSError as error:  # safetensors calls a file that may not be read missing
            reason = error.strerror or error if os.access(path, os.R_OK) else "permission denied"
            raise CheckpointError(f"{path}: cannot be read: {reason}") from error
        training = metadata.get("training")
        if training is None:
            raise CheckpointError(f"{path}: a checkpoint of bnext, but not of a training run")
        groups: dict[str, dict[str, Array]] = {"model": {}, "optimizer": {}, "normalizer": {}}
        for key, array in arrays.items():
            group, _, name = key.partition("/")
            if group not in groups:
                raise CheckpointError(
                    f"{path}: {key!r}: expected an array of one of {', '.join(groups)}"
                )
            groups[group][name] = array
        training["optimizer"].update(groups["optimizer"])
        normalizer = groups["normalizer"]
        return cls(
            model=groups["model"],
            normalizer=Normalizer.from_dict(normalizer) if normalizer else None,
            **training,
        )

    def restore_model(self, model: Module) -> None:
        """Copy the parameters and buffers into `model`; CheckpointError if they do not fit."""
        try:
            model.load_state_dict(self.model)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint is of another model: {error}") from error


class Trainer:
    """Trains a classifier on a data set in memory.

    Everything random follows from `seed` and the default dropout generator, and both are
    part of a checkpoint: a run that was stopped and restored continues bit for bit as if
    it had never stopped.

    Parameters
    ----------
    model : Module
        Maps (B, *input_shape) to logits (B, num_classes).
    optimizer : Optimizer
        Over the model's ``named_parameters()``; its `lr` is set before each step.
    schedule : callable
        ``schedule(step) -> lr``, a pure function, such as those of `bnext.schedules`.
    dataset : Dataset
        Checked before training.
    batch_size : int, default 64
        A single sample that would remain joins the last batch of training.
    seed : int, default 0
        Of the order and the augmentation of the batches.
    normalizer, augment : optional
        See `bnext.data.batches`.
    out : path-like, optional
        Folder for ``metrics.csv``, ``curves.png``, ``last.safetensors`` (after every
        epoch) and ``best.safetensors`` (highest test accuracy so far). Without it, no
        file is written.
    config : mapping, optional
        Kept in the checkpoints; anything JSON can hold.
    progress : bool, optional
        Show a progress bar; by default if standard error is a terminal.
    log : callable, default print
        Receives one line for each epoch.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        dataset: Dataset,
        *,
        batch_size: int = 64,
        seed: int = 0,
        normalizer: Normalizer | None = None,
        augment: Augment | None = None,
        out: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        log: Callable[[str], object] = print,
    ) -> None:
        _check_dataset(dataset)
        self.model = _check.model("Trainer", model)
        self.optimizer = optimizer
        self.schedule = schedule
        self.dataset = dataset
        self.batch_size = integer("Trainer", "batch_size", batch_size, 1)
        self.seed = integer("Trainer", "seed", seed, 0)
        self.normalizer = normalizer
        self.augment = augment
        self.out = None if out is None else Path(out)
        self.config = dict(config or {})
        self.history: list[Record] = []
        self.step = 0
        self._progress = sys.stderr.isatty() if progress is None else progress
        self._log = log

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    # -- state -------------------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """The state of the run; its arrays are those in use, not copies."""
        return Snapshot(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            normalizer=self.normalizer,
            history=self.history,
            step=self.step,
            seed=self.seed,
            dropout=random.default_generator.state,
            dataset={
                "name": self.dataset.name,
                "digest": self.dataset.digest,
                "input_shape": list(self.dataset.input_shape),
                "num_classes": self.dataset.num_classes,
            },
            config=self.config,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from `snapshot` instead of from the beginning.

        Raises
        ------
        CheckpointError
            If it belongs to other data, another model or another optimizer.
        """
        if snapshot.dataset["digest"] != self.dataset.digest:
            raise CheckpointError(
                f"the checkpoint was trained on other data: {snapshot.dataset['name']}, "
                f"digest {snapshot.dataset['digest'][:12]}; got {self.dataset.name}, "
                f"digest {self.dataset.digest[:12]}"
            )
        snapshot.restore_model(self.model)
        try:
            self.optimizer.load_state_dict(snapshot.optimizer)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint is of another optimizer: {error}") from error
        self.normalizer = snapshot.normalizer
        self.history = list(snapshot.history)
        self.step = snapshot.step
        self.seed = snapshot.seed
        random.default_generator.state = snapshot.dropout

    # -- training ----------------------------------------------------------------------
    def evaluate(self) -> Metrics:
        """`evaluate` the model on the test split."""
        return evaluate(
            self.model,
            self.dataset.x_test,
            self.dataset.y_test,
            batch_size=self.batch_size,
            normalizer=self.normalizer,
        )

    def fit(self, epochs: int) -> list[Record]:
        """Train until `epochs` epochs are finished in all, those of a restored run included.

        A KeyboardInterrupt leaves the checkpoint of the last finished epoch (epoch 0: the
        initial model) in ``out`` and is passed on; `restore` continues from there.

        Returns
        -------
        history : list of dict
            The values of `COLUMNS` for each epoch; accuracies are shares, `lr` is that of
            the epoch's last step, `seconds` includes the evaluation.

        Raises
        ------
        NonFiniteLossError
            If the loss becomes NaN or infinite. No checkpoint is written after that.
        """
        epochs = integer("Trainer.fit", "epochs", epochs, 1)
        if self.out is not None:
            # A missing package or an unwritable folder shows now, not after an epoch.
            _extras.require("matplotlib", "plotting the training curves")
            self.out.mkdir(parents=True, exist_ok=True)
            if self.epoch == 0:
                self._save("last")
        # Overflow ends in a loss that is not finite, and that is an error of its own.
        with np.errstate(over="ignore", invalid="ignore"):
            while self.epoch < epochs:
                record = self._train_epoch(epochs)
                best = max((past["test_accuracy"] for past in self.history), default=-1.0)
                self.history.append(record)
                self._log(_describe(record, epochs))
                if self.out is not None:
                    if record["test_accuracy"] > best:
                        self._save("best")
                    self._save("last")
                    _write_csv(self.history, self.out / "metrics.csv")
        if self.out is not None:
            plot_history(self.history, self.out / "curves.png", title=str(self.out.name))
        return self.history

    def _train_epoch(self, epochs: int) -> Record:
        started = time.perf_counter()
        data = self.dataset
        epoch = self.epoch + 1
        tally = _Tally()
        self.model.train()
        with self._bar(f"epoch {epoch}/{epochs}") as bar:
            for inputs, labels in batches(
                data.x_train,
                data.y_train,
                self.batch_size,
                shuffle=True,
                seed=self.seed,
                epoch=epoch,
                augment=self.augment,
                normalizer=self.normalizer,
            ):
                self.optimizer.lr = self.schedule(self.step)
                self.optimizer.zero_grad()
                logits, backward = self.model.forward(inputs)
                loss, loss_backward = softmax_cross_entropy(logits, labels)
                self._check_finite("training loss", loss)
                backward(loss_backward())
                self.optimizer.step()
                self.step += 1
                tally.add(loss, logits, labels)
                if bar is not None:
                    bar.set_postfix_str(f"loss {tally.metrics.loss:.4f}", refresh=False)
                    bar.update()
        test = self.evaluate()
        # The last step may have broken the model after the last training loss.
        self._check_finite("test loss", test.loss)
        return {
            "epoch": epoch,
            "lr": self.optimizer.lr,
            "train_loss": tally.metrics.loss,
            "train_accuracy": tally.metrics.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "seconds": time.perf_counter() - started,
        }

    def _bar(self, description: str) -> Any:
        if not self._progress:
            return nullcontext()
        tqdm = _extras.require("tqdm", "the progress bar")
        total = num_batches(len(self.dataset.x_train), self.batch_size)
        return tqdm.tqdm(desc=description, total=total, unit="batch", leave=False)

    def _check_finite(self, what: str, loss: float) -> None:
        if math.isfinite(loss):
            return
        culprit = next(
            (
                f"; the first parameter that is not finite is {name!r}"
                for name, parameter in self.model.named_parameters()
                if not np.isfinite(parameter.data).all()
            ),
            "",
        )
        kept = f"; the checkpoint of epoch {self.epoch} is kept" if self.out else ""
        raise NonFiniteLossError(
            f"the {what} became {loss} in epoch {self.epoch + 1} after step {self.step}{culprit}"
            f"{kept}; try a learning rate below {self.optimizer.lr:.3g} or a longer warm-up"
        )

    def _save(self, name: str) -> None:
        assert self.out is not None
        self.snapshot().save(self.out / f"{name}.safetensors")


def _check_dataset(data: Dataset) -> None:
    """Name here what would otherwise fail deep inside the first epoch."""
    for split, x, y, least in (
        ("train", data.x_train, data.y_train, 2),
        ("test", data.x_test, data.y_test, 1),
    ):
        where = f"{data.name}: {split} split"
        if len(x) < least:
            raise DataError(f"{where}: expected {least} or more samples, got {len(x)}")
        if y.shape != (len(x),):
            raise DataError(f"{where}: labels: expected shape ({len(x)},), got {y.shape}")
        if not np.issubdtype(y.dtype, np.integer):
            raise DataError(f"{where}: labels: expected integers, got {y.dtype}")
        if y.min() < 0 or y.max() >= data.num_classes:
            raise DataError(
                f"{where}: labels: expected 0 to {data.num_classes - 1}, got {y.min()} to {y.max()}"
            )
        if x.shape[1:] != data.input_shape:
            raise DataError(
                f"{where}: expected samples of shape {data.input_shape}, got {x.shape[1:]}"
            )
        if not np.isfinite(x).all():
            raise DataError(f"{where}: the inputs hold NaN or infinity")


def _describe(record: Record, epochs: int) -> str:
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  lr {record['lr']:<8.3g}"
        f"  train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.2%}"
        f"  test loss {record['test_loss']:.4f} accuracy {record['test_accuracy']:.2%}"
        f"  {record['seconds']:.1f} s"
    )


def _write_csv(history: list[Record], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    checkpoint.write_atomically(path, text.getvalue().encode())


def plot_history(history: list[Record], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw loss and accuracy over the epochs into a PNG file.

    Parameters
    ----------
    history : list of dict
        As `Trainer.fit` returns it.
    path : path-like
    title : str

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    # A Figure of its own, without pyplot: no global state, and Agg whatever the display.
    figure_module = _extras.require("matplotlib.figure", "plotting the training curves")
    ticker = _extras.require("matplotlib.ticker", "plotting the training curves")
    epochs = [record["epoch"] for record in history]
    figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    panels = (("loss", "cross-entropy (nats per sample)", 1), ("accuracy", "accuracy (%)", 100))
    for axes, (metric, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, style in (("train", "--"), ("test", "-")):
            values = [scale * record[f"{split}_{metric}"] for record in history]
            axes.plot(epochs, values, style, marker="o", markersize=3, label=split)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    checkpoint.write_atomically(path, image.getvalue())
