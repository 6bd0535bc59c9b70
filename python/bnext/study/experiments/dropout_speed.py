"""16: what dropout does to time, steps and gradients."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, training
from bnext.study.experiment import Arm, Contrast, Experiment, Results, Scale, Settings

CHECK = 5
RATES = (0.03, 0.1)


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{depth} layers, {f'dropout {p:g}' if p else 'no dropout'}, lr {rate:g}": {
            **scale.sizes(scale.pick(600, None)),
            "depth": depth,
            "p": p,
            "lr": rate,
            "epochs": scale.pick(20, 8),
        }
        for depth in (2, scale.pick(6, 8))
        for p in (0.0, 0.5)
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)

    def unit(_: int) -> list[Module]:
        return [nn.ReLU(), nn.Dropout(settings["p"])] if settings["p"] else [nn.ReLU()]

    model = networks.mlp(data.input_shape, data.num_classes, [128] * settings["depth"], unit)
    training.initialize(model, seed)
    norms = np.array([training.gradient_norms(model, data)[1:-1] for _ in range(10)]).mean(axis=0)
    started = time.process_time()
    fit = training.fit(model, data, seed=seed, lr=settings["lr"], epochs=1, schedule="constant")
    per_step = (time.process_time() - started) / len(fit.losses)
    fit, found = training.trained(model, data, settings, seed, check_every=CHECK)
    return {
        **found,
        "milliseconds": 1e3 * per_step,
        "gradient_ratio": float(norms[0] / norms[-1]) if norms.size and norms[-1] > 0 else None,
        "checks": [accuracy for _, accuracy in fit.checks],
    }


def _steps(arm: Arm, target: float) -> NDArray[np.float64]:
    """Until the validation accuracy is `target`; one check more than all if it never is."""
    curves = arm.curves("checks")
    return np.array([CHECK * (np.argmax([*(row >= target), True]) + 1.0) for row in curves])


def contrasts(results: Results) -> list[Contrast]:
    depths = sorted({arm.settings["depth"] for arm in results})
    shallow, deep = depths
    found = []
    for depth in depths:
        without, with_dropout = results.best(depth=depth, p=0.0), results.best(depth=depth, p=0.5)
        target = 0.9 * without.mean("validation_accuracy")
        found.append(
            Contrast(
                f"steps to 90 % of the plain accuracy, {depth} layers: dropout 0.5 / none",
                _steps(with_dropout, target),
                _steps(without, target),
                unit="times",
                margin=1.25,
                claims={"L54": {"lower": "supported", "same": "refuted", "higher": "refuted"}},
                says={
                    "higher": f"In {depth} layers, dropout of 0.5 needs {{effect}} the steps to "
                    "get to 90 % of the accuracy without: it slows training down.",
                    "lower": f"In {depth} layers, dropout of 0.5 needs {{effect}} the steps.",
                },
                topic="how much",
            )
        )
    found.append(
        Contrast(
            f"time of a step, {shallow} layers: dropout / none",
            results.best(depth=shallow, p=0.5).values("milliseconds"),
            results.best(depth=shallow, p=0.0).values("milliseconds"),
            unit="times",
            margin=1.25,
            claims={"L54": {"lower": "supported", "same": "refuted", "higher": "refuted"}},
        )
    )
    found.append(
        Contrast(
            f"gradient of the second over that of the last hidden layer, {deep} layers: "
            "dropout 0.5 / none",
            results.best(depth=deep, p=0.5).values("gradient_ratio"),
            results.best(depth=deep, p=0.0).values("gradient_ratio"),
            unit="times",
            margin=1.25,
            claims={"L55": {"same": "refuted"}},
            says={
                "same": "Dropout leaves the ratio of gradients between first and last layers "
                "as it is: {effect}.",
                "higher": "Dropout changes the ratio of gradients between first and last layers: "
                "{effect}.",
                "lower": "Dropout changes the ratio of gradients between first and last layers: "
                "{effect}.",
            },
            topic="how much",
        )
    )
    found.append(
        Contrast(
            f"accuracy, {deep} layers: dropout 0.5 - none",
            results.best(depth=deep, p=0.5).values("test_accuracy"),
            results.best(depth=deep, p=0.0).values("test_accuracy"),
            margin=0.5,
            claims={"L55": {"higher": "supported", "same": "refuted", "lower": "refuted"}},
            says={
                "lower": f"In {deep} layers dropout of 0.5 after each changes accuracy by "
                "{effect}: it is no help for depth."
            },
        )
    )
    return found


def plot(figure: Any, results: Results) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    depths = sorted({arm.settings["depth"] for arm in results})
    for axes, depth in zip(panels, depths, strict=True):
        for p in (0.0, 0.5):
            curve = results.best(depth=depth, p=p).curves("checks").mean(axis=0)
            axes.plot(CHECK * np.arange(1, len(curve) + 1), curve, label=f"dropout {p:g}")
        axes.set_title(f"{depth} layers")
        axes.set_xlabel("step")
    panels[0].set_ylabel("validation accuracy, %")
    panels[0].legend()


EXPERIMENT = Experiment(
    name="dropout-speed",
    number=16,
    title="Dropout, speed and gradients",
    question="Does dropout speed training up, or help with vanishing and exploding gradients?",
    design="Two and more hidden layers of 128 with dropout of 0.5 after each ReLU, or none; "
    "processor time of a step, steps to 90 % of the accuracy without dropout, gradient norms of "
    "the initial network (mean over ten masks). Two learning rates, "
    "the better chosen on validation data.",
    expected="Slower; no effect on gradients.",
    claims=("L54", "L55"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("test_accuracy", "test accuracy, %"),
        ("milliseconds", "ms of a step"),
        ("gradient_ratio", "gradient ratio"),
    ),
)
