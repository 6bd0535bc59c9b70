"""11: what weight decay does before BatchNorm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn, optim
from bnext.data import Dataset
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

DECAY = 5e-3
KINDS = {
    "none": "no decay",
    "decay": "weight decay",
    "matched": "no decay, norms as with it",
}
NORMS = {"none": "plain", "batch": "BN"}


def arms(scale: Scale) -> dict[str, Settings]:
    plans = [("batch", kind) for kind in KINDS] + [("none", "none"), ("none", "decay")]
    return {
        f"{NORMS[norm]}, {KINDS[kind]}": {
            **scale.sizes(scale.pick(500, None)),
            "norm": norm,
            "kind": kind,
            "lr": 0.1,
            "schedule": "constant",
            "epochs": scale.pick(25, 8),
        }
        for norm, kind in plans
    }


def _model(settings: Settings, data: training.Split) -> nn.Sequential:
    unit = networks.batch_norm if settings["norm"] == "batch" else networks.plain
    return networks.mlp(data.input_shape, data.num_classes, [128, 128], unit)


def _hidden(model: nn.Sequential) -> list[nn.Linear]:
    """All but the last: those that are normalized, if any are."""
    return [layer for layer in model if isinstance(layer, nn.Linear)][:-1]


def _norms(model: nn.Sequential) -> list[float]:
    return [float(np.linalg.norm(layer.weight.data)) for layer in _hidden(model)]


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    track: list[list[float]] = []
    if settings["kind"] == "matched":
        # First the training with decay, for the norm of each layer after each step.
        model = _model(settings, data)
        _decayed(model, data, settings, seed, lambda *_: track.append(_norms(model)))
        other = _model(settings, data)

        def rescale(step: int, _: optim.SGD) -> None:
            for layer, norm in zip(_hidden(other), track[step], strict=True):
                layer.weight.data *= np.float32(norm / np.linalg.norm(layer.weight.data))

        found = training.trained(other, data, settings, seed, after_step=rescale)[1]
        return {**found, **_growth(other, _model(settings, data), seed)}
    model = _model(settings, data)
    if settings["kind"] == "decay":
        found = _decayed(model, data, settings, seed, None)
    else:
        found = training.trained(model, data, settings, seed)[1]
    return {**found, **_growth(model, _model(settings, data), seed)}


def _decayed(
    model: nn.Sequential, data: training.Split, settings: Settings, seed: int, after_step: Any
) -> dict[str, Any]:
    last = [layer for layer in model if isinstance(layer, nn.Linear)][-1]
    last.weight.decay = False  # nothing normalizes its output
    return training.trained(model, data, settings, seed, weight_decay=DECAY, after_step=after_step)[
        1
    ]


def _growth(model: nn.Sequential, initial: nn.Sequential, seed: int) -> dict[str, float]:
    """Norms of the first layer's weights, and how far they moved, over the initial norm."""
    training.initialize(initial, seed)
    now, then = _hidden(model)[0].weight.data, _hidden(initial)[0].weight.data
    norm = np.linalg.norm(then)
    return {
        "norm_growth": float(np.linalg.norm(now) / norm),
        "distance": float(np.linalg.norm(now - then) / norm),
    }


def contrasts(results: Results) -> list[Contrast]:
    def values(metric: str, norm: str, kind: str) -> NDArray[np.float64]:
        return results.arm(norm=norm, kind=kind).values(metric)

    return [
        Contrast(
            "training loss with BN: weight decay / none",
            values("train_loss", "batch", "decay"),
            values("train_loss", "batch", "none"),
            unit="times",
            margin=1.25,
        ),
        Contrast(
            "accuracy with BN: weight decay - none",
            values("test_accuracy", "batch", "decay"),
            values("test_accuracy", "batch", "none"),
            margin=0.5,
            says={
                "higher": f"With BN, weight decay of {DECAY:g} brings {{effect}}.",
                "same": f"With BN, weight decay of {DECAY:g} makes no difference that matters to "
                "accuracy: {effect}.",
                "lower": f"With BN, weight decay of {DECAY:g} costs {{size}}.",
            },
            topic="how much",
        ),
        Contrast(
            "accuracy with BN: no decay but the same norms - weight decay",
            values("test_accuracy", "batch", "matched"),
            values("test_accuracy", "batch", "decay"),
            margin=0.5,
            claims={"L28c": {"same": "refuted", "lower": "supported", "higher": "refuted"}},
            says={
                "same": "Weight decay before BN does the same as setting the norms of the weights, "
                "which BN makes meaningless but for the step size: {effect} of difference."
            },
            topic="how much",
        ),
        Contrast(
            "distance of the weights from the initial ones: BN / plain",
            values("distance", "batch", "none"),
            values("distance", "none", "none"),
            unit="times",
            margin=1.1,
            claims={"L28c": {"lower": "supported", "same": "refuted", "higher": "refuted"}},
        ),
        Contrast(
            "growth of the norm of the weights without decay: BN / plain",
            values("norm_growth", "batch", "none"),
            values("norm_growth", "none", "none"),
            unit="times",
            margin=1.1,
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    arms = list(results)
    labels = [f"{NORMS[arm.settings['norm']]}, {KINDS[arm.settings['kind']]}" for arm in arms]
    plots.bars(left, arms, "test_accuracy", labels, "test accuracy, %")
    plots.bars(right, arms, "norm_growth", [""] * len(arms), "norm of weights / initial")


EXPERIMENT = Experiment(
    name="weight-decay",
    number=11,
    title="Weight decay under BatchNorm",
    question="Does BN restrain weights, and what does weight decay do before BN?",
    design=f"Two hidden layers of 128; weight decay {DECAY:g} on the layers before BN; and "
    "without decay, but with the norm of each layer set after each step to what it was with "
    "decay. Learning rate 0.1, no learning-rate decay.",
    expected="The effect of weight decay is that of the norms, which set the effective rate.",
    claims=("L28c",),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("train_loss", "training loss, nats"),
        ("test_accuracy", "test accuracy, %"),
        ("norm_growth", "norm / initial"),
        ("distance", "distance / initial norm"),
    ),
)
