"""10: dropout that makes a network underfit, and whether L2 helps against it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings
from bnext.study.statistics import t_interval

WHEN = {"never": "no dropout", "always": "dropout", "early": "first half", "late": "second half"}
RATES = (0.03, 0.1)


def arms(scale: Scale) -> dict[str, Settings]:
    narrow, wide = 16, scale.pick(192, 256)
    return {
        f"{width} units, {WHEN[when]}{' only' if when in ('early', 'late') else ''}, "
        f"L2 {decay:g}, lr {rate:g}": {
            **scale.sizes(scale.pick(500, None)),
            "width": width,
            "when": when,
            "weight_decay": decay,
            "lr": rate,
            "epochs": 16 * scale.pick(1, 0.5),
        }
        for width in (narrow, wide)
        for when in WHEN
        for decay in (0.0, 1e-3)
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    when = settings["when"]

    def unit(_: int) -> list[Module]:
        return [nn.ReLU()] if when == "never" else [nn.ReLU(), nn.Dropout(0.5)]

    model = networks.mlp(data.input_shape, data.num_classes, [settings["width"]] * 2, unit)
    dropouts = [layer for layer in model if isinstance(layer, nn.Dropout)]

    def switch(step: int, steps: int) -> None:
        first = step < steps / 2
        on = when == "always" or (when == "early") == first
        for layer in dropouts:
            layer.p = 0.5 if on else 0.0

    return training.trained(model, data, settings, seed, before_step=switch)[1]


def contrasts(results: Results) -> list[Contrast]:
    widths = sorted({arm.settings["width"] for arm in results})
    narrow, wide = widths

    def values(metric: str, width: int, when: str, decay: float = 0.0) -> NDArray[np.float64]:
        return results.best(width=width, when=when, weight_decay=decay).values(metric)

    return [
        Contrast(
            f"training loss, {narrow} units: dropout 0.5 / none",
            values("train_loss", narrow, "always"),
            values("train_loss", narrow, "never"),
            unit="times",
            margin=1.25,
            claims={"L59a": {"higher": "supported", "same": "refuted", "lower": "refuted"}},
            says={
                "higher": f"In a narrow network ({narrow} units) dropout of 0.5 makes the training "
                "loss {effect} as large: it underfits."
            },
            topic="how much",
        ),
        Contrast(
            f"accuracy, {narrow} units: dropout 0.5 - none",
            values("test_accuracy", narrow, "always"),
            values("test_accuracy", narrow, "never"),
            margin=0.5,
            claims={"L59a": {"lower": "supported", "higher": "refuted", "same": "refined"}},
            says={
                "lower": f"In a narrow network ({narrow} units) dropout of 0.5 changes accuracy by "
                "{effect}: do not use it where there is nothing to spare."
            },
        ),
        Contrast(
            f"accuracy, {wide} units: dropout 0.5 - none",
            values("test_accuracy", wide, "always"),
            values("test_accuracy", wide, "never"),
            margin=0.5,
            claims={"L51": {"higher": "supported", "same": "refined", "lower": "refuted"}},
            says={
                "higher": f"In a wide network ({wide} units) dropout of 0.5 brings {{effect}}.",
                "same": f"In a wide network ({wide} units) dropout of 0.5 makes no difference "
                "that matters: {effect}.",
                "lower": f"In a wide network ({wide} units) dropout of 0.5 costs {{size}}.",
            },
        ),
        Contrast(
            f"training loss, {narrow} units with dropout: L2 0.001 / no L2",
            values("train_loss", narrow, "always", 1e-3),
            values("train_loss", narrow, "always"),
            unit="times",
            margin=1.1,
            claims={"L59b": {"lower": "supported", "same": "refuted", "higher": "refuted"}},
            says={
                "higher": "L2 on top of dropout makes underfitting worse, not better: {effect} "
                "the training loss.",
                "same": "L2 on top of dropout does not change underfitting: {effect} the training "
                "loss.",
                "lower": "L2 on top of dropout lowers the training loss: {effect}.",
            },
            topic="how much",
        ),
        Contrast(
            f"accuracy, {narrow} units with dropout: L2 0.001 - no L2",
            values("test_accuracy", narrow, "always", 1e-3),
            values("test_accuracy", narrow, "always"),
            margin=0.5,
            claims={"L59b": {"higher": "supported", "same": "refuted", "lower": "refuted"}},
        ),
        Contrast(
            f"accuracy, {narrow} units: dropout in the first half only - throughout",
            values("test_accuracy", narrow, "early"),
            values("test_accuracy", narrow, "always"),
            margin=0.5,
            says={
                "higher": "A network that underfits is better with dropout in the first half of "
                "training only than throughout: {effect}."
            },
            anchors={"early-dropout": "higher"},
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    panels = figure.subplots(1, 2)
    for axes, width in zip(panels, sorted({arm.settings["width"] for arm in results}), strict=True):
        for decay, color in ((0.0, 0), (1e-3, 1)):
            for position, when in enumerate(WHEN):
                arm = results.best(width=width, when=when, weight_decay=decay)
                middle, half = t_interval(arm.values("test_accuracy")[:, np.newaxis])
                axes.errorbar(
                    [position + 0.1 * color],
                    middle,
                    half,
                    fmt="o",
                    capsize=3,
                    color=plots.COLORS[color],
                    label=f"L2 {decay:g}" if position == 0 else None,
                )
        axes.set_xticks(range(len(WHEN)), ["none", "always", "1st half", "2nd half"])
        axes.set_title(f"{width} units")
        axes.set_xlabel("dropout 0.5")
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend()


EXPERIMENT = Experiment(
    name="underfitting",
    number=10,
    title="Dropout, underfitting and L2",
    question="When does dropout underfit, and does L2 help against it?",
    design="Two hidden layers, narrow or wide; dropout of 0.5 never, always, in the first or the "
    "second half of training; with and without weight decay of 0.001. Two learning rates with "
    "cosine decay, the better chosen on validation data.",
    expected="Narrow networks underfit; L2 is no cure.",
    claims=("L51", "L59a", "L59b"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("train_loss", "training loss, nats"),
        ("train_accuracy", "training accuracy, %"),
        ("test_accuracy", "test accuracy, %"),
        ("test_loss", "test loss, nats"),
    ),
)
