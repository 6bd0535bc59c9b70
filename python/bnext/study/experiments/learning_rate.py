"""1: learning rate and its decay, with and without BatchNorm."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnext.data import Dataset
from bnext.study import networks, plots, training
from bnext.study.experiment import Arm, Contrast, Experiment, Results, Scale, Settings

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# "step" divides the rate by 10 after each third: the strongest decay of the three.
DECAYS = {"constant": "none", "cosine": "to 0", "step": "in steps"}


def arms(scale: Scale) -> dict[str, Settings]:
    plans = [("constant", rate) for rate in RATES]
    plans += [(decay, rate) for decay in ("step", "cosine") for rate in RATES[3:5]]
    return {
        f"{'BN' if norm == 'batch' else 'plain'}, lr {rate:g}, decay {DECAYS[decay]}": {
            **scale.sizes(),
            "norm": norm,
            "lr": rate,
            "decay": decay,
            "hidden": [128, 128],
            "epochs": 12 * scale.epochs,
        }
        for decay, rate in plans
        for norm in ("none", "batch")
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    unit = networks.batch_norm if settings["norm"] == "batch" else networks.plain
    model = networks.mlp(data.input_shape, data.num_classes, settings["hidden"], unit)
    fit, found = training.trained(
        model, data, settings, seed, schedule=settings["decay"], check_every=8
    )
    return {**found, "checks": [accuracy for _, accuracy in fit.checks]}


def _steps(arm: Arm, target: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Steps until the validation accuracy is `target`; one check more than all if it never is."""
    curves = arm.curves("checks")
    return np.array([8.0 * (np.argmax([*(row >= target), True]) + 1) for row in curves])


