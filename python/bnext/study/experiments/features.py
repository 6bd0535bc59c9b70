"""18: what dropout and pooling do to features; pruning, calibration, max-norm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import bnext
from bnext import nn
from bnext.data import Dataset
from bnext.nn.module import Array, Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings
from bnext.study.statistics import t_interval

# label: p of dropout, L2, limit of the norm
KINDS: dict[str, tuple[float, float, float | None]] = {
    "plain": (0.0, 0.0, None),
    "L2": (0.0, 1e-3, None),
    "max-norm": (0.0, 0.0, 2.0),
    "dropout": (0.5, 0.0, None),
    "dropout, L2": (0.5, 1e-3, None),
    "dropout, max-norm": (0.5, 0.0, 2.0),
}
RATES = (0.03, 0.1)
SHARES = (0.0, 0.25, 0.5, 0.75)


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{kind}, lr {rate:g}": {
            **scale.sizes(scale.pick(400, None)),
            "kind": kind,
            "p": p,
            "weight_decay": decay,
            "max_norm": limit,
            "lr": rate,
            "epochs": scale.pick(20, 8),
        }
        for kind, (p, decay, limit) in KINDS.items()
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)

    def unit(_: int) -> list[Module]:
        return [nn.ReLU(), nn.Dropout(settings["p"])] if settings["p"] else [nn.ReLU()]

    model = networks.mlp(data.input_shape, data.num_classes, [128, 128], unit)
    _, found = training.trained(model, data, settings, seed)
    rng = np.random.default_rng([seed, 6])
    pruned = [
        float(np.mean([_accuracy(_pruned(model, data.x_test, share, rng), data) for _ in range(5)]))
        for share in SHARES
    ]
    logits = training.predict(model, data.x_test)
    more: dict[str, Any] = {
        "pruned": pruned[SHARES.index(0.5)],
        "pruning": pruned,
        "calibration": 100 * training.calibration_error(training.softmax(logits), data.y_test)
        if np.isfinite(logits).all()
        else None,
    }
    if settings["p"]:
        averaged = bnext.mc_dropout(
            model, data.x_test, 30, transform=training.softmax, generator=bnext.Generator(seed)
        ).mean
        more["calibration_mc"] = 100 * training.calibration_error(averaged, data.y_test)
    x = np.ones((2, 8, 4, 4), np.float32)
    more["size_dropout"] = nn.Dropout(0.5).forward(x)[0].size / x.size
    more["size_pooling"] = nn.MaxPool2d(2).forward(x)[0].size / x.size
    return {**found, **more}


def _pruned(model: nn.Sequential, x: Array, share: float, rng: np.random.Generator) -> Array:
    """Outputs when a random share of the hidden units is gone, the others scaled up."""
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            kept = np.asarray(rng.random(x.shape[1]) >= share)
            x = x * (kept / max(kept.mean(), 1e-3)).astype(np.float32)
    return x


def _accuracy(logits: Array, data: training.Split) -> float:
    return 100 * float(np.mean(logits.argmax(axis=1) == data.y_test))


def contrasts(results: Results) -> list[Contrast]:
    best = {kind: results.best(kind=kind) for kind in KINDS}

    def accuracy(kind: str) -> NDArray[np.float64]:
        return best[kind].values("test_accuracy")

    plain, dropout = best["plain"], best["dropout"]
    return [
        Contrast(
            "loss of accuracy when half of the units are pruned at random: dropout - plain",
            dropout.values("pruned") - dropout.values("test_accuracy"),
            plain.values("pruned") - plain.values("test_accuracy"),
            margin=1.0,
            claims={"L57a": {"higher": "supported", "same": "refuted", "lower": "refuted"}},
            says={
                "higher": "A network trained with dropout loses less, by {size}, when half of "
                "its hidden units are pruned at random."
            },
        ),
        Contrast(
            "size of the features: after dropout / before",
            dropout.values("size_dropout"),
            1.0,
            unit="times",
            margin=1.01,
            claims={"L67": {"same": "refuted", "lower": "supported"}},
        ),
        Contrast(
            "size of the features: after 2x2 pooling / before",
            dropout.values("size_pooling"),
            1.0,
            unit="times",
            margin=1.01,
            claims={"L67": {"same": "refuted", "lower": "supported"}},
            says={"lower": "Pooling reduces the size of features, {effect}; dropout does not."},
            topic="how much",
        ),
        Contrast(
            "calibration error: 30 passes with dropout averaged - one without",
            dropout.values("calibration_mc"),
            dropout.values("calibration"),
            margin=0.5,
            says={
                "lower": "Averaging 30 passes with dropout (bnext.mc_dropout) lowers the "
                "calibration error: {effect}.",
                "higher": "Averaging 30 passes with dropout (bnext.mc_dropout) raises the "
                "calibration error: {effect}.",
            },
            anchors={"mc-dropout": "lower"},
            topic="how much",
        ),
        Contrast(
            "dropout with max-norm - L2 alone",
            accuracy("dropout, max-norm"),
            accuracy("L2"),
            margin=0.5,
            claims={"L51": {"higher": "supported", "same": "refined", "lower": "refuted"}},
            says={
                "higher": "Dropout with max-norm is better than L2 alone, by {effect}.",
                "same": "Dropout with max-norm and L2 alone differ by nothing that matters: "
                "{effect}.",
                "lower": "Dropout with max-norm is worse than L2 alone: {effect}.",
            },
            anchors={"srivastava": "higher"},
            topic="how much",
        ),
        Contrast(
            "dropout with L2 - dropout with max-norm",
            accuracy("dropout, L2"),
            accuracy("dropout, max-norm"),
            margin=0.5,
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    best = [results.best(kind=kind) for kind in KINDS]
    plots.bars(left, best, "test_accuracy", list(KINDS), "test accuracy, %")
    for kind in ("plain", "dropout"):
        middle, half = t_interval(results.best(kind=kind).curves("pruning"))
        right.errorbar(SHARES, middle, half, marker="o", markersize=4, capsize=2, label=kind)
    right.set_xlabel("share of hidden units pruned at random")
    right.set_ylabel("test accuracy, %")
    right.legend()


EXPERIMENT = Experiment(
    name="features",
    number=18,
    title="Features: dropout, pooling, pruning, calibration",
    question="Do dropout and pooling reduce features, and what is dropout's noise good for?",
    design="Two hidden layers of 128 on few samples; dropout 0.5, L2 of 0.001, max-norm of 2 and "
    "combinations; two learning rates. Then a random share of the hidden units is pruned (five "
    "draws); calibration error of one pass, and of 30 passes with dropout.",
    expected="Pooling shrinks, dropout does not; dropout prepares for pruning; dropout with "
    "max-norm is better than L2.",
    claims=("L51", "L57a", "L67"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("test_accuracy", "test accuracy, %"),
        ("pruned", "half pruned, %"),
        ("calibration", "calibration error, points"),
        ("calibration_mc", "averaged passes, points"),
    ),
)
