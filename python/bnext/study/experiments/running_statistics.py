"""6: which statistics evaluation should use, and dropout's scaling."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnext
from bnext import nn
from bnext.data import Dataset, batches
from bnext.nn.module import Array, Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings
from bnext.study.statistics import t_interval

MOMENTA = (0.1, 0.01)
KINDS = {
    "test_accuracy": "running averages",
    "precise": "re-estimated",
    "batch": "of the test batch",
    "untracked": "none: mean 0, variance 1",
}


def arms(scale: Scale) -> dict[str, Settings]:
    common = {**scale.sizes(), "lr": 0.1, "hidden": [128, 128]}
    per_epoch = scale.sizes()["train"] / 64
    found: dict[str, Settings] = {
        f"BN, momentum {momentum:g}, {steps} steps": {
            **common,
            "kind": "bn",
            "momentum": momentum,
            "steps": steps,
            "epochs": steps / per_epoch,
        }
        for momentum in MOMENTA
        for steps in (50, scale.pick(200, 600))
    }
    return found | {
        "dropout 0.5": {**common, "kind": "dropout", "lr": 0.05, "epochs": 10 * scale.epochs}
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)

    def unit(width: int) -> list[Module]:
        if settings["kind"] == "dropout":
            return [nn.ReLU(), nn.Dropout(0.5)]
        return [nn.BatchNorm(width, momentum=settings["momentum"], activation="relu")]

    model = networks.mlp(data.input_shape, data.num_classes, settings["hidden"], unit)
    # The rate stays, so that the weights still move when evaluation comes.
    _, found = training.trained(model, data, settings, seed, schedule="constant")
    if settings["kind"] == "dropout":
        # All units, as in training without the factor 1 / (1 - p) by which they were scaled.
        x = data.x_test
        for layer in model:
            x = 2 * layer(x) if isinstance(layer, nn.Dropout) else layer(x)
        return {
            **found,
            "unscaled": _accuracy(x, data),
            "unscaled_loss": training.loss_of(x, data.y_test),
        }
    model.train()
    with nn.stats_updates(model, False):
        of_batch = model.forward(data.x_test)[0]
    found |= {
        "batch": _accuracy(of_batch, data),
        "batch_loss": training.loss_of(of_batch, data.y_test),
    }
    bnext.reestimate(model, batches(data.x_train, data.y_train, 500))
    precise = training.measure(model, data)
    found |= {"precise": precise["test_accuracy"], "precise_loss": precise["test_loss"]}
    for layer in model:
        if isinstance(layer, nn.BatchNorm):
            layer.reset_running_stats()
    return {**found, "untracked": _accuracy(training.predict(model, data.x_test), data)}


def _accuracy(logits: Array, data: training.Split) -> float:
    return 100 * float(np.mean(logits.argmax(axis=1) == data.y_test))


def contrasts(results: Results) -> list[Contrast]:
    slow = results.arm(momentum=0.01, steps=50)
    fast = results.arm(momentum=0.1, steps=50)
    late = results.arm(
        momentum=0.1, steps=max(arm.settings["steps"] for arm in results.arms(kind="bn"))
    )
    dropout = results.arm(kind="dropout")
    return [
        Contrast(
            "accuracy without population statistics, trained parameters alone - with",
            late.values("untracked"),
            late.values("precise"),
            margin=1.0,
            claims={"L21": {"lower": "refuted", "same": "supported"}},
            says={
                "lower": "What BN needs in testing are statistics of the data, not trained "
                "parameters alone: without them accuracy changes by {effect}."
            },
            topic="how much",
        ),
        Contrast(
            "momentum 0.01 after 50 steps: running averages - re-estimated",
            slow.values("test_accuracy"),
            slow.values("precise"),
            says={
                "lower": "After 50 steps with momentum 0.01 the running statistics still lag: "
                "{effect} against re-estimated ones (bnext.reestimate)."
            },
            topic="how much",
        ),
        Contrast(
            "momentum 0.1 after 50 steps: running averages - re-estimated",
            fast.values("test_accuracy"),
            fast.values("precise"),
            margin=0.5,
            says={
                "same": "With momentum 0.1, running statistics are as good as re-estimated ones "
                "after 50 steps: {effect}.",
                "lower": "With momentum 0.1, running statistics after 50 steps are worse than "
                "re-estimated ones: {effect}.",
            },
            topic="how much",
        ),
        Contrast(
            f"momentum 0.1 after {late.settings['steps']} steps: running averages - re-estimated",
            late.values("test_accuracy"),
            late.values("precise"),
            margin=0.5,
        ),
        Contrast(
            "test loss with dropout, all units: not scaled / scaled",
            dropout.values("unscaled_loss"),
            dropout.values("test_loss"),
            unit="times",
            margin=1.1,
            claims={"L57b": {"higher": "refined", "same": "supported", "lower": "supported"}},
            says={
                "higher": "Using all units in testing without dropout's scaling makes the loss "
                "{effect} as large."
            },
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    for axes, momentum in zip(figure.subplots(1, 2, sharex=True), MOMENTA, strict=True):
        arm = results.arm(momentum=momentum, steps=50)
        rows = np.arange(len(KINDS))[::-1]
        for row, metric in zip(rows, KINDS, strict=True):
            middle, half = t_interval(arm.values(metric)[:, np.newaxis])
            axes.errorbar(middle, [row], xerr=half, fmt="o", color=plots.COLORS[0], capsize=3)
        axes.set_yticks(rows, KINDS.values() if momentum == MOMENTA[0] else [""] * len(KINDS))
        axes.set_xlabel("test accuracy, %")
        axes.set_title(f"momentum {momentum:g}, 50 steps")


EXPERIMENT = Experiment(
    name="running-statistics",
    number=6,
    title="Statistics for evaluation",
    question="How good are running statistics, and what does evaluation need?",
    design="Two hidden layers of 128 with BN of momentum 0.1 and 0.01, learning rate 0.1 without "
    "decay, stopped after 50 steps and later; evaluated with running averages, re-estimated "
    "statistics, those of the test batch, and none. Dropout 0.5 evaluated with and without the "
    "scaling of its outputs.",
    expected="Momentum 0.01 is worst after 50 steps; re-estimation cures it.",
    claims=("L21", "L57b"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("test_accuracy", "running averages, %"),
        ("precise", "re-estimated, %"),
        ("batch", "test batch, %"),
        ("untracked", "none, %"),
        ("unscaled", "unscaled dropout, %"),
    ),
)
