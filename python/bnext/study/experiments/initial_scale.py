"""2: the scale of the initial weights, with and without BatchNorm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext.data import Dataset
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

SCALES = (0.1, 1.0, 10.0)
RATES = (0.01, 0.1, 0.5)
NORMS = {"none": "plain", "batch": "BN"}


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{label}, initial weights x {init:g}, lr {rate:g}": {
            **scale.sizes(),
            "norm": norm,
            "init": init,
            "lr": rate,
            "hidden": [128, 128],
            "epochs": 10 * scale.epochs,
        }
        for norm, label in NORMS.items()
        for init in SCALES
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    unit = networks.batch_norm if settings["norm"] == "batch" else networks.plain
    model = networks.mlp(data.input_shape, data.num_classes, settings["hidden"], unit)
    return training.trained(model, data, settings, seed)[1]


def _table(results: Results, norm: str) -> NDArray[np.float64]:
    """Test accuracy for each scale at its best learning rate, and each seed."""
    return np.array([results.best(norm=norm, init=init).values("test_accuracy") for init in SCALES])


def contrasts(results: Results) -> list[Contrast]:
    plain, bn = _table(results, "none"), _table(results, "batch")
    return [
        Contrast(
            "spread of accuracy over initial scales 0.1 to 10: BN - plain",
            np.ptp(bn, axis=0),
            np.ptp(plain, axis=0),
            claims={
                "L12": {"lower": "supported", "higher": "refuted"},
                "L25b": {"lower": "supported", "higher": "refuted"},
            },
            says={
                "lower": "With initial weights from a tenth to ten times the usual, accuracy "
                "varies less with BN than without, by {size}: use BN when you cannot choose "
                "them well."
            },
        ),
        Contrast(
            "BN: initial weights ten times too large - usual",
            bn[2],
            bn[1],
            margin=1.0,
            claims={"L25b": {"same": "supported", "lower": "refined"}},
            says={
                "same": "With BN, initial weights ten times too large make no difference that "
                "matters: {effect}.",
                "lower": "Even with BN, initial weights ten times too large cost accuracy: "
                "{effect}.",
            },
            topic="how much",
        ),
        Contrast(
            "plain: initial weights ten times too large - usual",
            plain[2],
            plain[1],
            margin=1.0,
            says={
                "lower": "Without BN, initial weights ten times too large cost accuracy: {effect}."
            },
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    for norm, label in NORMS.items():
        best = [results.best(norm=norm, init=init) for init in SCALES]
        plots.lines(axes, SCALES, best, "test_accuracy", label)
    axes.set_xscale("log")
    axes.set_xlabel("scale of the initial weights, 1: He et al.")
    axes.set_ylabel("test accuracy, %")
    axes.legend()


EXPERIMENT = Experiment(
    name="initial-scale",
    number=2,
    title="Initial weights and BatchNorm",
    question="Does BN make up for poor initial weights?",
    design="Two hidden layers of 128; all weights but the last layer's are multiplied by 0.1, 1 "
    "or 10; three learning rates, the best chosen on validation data.",
    expected="With BN less than a point of spread.",
    claims=("L12", "L25b"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
