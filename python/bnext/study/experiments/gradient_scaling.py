"""15: gradients scaled by the statistics of BatchNorm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.scaling import BNP, BatchNormScaling, GradientScaling
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

SCALES = (0.1, 1.0, 10.0)
KINDS = {
    "0": "BN, not scaled",
    "0.5": "BN, alpha 1/2",
    "1": "BN, alpha 1",
    "none": "plain",
    "bnp": "plain, BNP",
}
RATES = (0.02, 0.1)


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{label}, initial weights x {init:g}, lr {rate:g}": {
            **scale.sizes(scale.pick(600, None)),
            "kind": kind,
            "init": init,
            "lr": rate,
            "epochs": scale.pick(8, 5),
        }
        for kind, label in KINDS.items()
        for init in (SCALES if kind in ("0", "0.5", "1") else (1.0,))
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    shape, classes, kind = data.input_shape, data.num_classes, settings["kind"]
    scaling: GradientScaling | None = None
    if kind in ("none", "bnp"):
        features = int(np.prod(shape))
        layers: list[Module] = [nn.Flatten()]
        for outputs in (128, 128, classes):
            if kind == "bnp":
                layers.append(nn.InputStatistics(features))
            layers += [nn.Linear(features, outputs), nn.ReLU()]
            features = outputs
        model = nn.Sequential(*layers[:-1])
        if kind == "bnp":
            scaling = BNP(model)
    else:
        model = networks.mlp(shape, classes, [128, 128], networks.batch_norm)
        if float(kind) > 0:
            scaling = BatchNormScaling(model, alpha=float(kind), ref=1.0, clip=None)
    return training.trained(model, data, settings, seed, scaling=scaling)[1]


def contrasts(results: Results) -> list[Contrast]:
    def table(kind: str) -> NDArray[np.float64]:
        return np.array(
            [results.best(kind=kind, init=init).values("test_accuracy") for init in SCALES]
        )

    spread = {kind: np.ptp(table(kind), axis=0) for kind in ("0", "0.5", "1")}
    usual = {kind: results.best(kind=kind, init=1.0).values("test_accuracy") for kind in KINDS}
    return [
        Contrast(
            "spread over initial scales 0.1 to 10: alpha 1 - not scaled",
            spread["1"],
            spread["0"],
            claims={"L65": {"lower": "supported", "higher": "refuted"}},
            says={
                "lower": "Gradients scaled by BN's variances (alpha 1) narrow the spread over "
                "initial scales by {size}: worth it when initial weights are far off."
            },
        ),
        Contrast(
            "spread over initial scales with alpha 1",
            spread["1"],
            0.0,
            margin=0.5,
            claims={"L65": {"same": "supported"}},
        ),
        Contrast(
            "usual initial weights: alpha 1 - not scaled",
            usual["1"],
            usual["0"],
            margin=0.5,
            claims={"L65": {"higher": "supported", "same": "refined", "lower": "refined"}},
            says={
                "same": "With good initial weights, scaling gradients by BN's variances makes no "
                "difference that matters: {effect}.",
                "higher": "With good initial weights, scaling gradients by BN's variances brings "
                "{effect}.",
                "lower": "With good initial weights, scaling gradients by BN's variances costs "
                "{size}.",
            },
            topic="how much",
        ),
        Contrast(
            "usual initial weights: alpha 1/2 - not scaled",
            usual["0.5"],
            usual["0"],
            margin=0.5,
            claims={"L65": {"higher": "supported", "same": "refined", "lower": "refined"}},
        ),
        Contrast(
            "without BN: preconditioned by BNP - plain",
            usual["bnp"],
            usual["none"],
            margin=0.5,
            says={
                "higher": "Where there is no BN, steps preconditioned by the statistics of inputs "
                "(BNP) bring {effect}.",
                "lower": "Where there is no BN, steps preconditioned by the statistics of inputs "
                "(BNP) cost {size}.",
            },
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    for kind in ("0", "0.5", "1"):
        best = [results.best(kind=kind, init=init) for init in SCALES]
        plots.lines(axes, SCALES, best, "test_accuracy", KINDS[kind])
    axes.set_xscale("log")
    axes.set_xlabel("scale of the initial weights, 1: He et al.")
    axes.set_ylabel("test accuracy, %")
    axes.legend()


EXPERIMENT = Experiment(
    name="gradient-scaling",
    number=15,
    title="Gradients scaled by BatchNorm's statistics",
    question="Does it help to scale gradients by the statistics of BN?",
    design="Two hidden layers of 128 with BN; the gradient of each weight row times the running "
    "variance of its channel to the power alpha (ref 1, no clipping); initial weights times 0.1, "
    "1 and 10; two learning rates. Without BN: plain, and preconditioned by BNP.",
    expected="With alpha 1 the initial scale does not matter; no gain at good initial weights.",
    claims=("L65",),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
