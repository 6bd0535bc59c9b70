"""Parts that the runs of experiments are made of: data, training, measurements."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bnext
from bnext import losses, optim, schedules
from bnext.data import Dataset, Normalizer, batches, num_batches
from bnext.nn import Conv2d, Linear
from bnext.nn.module import Array, Module, Parameter
from bnext.scaling import GradientScaling
from bnext.study.experiment import Settings

__all__ = [
    "Fit",
    "Split",
    "cross_entropy",
    "fit",
    "gradient_norms",
    "initialize",
    "measure",
    "predict",
    "split",
    "trained",
]

Loss = Callable[[Array, Array], tuple[float, Callable[[], Array]]]
"""``loss(outputs, targets) -> value, backward``."""


@dataclass(frozen=True)
class Split:
    """The data of one seed: inputs normalized by the training part, float32."""

    x_train: Array
    y_train: Array
    x_validation: Array
    y_validation: Array
    x_test: Array
    y_test: Array
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.x_train.shape[1:]

    def replace(self, **arrays: Any) -> Split:
        return replace(self, **arrays)


def split(dataset: Dataset, settings: Settings, seed: int) -> Split:
    """Draw ``train``, ``validation`` and ``test`` samples, by `seed` alone.

    Training and validation come from the training part of the data, the test samples from its
    test part. The digits have no official test part, so theirs is drawn anew for each seed.
    If there are too few for all, each part gets its share.
    """
    rng = np.random.default_rng([seed, 1])
    wanted = [settings["train"], settings["validation"], settings["test"]]
    if dataset.name == "digits":
        x = np.concatenate([dataset.x_train, dataset.x_test])
        y = np.concatenate([dataset.y_train, dataset.y_test])
        train, validation, test = _parts(rng.permutation(len(x)), wanted)
        x_test, y_test = x[test], y[test]
    else:
        x, y = dataset.x_train, dataset.y_train
        train, validation = _parts(rng.permutation(len(x)), wanted[:2])
        test = rng.permutation(len(dataset.x_test))[: wanted[2]]
        x_test, y_test = dataset.x_test[test], dataset.y_test[test]
    normalizer = Normalizer.fit(x[train])
    return Split(
        normalizer(x[train]),
        y[train],
        normalizer(x[validation]),
        y[validation],
        normalizer(x_test),
        y_test,
        dataset.num_classes,
    )


def _parts(order: NDArray[np.intp], sizes: list[int]) -> list[NDArray[np.intp]]:
    share = min(1.0, len(order) / sum(sizes))
    edges = np.cumsum([math.floor(size * share) for size in sizes])
    return np.split(order[: edges[-1]], edges[:-1])


def initialize(model: Module, seed: int, scale: float = 1.0) -> None:
    """He's initial weights, drawn for each layer by itself, so that arms of a seed share them.

    `scale` multiplies those of all layers but the last. Biases are 0.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear | Conv2d)]
    for index, layer in enumerate(layers):
        weight = layer.weight.data
        draw = np.random.default_rng([seed, 2, index]).normal(size=weight.shape)
        factor = scale if index < len(layers) - 1 else 1.0
        weight[...] = draw * factor * math.sqrt(2 / weight[0].size)
        if layer.bias is not None:
            layer.bias.data[...] = 0
    bnext.manual_seed(seed)  # dropout


def cross_entropy(outputs: Array, targets: Array) -> tuple[float, Callable[[], Array]]:
    """Softmax cross-entropy."""
    return losses.softmax_cross_entropy(outputs, targets)


@dataclass
class Fit:
    """How a training went.

    Attributes
    ----------
    losses : list of float
        Of each step.
    checks : list of (step, accuracy in percent)
        On the validation data, if asked for.
    diverged : bool
        Whether the loss became NaN or infinite, which ended it.
    """

    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    diverged: bool = False


def fit(
    model: Module,
    data: Split,
    *,
    seed: int,
    lr: float,
    epochs: float,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    loss: Loss = cross_entropy,
    scaling: GradientScaling | None = None,
    max_norm: float | None = None,
    parameters: Iterable[tuple[str, Parameter]] | None = None,
    by_class: bool = False,
    check_every: int = 0,
    before_step: Callable[[int, int], None] | None = None,
    after_step: Callable[[int, optim.SGD], None] | None = None,
) -> Fit:
    """Train by stochastic gradient descent; the order of the samples follows from `seed`.

    Parameters
    ----------
    epochs : float
        Need not be whole.
    schedule : str
        See `bnext.schedules.build`.
    parameters : iterable of (name, Parameter), optional
        What is trained; by default all of the model.
    by_class : bool
        Each batch holds samples of one class (where the class has enough), in random order.
    check_every : int
        Steps between two looks at the validation data; 0: never.
    before_step, after_step : callable, optional
        ``before_step(step, steps)`` and ``after_step(step, optimizer)``, steps from 0.
    """
    per_epoch = num_batches(len(data.x_train), batch_size)
    steps = max(1, round(epochs * per_epoch))
    rate = schedules.build(schedule, lr, epochs=1, steps_per_epoch=steps)
    optimizer = optim.SGD(
        model.named_parameters() if parameters is None else parameters,
        lr,
        momentum=momentum,
        weight_decay=weight_decay,
        scaling=scaling,
        max_norm=max_norm,
    )
    order = _by_class if by_class else _shuffled
    result = Fit()
    step = 0
    # What overflows ends in a loss that is not finite, and that is what we report.
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        while step < steps:
            epoch = step // per_epoch
            for inputs, targets in order(data, batch_size, seed, epoch):
                if before_step is not None:
                    before_step(step, steps)
                model.train()
                optimizer.lr = rate(step)
                optimizer.zero_grad()
                outputs, backward = model.forward(inputs)
                value, loss_backward = loss(outputs, targets)
                result.losses.append(float(value))
                if not math.isfinite(value):
                    result.diverged = True
                    return result
                backward(loss_backward())
                optimizer.step()
                if after_step is not None:
                    after_step(step, optimizer)
                step += 1
                if check_every and step % check_every == 0:
                    logits = predict(model, data.x_validation)
                    result.checks.append((step, _accuracy(logits, data.y_validation)))
                if step == steps:
                    break
    return result


