"""12: the gradient through mean and variance."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

KINDS = {"full": "full gradient", "detached": "statistics taken for constants"}
RATES = (0.003, 0.03, 0.3)


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{label}, lr {rate:g}": {
            **scale.sizes(scale.pick(500, None)),
            "kind": kind,
            "lr": rate,
            "epochs": scale.pick(15, 6),
        }
        for kind, label in KINDS.items()
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    layer = nn.BatchNorm if settings["kind"] == "full" else networks.DetachedBatchNorm

    def unit(width: int) -> list[Module]:
        return [layer(width, activation="relu")]

    model = networks.mlp(data.input_shape, data.num_classes, [128, 128], unit)
    training.initialize(model, seed)
    first = next(module for module in model if isinstance(module, nn.Linear)).weight.data
    before = float(np.linalg.norm(first))
    found = training.trained(model, data, settings, seed)[1]
    with np.errstate(all="ignore"):
        return {**found, "norm_growth": float(np.linalg.norm(first.astype(np.float64))) / before}


def contrasts(results: Results) -> list[Contrast]:
    full, detached = results.best(kind="full"), results.best(kind="detached")
    same_rate = results.arm(kind="detached", lr=full.settings["lr"])
    return [
        Contrast(
            "accuracy, each at its best rate: full gradient - detached statistics",
            full.values("test_accuracy"),
            detached.values("test_accuracy"),
            margin=0.5,
            claims={"L20": {"higher": "refined", "same": "supported", "lower": "refuted"}},
            says={
                "higher": "The gradient has to go through mean and variance: it is worth {effect} "
                "against statistics taken for constants."
            },
            topic="how much",
        ),
        Contrast(
            f"growth of the weights at rate {full.settings['lr']:g}: detached / full",
            same_rate.values("norm_growth"),
            full.values("norm_growth"),
            unit="times",
            margin=1.1,
            claims={"L20": {"higher": "refined", "same": "supported"}},
        ),
        Contrast(
            f"accuracy at rate {RATES[-1]:g}: full gradient - detached statistics",
            results.arm(kind="full", lr=RATES[-1]).values("test_accuracy"),
            results.arm(kind="detached", lr=RATES[-1]).values("test_accuracy"),
            claims={"L20": {"higher": "refined"}},
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    for kind, label in KINDS.items():
        arms = [results.arm(kind=kind, lr=rate) for rate in RATES]
        plots.lines(left, RATES, arms, "test_accuracy", label)
        plots.lines(right, RATES, arms, "norm_growth", label)
    left.set_ylabel("test accuracy, %")
    right.set_ylabel("norm of the first weights / initial")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
    left.legend()


EXPERIMENT = Experiment(
    name="detached-statistics",
    number=12,
    title="The gradient through mean and variance",
    question="Is it enough to standardise and then minimise, with statistics as constants?",
    design="Two hidden layers of 128 with BN; its full gradient, or one that takes mean and "
    "variance of the batch for constants; three learning rates.",
    expected="Detached, the norm of the weights grows and training suffers.",
    claims=("L20",),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("test_accuracy", "test accuracy, %"),
        ("test_loss", "test loss, nats"),
        ("norm_growth", "norm / initial"),
        ("diverged", "share of diverged runs"),
    ),
)
