"""14: class imbalance, focal loss, and several tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import losses
from bnext.data import Dataset
from bnext.nn.module import Array
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

LOSSES = {
    "cross-entropy": "cross-entropy",
    "weighted": "cross-entropy, weighted by class",
    "focal 1": "focal loss, gamma 1",
    "focal 2": "focal loss, gamma 2",
}
NORMS = {"none": "plain", "batch": "BN"}
RATES = (0.02, 0.1)
RATIO = 100  # of the largest class to the smallest


def arms(scale: Scale) -> dict[str, Settings]:
    plans = [("imbalanced", "batch", loss) for loss in LOSSES]
    plans += [("imbalanced", "none", "cross-entropy")]
    plans += [("balanced", norm, "cross-entropy") for norm in NORMS]
    found: dict[str, Settings] = {
        f"{balance}, {NORMS[norm]}, {LOSSES[loss]}, lr {rate:g}": {
            **scale.sizes(),
            "lr": rate,
            "epochs": scale.pick(30, 12),
            "task": "classes",
            "balance": balance,
            "norm": norm,
            "loss": loss,
        }
        for balance, norm, loss in plans
        for rate in RATES
    }
    return found | {
        f"class and brightness, {weights} weights, brightness in units of 1/{units}": {
            **scale.sizes(),
            "lr": 0.05,
            "epochs": scale.pick(8, 6),
            "task": "both",
            "weights": weights,
            "units": units,
        }
        for weights in ("fixed", "learned")
        for units in (1, 10)
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    return (_two_tasks if settings["task"] == "both" else _classes)(settings, data, seed)


def _classes(settings: Settings, data: training.Split, seed: int) -> dict[str, Any]:
    counts = np.bincount(data.y_train, minlength=data.num_classes)
    # A tail that falls exponentially; as many samples in all if balanced.
    tail = counts.min() * RATIO ** (-np.arange(data.num_classes) / (data.num_classes - 1))
    wanted = np.maximum(tail.round().astype(int), 2)
    if settings["balance"] == "balanced":
        wanted = np.full(data.num_classes, max(2, round(wanted.mean())))
    kept = np.concatenate(
        [np.flatnonzero(data.y_train == label)[:count] for label, count in enumerate(wanted)]
    )
    data = data.replace(x_train=data.x_train[kept], y_train=data.y_train[kept])
    unit = networks.batch_norm if settings["norm"] == "batch" else networks.plain
    model = networks.mlp(data.input_shape, data.num_classes, [128, 128], unit)
    kind = settings["loss"]
    weight = wanted.mean() / wanted

    def loss(logits: Array, labels: Array) -> tuple[float, Callable[[], Array]]:
        if kind.startswith("focal"):
            return losses.softmax_focal_loss(logits, labels, gamma=float(kind[-1]))
        return losses.softmax_cross_entropy(
            logits, labels, weight=weight if kind == "weighted" else None
        )

    _, found = training.trained(model, data, settings, seed, loss=loss, batch_size=32)
    logits = training.predict(model, data.x_test)
    return {
        **found,
        "macro_f1": training.macro_f1(data.y_test, logits.argmax(axis=1), data.num_classes),
        "calibration": 100 * training.calibration_error(training.softmax(logits), data.y_test)
        if np.isfinite(logits).all()
        else None,
    }


def _two_tasks(settings: Settings, data: training.Split, seed: int) -> dict[str, Any]:
    """Class, and the mean of the pixels by regression, whose loss depends on its units."""
    classes, units = data.num_classes, settings["units"]

    def brightness(x: Array) -> Array:
        means = x.reshape(len(x), -1).mean(axis=1)
        scaled: Array = units * means / means.std()
        return scaled

    weighting = losses.UncertaintyWeighting(["classification", "regression"])
    learned = settings["weights"] == "learned"

    def loss(outputs: Array, targets: Array) -> tuple[float, Callable[[], Array]]:
        first, first_backward = losses.softmax_cross_entropy(
            np.ascontiguousarray(outputs[:, :classes]), targets[:, 0].astype(np.int64)
        )
        error = outputs[:, classes] * np.float32(units) - targets[:, 1]
        second = float(np.mean(error**2))
        total, backward = weighting.forward(np.array([first, second]))

        def both() -> Array:
            factors = backward(np.ones(())) if learned else np.array([1.0, 0.5])
            grad = np.empty_like(outputs)
            grad[:, :classes] = factors[0] * first_backward()
            grad[:, classes] = factors[1] * 2 * error * units / len(error)
            return grad

        return float(total) if learned else first + second / 2, both

    model = networks.mlp(data.input_shape, classes + 1, [64, 64], networks.batch_norm)
    targets = np.stack([data.y_train, brightness(data.x_train)], axis=1)
    named = [*model.named_parameters()]
    if learned:
        named.append(("log_variances", weighting.log_variances))
    training.initialize(model, seed)
    training.fit(
        model,
        data.replace(y_train=targets),
        seed=seed,
        lr=settings["lr"],
        epochs=settings["epochs"],
        loss=loss,
        parameters=named,
        before_step=lambda *_: setattr(weighting.log_variances, "grad", None),
    )
    outputs = training.predict(model, data.x_test)
    error = outputs[:, classes] - brightness(data.x_test) / units
    right = outputs[:, :classes].argmax(axis=1) == data.y_test
    return {
        "test_accuracy": 100 * float(np.mean(right)),
        "brightness_error": float(np.mean(error**2)),
    }


def contrasts(results: Results) -> list[Contrast]:
    def values(metric: str, loss: str) -> NDArray[np.float64]:
        return results.best(balance="imbalanced", norm="batch", loss=loss).values(metric)

    def gain(balance: str) -> NDArray[np.float64]:
        bn, plain = (
            results.best(balance=balance, norm=norm, loss="cross-entropy").values("macro_f1")
            for norm in ("batch", "none")
        )
        return bn - plain

    def task(weights: str, units: int) -> NDArray[np.float64]:
        return results.arm(task="both", weights=weights, units=units).values("test_accuracy")

    return [
        Contrast(
            "macro F1, imbalance 100:1: focal loss (gamma 2) - cross-entropy",
            values("macro_f1", "focal 2"),
            values("macro_f1", "cross-entropy"),
            margin=1.0,
            unit="points of F1",
            claims={"L66": {"higher": "refined", "same": "refuted", "lower": "refuted"}},
            says={
                "higher": "At an imbalance of 100:1 focal loss brings {effect}; it is a loss for "
                "one task.",
                "same": "At an imbalance of 100:1 focal loss makes no difference that matters: "
                "{effect}.",
                "lower": "At an imbalance of 100:1 focal loss costs {size}.",
            },
        ),
        Contrast(
            "macro F1, imbalance 100:1: weighted by class - cross-entropy",
            values("macro_f1", "weighted"),
            values("macro_f1", "cross-entropy"),
            margin=1.0,
            unit="points of F1",
            says={
                "higher": "At an imbalance of 100:1 weights by class bring {effect}.",
                "lower": "At an imbalance of 100:1 weights by class cost {size}.",
            },
        ),
        Contrast(
            "gain by BN (macro F1): imbalanced - balanced data of the same size",
            gain("imbalanced"),
            gain("balanced"),
            margin=2.0,
            unit="points of F1",
            claims={"L38a": {"lower": "supported", "same": "refuted", "higher": "refuted"}},
            says={
                "lower": "BN helps less on imbalanced data than on balanced, by {size}.",
                "same": "BN helps as much on imbalanced data as on balanced: {effect}.",
                "higher": "BN helps more on imbalanced data than on balanced, by {size}.",
            },
        ),
        Contrast(
            "two tasks, fixed weights: second loss 100 times as large - as it is",
            task("fixed", 10),
            task("fixed", 1),
            claims={"L66": {"lower": "refined"}},
            says={
                "lower": "With two tasks and fixed weights, other units of the second loss change "
                "the accuracy of the first by {effect}."
            },
            topic="how much",
        ),
        Contrast(
            "two tasks, second loss 100 times as large: learned weights - fixed",
            task("learned", 10),
            task("fixed", 10),
            claims={"L66": {"higher": "refined", "lower": "refuted"}},
            says={
                "higher": "With two tasks in different units, weights learned by uncertainty bring "
                "{effect} over fixed ones: that is what multi-task losses are for."
            },
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    found = [results.best(balance="imbalanced", norm="none", loss="cross-entropy")]
    found += [results.best(balance="imbalanced", norm="batch", loss=loss) for loss in LOSSES]
    labels = ["plain, CE", "BN, CE", "BN, weighted", "BN, focal 1", "BN, focal 2"]
    plots.bars(left, found, "macro_f1", labels, "macro F1, % (imbalance 100:1)")
    tasks = results.arms(task="both")
    labels = [f"{arm.settings['weights']}, 1/{arm.settings['units']}" for arm in tasks]
    plots.bars(right, tasks, "test_accuracy", labels, "test accuracy, % (two tasks)")


EXPERIMENT = Experiment(
    name="imbalance",
    number=14,
    title="Class imbalance, focal loss and several tasks",
    question="Does imbalance break BN, and what do focal and multi-task losses do?",
    design="Class sizes that fall exponentially to a hundredth, test data balanced as they are; "
    "two hidden layers of 128; cross-entropy plain or weighted by class, focal loss. Two tasks, "
    "class and mean brightness, where the units of brightness make its loss 100 times as "
    "large; weights fixed or learned by uncertainty. Two learning rates, "
    "the better chosen on validation data; for two tasks 0.05.",
    expected="Small effects of focal loss; weighting by uncertainty does not mind the units.",
    claims=("L38a", "L66"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("macro_f1", "macro F1, %"),
        ("test_accuracy", "test accuracy, %"),
        ("calibration", "calibration error, points"),
        ("brightness_error", "brightness, mean squared error"),
    ),
)
