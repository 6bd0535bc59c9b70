"""5: batch size, and batches that are not drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

NORMS = {"batch": "BN", "group": "GroupNorm", "renorm": "batch renormalization"}
# For batches of 32; in proportion for others.
RATES = (0.02, 0.1)


def arms(scale: Scale) -> dict[str, Settings]:
    sizes = scale.pick((2, 8, 32), (2, 4, 8, 32))
    common = {**scale.sizes(scale.pick(400, None)), "epochs": 4 * scale.epochs}
    found: dict[str, Settings] = {
        f"{label}, batches of {size}, lr {rate * size / 32:g}": {
            **common,
            "norm": norm,
            "batch_size": size,
            "rate": rate,
            "lr": rate * size / 32,
            "by_class": False,
        }
        for norm, label in NORMS.items()
        for size in sizes
        for rate in RATES
    }
    found |= {
        f"{label}, batches of 32 of one class, lr {rate:g}": {
            **common,
            "norm": norm,
            "batch_size": 32,
            "rate": rate,
            "lr": rate,
            "by_class": True,
        }
        for norm, label in NORMS.items()
        for rate in RATES
    }
    large = scale.pick(128, 512)
    return found | {
        f"{label}, batches of {large}, lr {rate:g}": {
            **common,
            "norm": norm,
            "batch_size": large,
            "epochs": 3 * common["epochs"],
            "rate": rate,
            "lr": rate,
            "by_class": False,
        }
        for norm, label in (("batch", "BN"), ("ghost", "ghost batches of 16"))
        for rate in (0.1, 0.3)
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    ghost = {"ghost_batch_size": 16} if settings["norm"] == "ghost" else {}

    def unit(width: int) -> list[Module]:
        return [*networks.normalization(settings["norm"], width, **ghost), nn.ReLU()]

    model = networks.mlp(data.input_shape, data.num_classes, [64, 64], unit)
    return training.trained(model, data, settings, seed)[1]


def contrasts(results: Results) -> list[Contrast]:
    def accuracy(norm: str, size: int, by_class: bool = False) -> NDArray[np.float64]:
        best = results.best(norm=norm, batch_size=size, by_class=by_class)
        return best.values("test_accuracy")

    large = max(arm.settings["batch_size"] for arm in results)
    drop = {norm: accuracy(norm, 2) - accuracy(norm, 32) for norm in NORMS}
    return [
        Contrast(
            "BN: batches of 2 - of 32",
            drop["batch"],
            claims={"L36": {"lower": "refuted", "higher": "supported"}},
            says={
                "lower": "With batches of 2 instead of 32, BN changes accuracy by {effect}: do "
                "not use it with a few values per channel."
            },
            anchors={"groupnorm-bn": "lower"},
            topic="when",
        ),
        Contrast(
            "batches of 2: GroupNorm - BN",
            accuracy("group", 2),
            accuracy("batch", 2),
            says={
                "higher": "With batches of 2, GroupNorm, which does not look at the batch, is "
                "better than BN by {effect}."
            },
            anchors={"groupnorm-gn": "higher"},
            topic="how much",
        ),
        Contrast(
            "batches of 8: BN - GroupNorm",
            accuracy("batch", 8),
            accuracy("group", 8),
            margin=1.0,
            says={
                "same": "With batches of 8, BN and GroupNorm differ by nothing that matters: "
                "{effect}.",
                "higher": "With batches of 8, BN is better than GroupNorm again: {effect}.",
                "lower": "With batches of 8, BN is still worse than GroupNorm: {effect}.",
            },
            topic="how much",
        ),
        Contrast(
            "BN: batches of one class - mixed",
            accuracy("batch", 32, by_class=True),
            accuracy("batch", 32),
            claims={
                "L38a": {"lower": "supported", "higher": "refuted"},
                "L36": {"lower": "refuted"},
            },
            says={
                "lower": "With batches that hold a single class each, BN changes accuracy by "
                "{effect}: shuffle. It is the composition of the batches that breaks BN."
            },
            topic="when",
        ),
        Contrast(
            "batches of one class: batch renormalization - BN",
            accuracy("renorm", 32, by_class=True),
            accuracy("batch", 32, by_class=True),
            claims={"L38a": {"higher": "refined"}},
            says={
                "higher": "Where batches cannot be mixed, batch renormalization brings {effect} "
                "over BN.",
            },
            anchors={"renorm-classes": "higher"},
            topic="how much",
        ),
        Contrast(
            f"batches of {large}: ghost batches of 16 - whole batch",
            accuracy("ghost", large),
            accuracy("batch", large),
            margin=0.5,
            claims={"L47a": {"higher": "refined", "same": "supported", "lower": "supported"}},
            says={
                "higher": f"In batches of {large}, statistics of 16 samples each instead of the "
                "whole batch bring {effect}.",
                "same": f"In batches of {large}, statistics of 16 samples each instead of the "
                "whole batch make no difference that matters: {effect}.",
            },
            anchors={"ghost": "higher"},
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    sizes = sorted({arm.settings["batch_size"] for arm in results.arms(norm="group")})
    for norm, label in NORMS.items():
        best = [results.best(norm=norm, batch_size=size, by_class=False) for size in sizes]
        plots.lines(left, sizes, best, "test_accuracy", label)
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, sizes)
    left.set_xlabel("batch size")
    left.set_ylabel("test accuracy, %")
    left.legend()
    sorted_arms = [results.best(norm=norm, by_class=True) for norm in NORMS]
    plots.bars(
        right,
        sorted_arms,
        "test_accuracy",
        ["BN", "Group", "Renorm"],
        "test accuracy, %\n(batches of one class)",
    )


EXPERIMENT = Experiment(
    name="batch-size",
    number=5,
    title="Batch size and composition",
    question="How many samples does BN need, and what if batches are not drawn at random?",
    design="Two hidden layers of 64, as many passes over the data for all batch sizes, learning "
    "rates in proportion to the batch. BN, GroupNorm (8 groups), batch renormalization (r_max 3, "
    "d_max 5 from the start); mixed batches, and batches of a single class in random order; one "
    "large batch whole or in ghost batches of 16.",
    expected="BN degrades at 4 and below and in batches of one class; renormalization recovers.",
    claims=("L36", "L38a", "L47a"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
