"""3: depth, with and without BatchNorm and residual connections."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

KINDS = {"plain": "plain", "bn": "BN", "skip": "BN and residual connections"}
RATES = (0.01, 0.05)
WIDTH = 32


def arms(scale: Scale) -> dict[str, Settings]:
    depths = scale.pick((2, 8, 20), (2, 10, 30))
    # Half of He's weights: the signal of a plain network falls by half in each layer.
    plans = [(kind, depth, 1.0) for kind in KINDS for depth in depths]
    plans += [("plain", depths[-1], 0.5), ("bn", depths[-1], 0.5)]
    return {
        f"{KINDS[kind]}, {depth} layers, {'half' if init < 1 else 'usual'} initial weights, "
        f"lr {rate:g}": {
            **scale.sizes(),
            "kind": kind,
            "depth": depth,
            "init": init,
            "lr": rate,
            "epochs": 5 * scale.epochs,
        }
        for kind, depth, init in plans
        for rate in RATES
    }


def _block() -> Module:
    return nn.Residual(
        nn.Sequential(nn.BatchNorm(WIDTH, activation="relu"), nn.Linear(WIDTH, WIDTH))
    )


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    shape, classes, depth = data.input_shape, data.num_classes, settings["depth"]
    model: Module
    if settings["kind"] == "skip":
        model = networks.residual(shape, classes, WIDTH, _block, depth - 1)
    else:
        unit = networks.batch_norm if settings["kind"] == "bn" else networks.plain
        model = networks.mlp(shape, classes, [WIDTH] * depth, unit)
    training.initialize(model, seed, settings["init"])
    # Without the first and the last layer, which have other shapes.
    norms = training.gradient_norms(model, data)[1:-1]
    ratio = np.log10(norms[0] / norms[-1]) if min(norms) > 0 else None
    _, found = training.trained(model, data, settings, seed)
    return {**found, "gradient_ratio": ratio}


def _gradients(results: Results, kind: str, depth: int) -> NDArray[np.float64]:
    """First over last; all learning rates begin alike."""
    arm = results.arm(kind=kind, depth=depth, init=1.0, lr=RATES[0])
    return np.asarray(10 ** arm.values("gradient_ratio"))


def contrasts(results: Results) -> list[Contrast]:
    depths = sorted({arm.settings["depth"] for arm in results})
    deep = depths[-1]

    def accuracy(kind: str, depth: int = deep, init: float = 1.0) -> NDArray[np.float64]:
        return results.best(kind=kind, depth=depth, init=init).values("test_accuracy")

    return [
        Contrast(
            f"{deep} layers, poor initial weights: BN - plain",
            accuracy("bn", init=0.5),
            accuracy("plain", init=0.5),
            claims={"L25c": {"higher": "supported", "lower": "refuted"}},
            says={
                "higher": f"In {deep} layers whose initial weights let the signal vanish, BN "
                "brings {effect}: use it when a deep network does not start to learn."
            },
        ),
        Contrast(
            f"{deep} layers, He's initial weights: BN - plain",
            accuracy("bn"),
            accuracy("plain"),
            claims={"L25c": {"higher": "supported", "lower": "refuted"}},
            says={
                "higher": f"In {deep} layers with good initial weights, BN brings {{effect}}.",
                "lower": f"In {deep} layers with good initial weights and no residual "
                "connections, BN costs accuracy: {effect}.",
            },
        ),
        Contrast(
            f"gradient of the first over that of the last layer, {deep} layers: BN / plain",
            _gradients(results, "bn", deep),
            _gradients(results, "plain", deep),
            unit="times",
            claims={"L25c": {"higher": "refuted", "lower": "supported"}},
            says={
                "higher": f"In {deep} layers without residual connections BN makes gradients grow "
                "towards the input, {effect} as much as without BN: it does not stop explosion."
            },
            topic="how much",
        ),
        Contrast(
            f"gradient of the first over that of the last layer, {deep} layers: residual / BN",
            _gradients(results, "skip", deep),
            _gradients(results, "bn", deep),
            unit="times",
            claims={"L68": {"lower": "supported", "higher": "refuted"}},
        ),
        Contrast(
            f"{deep} layers with BN: residual connections - none",
            accuracy("skip"),
            accuracy("bn"),
            margin=0.5,
            claims={"L68": {"higher": "supported", "same": "refined", "lower": "refuted"}},
            says={
                "higher": f"In {deep} layers with BN, residual connections bring {{effect}}: a "
                "deep network needs both."
            },
            topic="where",
        ),
        Contrast(
            f"BN and residual connections: {deep} layers - {depths[0]}",
            accuracy("skip"),
            accuracy("skip", depths[0]),
            margin=1.0,
            claims={"L68": {"higher": "supported", "same": "refined", "lower": "refined"}},
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    depths = sorted({arm.settings["depth"] for arm in results})
    for kind, label in KINDS.items():
        best = [results.best(kind=kind, depth=depth, init=1.0) for depth in depths]
        plots.lines(left, depths, best, "test_accuracy", label)
        plots.lines(right, depths, best, "gradient_ratio", label)
    left.set_ylabel("test accuracy, %")
    right.set_ylabel("log10 of gradient norms, first / last layer")
    for axes in (left, right):
        axes.set_xlabel("hidden layers")
    left.legend()


EXPERIMENT = Experiment(
    name="depth",
    number=3,
    title="Depth, vanishing and exploding gradients",
    question="Does BN solve vanishing and exploding gradients, and what do residual connections "
    "add?",
    design="Up to 30 hidden layers of 32 units, plain, with BN, and as residual blocks with BN "
    "and ReLU before the linear layer; at the greatest depth also with initial weights of half "
    "the scale. Gradient norms are of the initial network.",
    expected="BN rescues poor initial weights; without residual connections gradients explode "
    "with BN, with them they do not.",
    claims=("L25c", "L68"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("test_accuracy", "test accuracy, %"),
        ("gradient_ratio", "log10 gradient ratio"),
        ("diverged", "share of diverged runs"),
    ),
)