def _shuffled(data: Split, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Array, Array]]:
    return batches(data.x_train, data.y_train, batch_size, shuffle=True, seed=seed, epoch=epoch)


def _by_class(data: Split, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Array, Array]]:
    rng = np.random.default_rng([seed, 4, epoch])
    shuffled = rng.permutation(len(data.y_train))
    order = shuffled[np.argsort(data.y_train[shuffled], kind="stable")]
    count = num_batches(len(order), batch_size)
    parts = np.split(order, [batch_size * number for number in range(1, count)])
    for number in rng.permutation(count):
        yield data.x_train[parts[number]], data.y_train[parts[number]]


def trained(
    model: Module, data: Split, settings: Settings, seed: int, **options: Any
) -> tuple[Fit, dict[str, float | None]]:
    """`initialize`, `fit` with the settings that it knows, and `measure`."""
    initialize(model, seed, settings.get("init", 1.0))
    names = ("lr", "epochs", "batch_size", "weight_decay", "schedule", "max_norm", "by_class")
    known = {name: settings[name] for name in names if name in settings}
    result = fit(model, data, seed=seed, **{**known, **options})
    return result, {**measure(model, data), "diverged": float(result.diverged)}


def predict(model: Module, x: Array, batch_size: int = 1000) -> Array:
    """Outputs in evaluation: running statistics, no dropout."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.concatenate(
            [model(x[start : start + batch_size]) for start in range(0, len(x), batch_size)]
        )


def measure(model: Module, data: Split, *, train: bool = True) -> dict[str, float | None]:
    """Accuracy in percent and mean cross-entropy in nats, in evaluation.

    A loss that is not finite is None.
    """
    parts = {
        "validation": (data.x_validation, data.y_validation),
        "test": (data.x_test, data.y_test),
    }
    if train:
        parts["train"] = (data.x_train[:2000], data.y_train[:2000])
    found: dict[str, float | None] = {}
    for name, (x, y) in parts.items():
        logits = predict(model, x)
        found[f"{name}_accuracy"] = _accuracy(logits, y)
        found[f"{name}_loss"] = loss_of(logits, y)
    return found


def loss_of(logits: Array, y: Array) -> float | None:
    """Mean cross-entropy in nats; None if it is not finite."""
    with np.errstate(all="ignore"):
        value = float(losses.softmax_cross_entropy(logits, y)[0])
    return value if math.isfinite(value) else None


def _accuracy(logits: Array, y: Array) -> float:
    return 100 * float(np.mean(logits.argmax(axis=1) == y))


def gradient_norms(model: Module, data: Split, batch_size: int = 64) -> list[float]:
    """Norm of each weight's gradient on the first training samples, first layer first.

    In training mode; running statistics stay as they are.
    """
    model.train()
    model.zero_grad()
    with bnext.nn.stats_updates(model, False), np.errstate(all="ignore"):
        outputs, backward = model.forward(data.x_train[:batch_size])
        backward(cross_entropy(outputs, data.y_train[:batch_size])[1]())
    norms = [
        float(np.linalg.norm(layer.weight.grad.astype(np.float64)))
        for layer in model.modules()
        if isinstance(layer, Linear | Conv2d) and layer.weight.grad is not None
    ]
    model.zero_grad()
    return norms


def macro_f1(labels: Array, predicted: Array, num_classes: int) -> float:
    """Mean F1 score over the classes, in percent; a class that is never right has 0."""
    scores = []
    for label in range(num_classes):
        right = np.count_nonzero((labels == label) & (predicted == label))
        wrong = np.count_nonzero((labels == label) != (predicted == label))
        scores.append(2 * right / (2 * right + wrong) if right else 0.0)
    return 100 * float(np.mean(scores))


def calibration_error(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy, in bins of confidence."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[which == number].mean() - right[which == number].mean())
        * np.mean(which == number)
        for number in range(bins)
        if np.any(which == number)
    ]
    return float(np.sum(gaps))


def softmax(logits: Array) -> Array:
    """Probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponential = np.exp(shifted)
    shares: Array = exponential / exponential.sum(axis=1, keepdims=True)
    return shares
