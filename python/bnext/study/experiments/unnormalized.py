"""13: channels and layers left unnormalized, and what BatchNorm's parameters are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

KINDS = {
    "none": "no BN",
    "first": "BN in the first layer only",
    "half": "BN for half of the channels",
    "all": "BN everywhere",
    "bare": "BN without weight and bias",
    "only": "nothing but BN's weight and bias trained",
    "last": "nothing but the last layer trained",
}
RATES = (0.02, 0.1)


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{label}, lr {rate:g}": {
            **scale.sizes(),
            "kind": kind,
            "hidden": [64] * scale.pick(4, 6),
            "lr": rate * (5 if kind in ("only", "last") else 1),
            "epochs": scale.pick(8, 6),
        }
        for kind, label in KINDS.items()
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    kind = settings["kind"]
    layers = 0

    def unit(width: int) -> list[Module]:
        nonlocal layers
        layers += 1
        if kind == "none" or (kind == "first" and layers > 1):
            return [nn.ReLU()]
        mask = [channel % 2 == 0 for channel in range(width)] if kind == "half" else None
        return [nn.BatchNorm(width, affine=kind != "bare", channel_mask=mask, activation="relu")]

    model = networks.mlp(data.input_shape, data.num_classes, settings["hidden"], unit)
    trained = None
    if kind == "only":
        norms = [module for module in model if isinstance(module, nn.BatchNorm)]
        trained = [
            (f"{index}.{name}", parameter)
            for index, norm in enumerate(norms)
            for name, parameter in norm.named_parameters()
        ]
    elif kind == "last":
        trained = list(list(model)[-1].named_parameters())
    _, found = training.trained(model, data, settings, seed, parameters=trained)
    # Always the most frequent class.
    return {**found, "chance": 100 * float(np.bincount(data.y_test).max()) / len(data.y_test)}


def contrasts(results: Results) -> list[Contrast]:
    accuracy: dict[str, NDArray[np.float64]] = {
        kind: results.best(kind=kind).values("test_accuracy") for kind in KINDS
    }
    return [
        Contrast(
            "BN everywhere - no BN",
            accuracy["all"],
            accuracy["none"],
            margin=0.5,
            claims={"L47d": {"higher": "supported", "same": "refined", "lower": "refuted"}},
            says={
                "higher": "In a fully connected network of several layers, BN after each brings "
                "{effect}.",
                "same": "In a fully connected network of several layers, BN after each makes no "
                "difference that matters: {effect}.",
                "lower": "In a fully connected network of several layers, BN after each costs "
                "{size}.",
            },
        ),
        Contrast(
            "BN everywhere - in the first layer only",
            accuracy["all"],
            accuracy["first"],
            margin=0.5,
            claims={"L47d": {"higher": "supported", "same": "refined", "lower": "refuted"}},
            says={
                "higher": "Several BN layers are better than one, by {effect}.",
                "same": "One BN layer, the first, is as good as one after each: {effect}.",
                "lower": "One BN layer, the first, is better than one after each: {effect}.",
            },
            topic="where",
        ),
        Contrast(
            "BN for half of the channels - for all",
            accuracy["half"],
            accuracy["all"],
            margin=0.5,
            claims={"L47c": {"same": "supported", "higher": "supported", "lower": "refuted"}},
            says={
                "same": "Half of the channels can do without BN: {effect}.",
                "higher": "Half of the channels without BN are better than all with it: {effect}.",
                "lower": "Half of the channels without BN cost accuracy: {effect}.",
            },
            topic="where",
        ),
        Contrast(
            "BN with weight and bias - without",
            accuracy["all"],
            accuracy["bare"],
            margin=0.5,
            claims={"L19": {"higher": "refined", "same": "supported", "lower": "supported"}},
            says={
                "higher": "BN's weight and bias are worth {effect}.",
                "same": "BN's weight and bias make no difference that matters here: {effect}.",
            },
            topic="how much",
        ),
        Contrast(
            "nothing but BN's weight and bias trained - chance",
            accuracy["only"],
            results.best(kind="only").values("chance"),
            claims={"L19": {"higher": "refined"}},
            says={
                "higher": "A network with random weights of which only BN's weight and bias are "
                "trained is better than chance by {effect}: they are parameters in their own "
                "right."
            },
            anchors={"frankle": "higher"},
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    best = [results.best(kind=kind) for kind in KINDS]
    plots.bars(figure.subplots(), best, "test_accuracy", list(KINDS.values()), "test accuracy, %")


EXPERIMENT = Experiment(
    name="unnormalized",
    number=13,
    title="Channels and layers without BatchNorm",
    question="How many layers and channels need BN, and what are its weight and bias worth?",
    design="Four to six hidden layers of 64 with BN before ReLU: in none, the first or all "
    "layers; for every other channel; without weight and bias; and with random weights where only "
    "BN's parameters, or only the last layer, are trained. Two learning rates.",
    expected="The more BN, the better, with little left for the last half; weight and bias matter "
    "little beside the weights, yet they alone learn a lot.",
    claims=("L19", "L47c", "L47d"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