def _largest(results: Results, norm: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of the rates without decay, for each seed."""
    table = np.array(
        [
            results.arm(norm=norm, decay="constant", lr=rate).values("test_accuracy")
            for rate in RATES
        ]
    )
    learns = table >= 0.8 * table.max(axis=0)
    return np.asarray(np.max(np.where(learns, np.array(RATES)[:, np.newaxis], 0), axis=0))


def contrasts(results: Results) -> list[Contrast]:
    bn = results.best(norm="batch", decay="constant")
    plain = results.best(norm="none", decay="constant")
    target = 0.95 * plain.mean("validation_accuracy")
    low_bn = results.arm(norm="batch", decay="constant", lr=RATES[0])
    low_plain = results.arm(norm="none", decay="constant", lr=RATES[0])
    high_bn = results.arm(norm="batch", decay="constant", lr=RATES[-1])
    high_plain = results.arm(norm="none", decay="constant", lr=RATES[-1])
    low_gain = low_bn.values("test_accuracy") - low_plain.values("test_accuracy")
    high_gain = high_bn.values("test_accuracy") - high_plain.values("test_accuracy")
    decay_gain = {
        norm: results.best(norm=norm, decay="step").values("test_accuracy")
        - results.best(norm=norm, decay="constant").values("test_accuracy")
        for norm in ("batch", "none")
    }
    return [
        Contrast(
            "accuracy, each at its best learning rate: BN - plain",
            bn.values("test_accuracy"),
            plain.values("test_accuracy"),
            margin=0.5,
            claims={
                "L10c": {"higher": "supported", "same": "refined", "lower": "refuted"},
                "L41a": {"higher": "refined", "same": "supported", "lower": "supported"},
            },
            says={
                "higher": "With the learning rate tuned for each, BN brings {effect} of accuracy "
                "in a fully connected network, too.",
                "same": "With the learning rate tuned for each, BN makes no difference that "
                "matters to accuracy in a shallow network: {effect}.",
                "lower": "With the learning rate tuned for each, BN costs {size} of accuracy in "
                "a shallow fully connected network.",
                "open": "With the learning rate tuned for each, a difference in accuracy by BN "
                "could not be shown in a shallow network: {effect}.",
            },
        ),
        Contrast(
            f"steps to {target:.1f} % validation accuracy, each at its best rate: BN / plain",
            _steps(bn, target),
            _steps(plain, target),
            unit="times",
            margin=1.25,
            claims={"L10c": {"lower": "supported", "same": "refined", "higher": "refuted"}},
            says={
                "lower": "At its best learning rate a network with BN needs {effect} the steps of "
                "one without.",
                "higher": "At its best learning rate a network with BN needs {effect} the steps "
                "of one without: more.",
            },
        ),
        Contrast(
            f"gain by BN at learning rate {RATES[0]:g}, the smallest",
            low_gain,
            claims={"L31": {"higher": "supported", "lower": "refuted"}},
        ),
        Contrast(
            f"gain by BN at learning rate {RATES[-1]:g}, the largest",
            high_gain,
            claims={"L63": {"higher": "supported", "lower": "refuted"}},
            says={
                "higher": f"At a learning rate of {RATES[-1]:g}, where the plain network fails, "
                "BN brings {effect}: use it when the learning rate is large or not tuned."
            },
            topic="when",
        ),
        Contrast(
            "gain by BN: at the largest rate minus at the smallest",
            high_gain - low_gain,
            claims={"L31": {"higher": "refuted", "lower": "supported"}},
            says={
                "higher": "The gain by BN grows with the learning rate, by {effect} from "
                f"{RATES[0]:g} to {RATES[-1]:g}; it is not largest at small rates.",
                "lower": "The gain by BN falls with the learning rate, by {effect} from "
                f"{RATES[0]:g} to {RATES[-1]:g}.",
            },
            topic="how much",
        ),
        Contrast(
            "largest rate that still learns (80 % of the best accuracy): BN / plain",
            _largest(results, "batch"),
            _largest(results, "none"),
            unit="times",
            claims={
                "L12": {"higher": "supported", "lower": "refuted"},
                "L63": {"higher": "supported", "lower": "refuted"},
            },
            says={
                "higher": "The largest learning rate that still works is {effect} as large with "
                "BN (of the rates tried)."
            },
            topic="how much",
        ),
        Contrast(
            "with BN: decay in steps - no decay, each at its best rate",
            decay_gain["batch"],
            margin=0.5,
            claims={"L64": {"higher": "refuted", "same": "refined", "lower": "supported"}},
            says={
                "higher": "With BN, a strong decay of the learning rate brings {effect}.",
                "same": "With BN, decay of the learning rate makes no difference that matters "
                "here: {effect}.",
                "lower": "With BN, a strong decay of the learning rate costs {size}.",
            },
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    for norm, label in (("none", "plain"), ("batch", "BN")):
        chosen = [results.arm(norm=norm, decay="constant", lr=rate) for rate in RATES]
        plots.lines(left, RATES, chosen, "test_accuracy", label)
        best = results.best(norm=norm, decay="constant")
        curve = best.curves("checks").mean(axis=0)
        right.plot(
            8 * np.arange(1, len(curve) + 1), curve, label=f"{label}, lr {best.settings['lr']:g}"
        )
    left.set_xscale("log")
    left.set_xlabel("learning rate, no decay")
    left.set_ylabel("test accuracy, %")
    left.legend()
    right.set_xlabel("step")
    right.set_ylabel("validation accuracy, %")
    right.legend()


EXPERIMENT = Experiment(
    name="learning-rate",
    number=1,
    title="Learning rate and BatchNorm",
    question="Does BN make training faster and better, and at which learning rates?",
    design="Two hidden layers of 128 with ReLU, with and without BN before it; SGD with momentum "
    "0.9, batches of 64; seven learning rates without decay, three with decay. Learning rates are "
    "compared on validation data.",
    expected="BN is stable at rates ten times as large; no difference at the smallest.",
    claims=("L10c", "L12", "L31", "L41a", "L63", "L64"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
