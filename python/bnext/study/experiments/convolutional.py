"""7: a convolutional network: BatchNorm before or after the activation, and with dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

# label: norm, its position, activation, dropout before the last layer, BN after the linear layer
VARIANTS: dict[str, tuple[str, str, str, float, bool]] = {
    "plain": ("none", "before", "relu", 0.0, True),
    "dropout": ("none", "before", "relu", 0.5, True),
    "BN, ReLU": ("batch", "before", "relu", 0.0, True),
    "ReLU, BN": ("batch", "after", "relu", 0.0, True),
    "BN, LeakyReLU": ("batch", "before", "leaky", 0.0, True),
    "LeakyReLU, BN": ("batch", "after", "leaky", 0.0, True),
    "BN, ReLU, dropout": ("batch", "before", "relu", 0.5, True),
    "BN, ReLU; none after linear": ("batch", "before", "relu", 0.0, False),
}
RATES = (0.03, 0.1)


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{variant}, lr {rate:g}": {
            **scale.sizes(scale.pick(800, None)),
            "variant": variant,
            "options": list(options),
            "lr": rate,
            "epochs": scale.pick(10, 4),
        }
        for variant, options in VARIANTS.items()
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    norm, position, activation, dropout, dense_norm = settings["options"]

    def unit(channels: int, norm: str = norm) -> list[Module]:
        layers: list[Module] = [nn.LeakyReLU(0.1) if activation == "leaky" else nn.ReLU()]
        where = 0 if position == "before" else 1
        layers[where:where] = networks.normalization(norm, channels)
        return layers

    model = networks.cnn(
        data.input_shape,
        data.num_classes,
        unit,
        dense_unit=None if dense_norm else lambda channels: unit(channels, "none"),
        head=[nn.Dropout(dropout)] if dropout else [],
    )
    return training.trained(model, data, settings, seed)[1]


def contrasts(results: Results) -> list[Contrast]:
    def accuracy(variant: str) -> NDArray[np.float64]:
        return results.best(variant=variant).values("test_accuracy")

    bn = accuracy("BN, ReLU")
    return [
        Contrast(
            "BN (before ReLU) - plain",
            bn,
            accuracy("plain"),
            margin=0.5,
            claims={
                "L7": {"higher": "supported", "same": "refined", "lower": "refuted"},
                "L41a": {"higher": "supported", "lower": "refuted"},
            },
            says={
                "higher": "In a small convolutional network BN brings {effect}, with the learning "
                "rate tuned for both.",
                "same": "In a small convolutional network BN makes no difference that matters "
                "once the learning rate is tuned for both: {effect}.",
                "lower": "In a small convolutional network BN costs {size}, with the learning "
                "rate tuned for both.",
            },
            anchors={"garbin-bn": "higher"},
        ),
        Contrast(
            "BN: after ReLU - before",
            accuracy("ReLU, BN"),
            bn,
            margin=0.5,
            claims={
                "L10b": {"higher": "refined", "same": "supported", "lower": "refined"},
                "L38b": {"higher": "supported", "same": "refuted", "lower": "refuted"},
                "L41b": {"higher": "supported", "same": "refined", "lower": "refuted"},
            },
            says={
                "higher": "After ReLU, BN is better than before it, by {effect}.",
                "same": "Whether BN comes before or after ReLU makes no difference that matters: "
                "{effect}.",
                "lower": "After ReLU, BN is worse than before it: {effect}.",
                "open": "Whether BN is better before or after ReLU could not be shown; after "
                "minus before: {effect}.",
            },
            anchors={"caffenet-order": "higher"},
            topic="where",
        ),
        Contrast(
            "BN: after LeakyReLU - before",
            accuracy("LeakyReLU, BN"),
            accuracy("BN, LeakyReLU"),
            margin=0.5,
            claims={"L41b": {"higher": "supported", "same": "refined", "lower": "refuted"}},
            says={
                "same": "With LeakyReLU neither: {effect}.",
                "higher": "After LeakyReLU, BN is better than before it, by {effect}.",
                "lower": "After LeakyReLU, BN is worse than before it: {effect}.",
            },
            topic="where",
        ),
        Contrast(
            "BN after convolutions only - after the linear layer, too",
            accuracy("BN, ReLU; none after linear"),
            bn,
            margin=0.5,
            claims={"L47c": {"higher": "supported", "same": "supported", "lower": "refuted"}},
            says={
                "same": "The fully connected layer of a convolutional network can do without BN: "
                "{effect}.",
                "higher": "The fully connected layer of a convolutional network is better without "
                "BN: {effect}.",
                "lower": "The fully connected layer of a convolutional network needs BN, too; "
                "without: {effect}.",
            },
            topic="where",
        ),
        Contrast(
            "dropout 0.5 before the last layer - plain",
            accuracy("dropout"),
            accuracy("plain"),
            margin=0.5,
            claims={
                "L7": {"higher": "supported", "same": "refined", "lower": "refuted"},
                "L51": {"higher": "supported", "same": "refined", "lower": "refuted"},
            },
            says={
                "higher": "In a small convolutional network, dropout of 0.5 before the last layer "
                "brings {effect}.",
                "same": "In a small convolutional network, dropout of 0.5 before the last layer "
                "makes no difference that matters: {effect}.",
                "lower": "In a small convolutional network, dropout of 0.5 before the last layer "
                "costs {size}.",
            },
            anchors={"garbin-dropout": "lower"},
        ),
        Contrast(
            "BN and dropout - BN alone",
            accuracy("BN, ReLU, dropout"),
            bn,
            margin=0.5,
            claims={"L62": {"higher": "supported", "same": "refuted", "lower": "refuted"}},
            says={
                "higher": "In a convolutional network with BN, dropout before the last layer adds "
                "{effect}.",
                "same": "In a convolutional network with BN, dropout before the last layer adds "
                "nothing that matters: {effect}.",
                "lower": "In a convolutional network with BN, dropout before the last layer "
                "costs {size}.",
            },
            anchors={"garbin-both": "lower"},
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    best = [results.best(variant=variant) for variant in VARIANTS]
    plots.bars(figure.subplots(), best, "test_accuracy", list(VARIANTS), "test accuracy, %")


EXPERIMENT = Experiment(
    name="convolutional",
    number=7,
    title="Before or after the activation: a convolutional network",
    question="Does BN belong before or after the activation, and what does dropout add?",
    design="Two 3x3 convolutions of 8 and 16 channels with max-pooling, a linear layer of 64, a "
    "last one; BN before or after ReLU or LeakyReLU (slope 0.1), dropout of 0.5 before the last "
    "layer; two learning rates, the best chosen on validation data.",
    expected="Small differences between before and after; BN better than plain; dropout worse "
    "(Garbin et al.).",
    claims=("L7", "L10b", "L38b", "L41a", "L41b", "L47c", "L51", "L62"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
