"""8: where BatchNorm goes in residual blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

PLACES = {
    "pre": "before each layer",
    "before": "before the addition",
    "after": "after the addition",
}
RATES = (0.02, 0.1)
WIDTH = 32


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{label}, {blocks} blocks, lr {rate:g}": {
            **scale.sizes(scale.pick(500, None)),
            "place": place,
            "blocks": blocks,
            "lr": rate,
            "epochs": scale.pick(8, 4),
        }
        for place, label in PLACES.items()
        for blocks in scale.pick((3, 12), (4, 20))
        for rate in RATES
    }


def _norm(activation: str | None = None) -> nn.BatchNorm:
    return nn.BatchNorm(WIDTH, activation=activation)


def _linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _block(place: str) -> Module:
    if place == "pre":
        return nn.Residual(nn.Sequential(_norm("relu"), _linear(), _norm("relu"), _linear()))
    body = nn.Sequential(_linear(), _norm("relu"), _linear())
    if place == "before":
        # relu(BN(body(x)) + x)
        return nn.Residual(body, norm=_norm("relu"))
    return nn.Sequential(nn.Residual(body), _norm("relu"))


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    model = networks.residual(
        data.input_shape,
        data.num_classes,
        WIDTH,
        lambda: _block(settings["place"]),
        settings["blocks"],
    )
    return training.trained(model, data, settings, seed)[1]


def _depths(results: Results) -> tuple[int, int]:
    blocks = {arm.settings["blocks"] for arm in results}
    return min(blocks), max(blocks)


def contrasts(results: Results) -> list[Contrast]:
    shallow, deep = _depths(results)

    def accuracy(place: str, blocks: int) -> NDArray[np.float64]:
        return results.best(place=place, blocks=blocks).values("test_accuracy")

    gap = {
        blocks: accuracy("after", blocks) - accuracy("before", blocks) for blocks in (shallow, deep)
    }
    return [
        Contrast(
            f"{deep} blocks: BN after the addition - before it",
            gap[deep],
            margin=0.5,
            claims={"L47b": {"higher": "refuted", "lower": "refuted", "same": "supported"}},
            says={
                "lower": f"In {deep} residual blocks BN after the addition, on the shortcut's way, "
                "changes accuracy by {effect}: put it into the branch.",
                "higher": f"In {deep} residual blocks BN after the addition is better by "
                "{effect}.",
                "same": f"In {deep} residual blocks the place of BN makes no difference that "
                "matters: {effect}.",
            },
            anchors={"add-deep": "lower"},
            topic="where",
        ),
        Contrast(
            f"{shallow} blocks: BN after the addition - before it",
            gap[shallow],
            margin=0.5,
            claims={"L47b": {"higher": "refuted", "lower": "refuted", "same": "refined"}},
            says={
                "same": f"In {shallow} residual blocks it does not matter whether BN comes before "
                "or after the addition: {effect}.",
            },
            anchors={"add-shallow": "same"},
            topic="where",
        ),
        Contrast(
            f"what BN after the addition costs: {deep} blocks - {shallow}",
            gap[deep],
            gap[shallow],
            claims={"L47b": {"lower": "refuted"}},
        ),
        Contrast(
            f"{deep} blocks: BN before each layer - before the addition",
            accuracy("pre", deep),
            accuracy("before", deep),
            margin=0.5,
            says={
                "higher": f"In {deep} residual blocks, BN and ReLU before each layer are better "
                "than BN before the addition: {effect}.",
                "lower": f"In {deep} residual blocks, BN and ReLU before each layer are worse "
                "than BN before the addition: {effect}.",
            },
            topic="where",
        ),
        Contrast(
            f"BN before each layer: {deep} blocks - {shallow}",
            accuracy("pre", deep),
            accuracy("pre", shallow),
            margin=1.0,
            claims={"L68": {"higher": "supported", "same": "refined", "lower": "refuted"}},
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    depths = _depths(results)
    for place, label in PLACES.items():
        best = [results.best(place=place, blocks=blocks) for blocks in depths]
        plots.lines(axes, depths, best, "test_accuracy", f"BN {label}")
    axes.set_xlabel("residual blocks of two layers")
    axes.set_ylabel("test accuracy, %")
    axes.set_xticks(depths)
    axes.legend()


EXPERIMENT = Experiment(
    name="residual-position",
    number=8,
    title="BatchNorm in residual blocks",
    question="Can BN be put anywhere in a residual block?",
    design="Residual blocks of two linear layers of 32: BN and ReLU before each layer; BN before "
    "the addition and ReLU after it; BN and ReLU after the addition. Few and many blocks, two "
    "learning rates.",
    expected="No difference in few blocks; in many, BN after the addition is worse.",
    claims=("L47b", "L68"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
