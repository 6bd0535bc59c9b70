"""4: what BatchNorm does to the distributions inside a network."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Array, Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

KINDS = {"none": "plain", "batch": "BN", "noise": "BN, then noise at every step"}
INPUTS = {"usual": "usual inputs", "cubed": "inputs cubed"}
RATES = (0.03, 0.1)


def arms(scale: Scale) -> dict[str, Settings]:
    plans = [(kind, "usual") for kind in KINDS] + [("none", "cubed"), ("batch", "cubed")]
    return {
        f"{KINDS[kind]}, {INPUTS[inputs]}, lr {rate:g}": {
            **scale.sizes(),
            "kind": kind,
            "inputs": inputs,
            "lr": rate,
            "hidden": [128, 128],
            "epochs": 12 * scale.epochs,
        }
        for kind, inputs in plans
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    if settings["inputs"] == "cubed":
        data = data.replace(
            x_train=data.x_train**3, x_validation=data.x_validation**3, x_test=data.x_test**3
        )

    def unit(width: int) -> list[Module]:
        layers: list[Module] = [] if settings["kind"] == "none" else [nn.BatchNorm(width)]
        if settings["kind"] == "noise":
            layers.append(networks.StepNoise(seed))
        return [*layers, nn.ReLU()]

    model = networks.mlp(data.input_shape, data.num_classes, settings["hidden"], unit)
    training.initialize(model, seed)
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    initial = first.weight.data.copy()
    _, found = training.trained(model, data, settings, seed)
    if settings["kind"] == "batch":
        return {**found, **_inside(model, data, first, initial)}
    return found


def _inside(
    model: nn.Sequential, data: training.Split, first: nn.Linear, initial: Array
) -> dict[str, float]:
    """Of the last BatchNorm, in training, without its weight and bias."""
    x = data.x_test[:500]
    layers = list(model)
    last = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm))
    before = x
    for layer in layers[:last]:
        before = layer(before)
    bare = nn.BatchNorm(before.shape[1], affine=False)
    after, _ = bare.forward(before)
    spread = before.std(axis=0)
    z = (before - before.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    shuffled = np.random.default_rng(0).permuted(after, axis=0)
    # The first sample among two sets of companions.
    half = min(64, len(x) // 2)
    companions = (before[:half], before[[0, *range(half, 2 * half - 1)]])
    pair = [bare.forward(part)[0][0] for part in companions]
    old, first.weight.data[...] = first.weight.data.copy(), initial
    swapped = training.predict(model, data.x_test)
    first.weight.data[...] = old
    return {
        "output_mean": float(abs(after.mean(axis=0)).max()),
        "output_variance": float(after.var(axis=0)[spread > 0].mean()),
        "kurtosis": float((z**4).mean() - 3),
        "correlation": _correlation(after),
        "correlation_shuffled": _correlation(shuffled),
        "companions": float(abs(pair[0] - pair[1]).mean()),
        "swapped_accuracy": 100 * float(np.mean(swapped.argmax(axis=1) == data.y_test)),
    }


def _correlation(x: Array) -> float:
    """Mean absolute correlation between channels that vary."""
    varying = x[:, x.std(axis=0) > 1e-3]
    matrix = np.corrcoef(varying, rowvar=False)
    return float(abs(matrix[np.triu_indices(len(matrix), 1)]).mean())


def contrasts(results: Results) -> list[Contrast]:
    best = {kind: results.best(kind=kind, inputs="usual") for kind in KINDS}
    accuracy = {kind: arm.values("test_accuracy") for kind, arm in best.items()}
    bn = best["batch"]
    cubed = {
        kind: results.best(kind=kind, inputs="cubed").values("test_accuracy")
        for kind in ("none", "batch")
    }
    return [
        Contrast(
            "accuracy: BN with unstable distributions - BN",
            accuracy["noise"],
            accuracy["batch"],
            margin=1.0,
            claims={"L10a": {"same": "refuted", "higher": "refuted", "lower": "refined"}},
            says={
                "same": "Noise after BN that shifts and scales every channel anew at each step "
                "makes no difference that matters, {effect}: stable distributions are not why BN "
                "helps.",
                "higher": "Noise after BN that shifts and scales every channel anew at each step "
                "even helps, {effect}: stable distributions are not why BN helps.",
                "lower": "Noise after BN that shifts and scales every channel anew at each step "
                "costs {size}.",
            },
        ),
        Contrast(
            "mean correlation between the channels after BN: as it is - if independent",
            bn.values("correlation"),
            bn.values("correlation_shuffled"),
            unit="",
            margin=0.02,
            claims={"L10a": {"higher": "refuted", "same": "supported"}},
        ),
        Contrast(
            "accuracy with BN: first layer's initial weights put back - trained",
            bn.values("swapped_accuracy"),
            bn.values("test_accuracy"),
            margin=1.0,
            claims={"L25a": {"lower": "refuted", "same": "supported"}},
        ),
        Contrast(
            "variance of what BN gives, without weight and bias, over 1",
            bn.values("output_variance"),
            1.0,
            unit="times",
            margin=1.05,
            claims={"L11": {"same": "supported", "higher": "refuted", "lower": "refuted"}},
        ),
        Contrast(
            "change of a sample's output in standard deviations when its companions change",
            bn.values("companions"),
            0.0,
            unit="",
            claims={"L18": {"higher": "supported"}},
        ),
        Contrast(
            "excess kurtosis of what BN normalizes (normal: 0)",
            bn.values("kurtosis"),
            0.0,
            unit="",
            margin=0.2,
        ),
        Contrast(
            "accuracy with inputs far from normal (cubed): BN - plain",
            cubed["batch"],
            cubed["none"],
            margin=0.5,
            claims={"L35": {"higher": "refuted", "same": "refuted", "lower": "supported"}},
            says={
                "higher": "With heavy-tailed inputs, far from a normal distribution, BN brings "
                "{effect}: it does not assume one."
            },
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    arms = [results.best(kind=kind, inputs="usual") for kind in KINDS]
    plots.bars(left, arms, "test_accuracy", ["plain", "BN", "BN, noise"], "test accuracy, %")
    bn = results.best(kind="batch", inputs="usual")
    for metric, label in (("correlation", "as it is"), ("correlation_shuffled", "if independent")):
        right.plot(results.seeds, bn.values(metric), "o", label=label)
    right.set_ylim(bottom=0)
    right.set_xlabel("seed")
    right.set_ylabel("mean |correlation| of channels after BN")
    right.legend()


EXPERIMENT = Experiment(
    name="distributions",
    number=4,
    title="What BatchNorm does to distributions",
    question="Does BN make layers independent, and does it need normal inputs?",
    design="Two hidden layers of 128, plain, with BN, and with BN followed by noise that shifts "
    "(0.5) and scales (25 %) each channel anew at every step. In the trained network: moments "
    "and correlations of the last BN's output; accuracy when the first layer gets its initial "
    "weights back. Inputs also cubed, which gives them heavy tails.",
    expected="BN with noise trains as well as BN; channels stay correlated; inputs need not be "
    "normal.",
    claims=("L10a", "L11", "L18", "L25a", "L35"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
)
