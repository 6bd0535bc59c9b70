"""9: dropout and BatchNorm: how much, where, on how much data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import bnext
from bnext import nn
from bnext.data import Dataset, batches
from bnext.nn.module import Array, Module
from bnext.study import networks, plots, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings

PLACES = {"before-norm": "before BN", "after-relu": "after ReLU", "head": "before the last layer"}
RATES = (0.03, 0.1)
NORMS = {"none": "plain", "batch": "BN"}


def arms(scale: Scale) -> dict[str, Settings]:
    few, many = scale.pick((200, 800), (400, 4000))
    plans: list[tuple[str, str, float]] = [("none", "none", 0.0), ("batch", "none", 0.0)]
    for p in scale.pick((0.1, 0.5), (0.1, 0.3, 0.5)):
        plans += [("none", place, p) for place in ("after-relu", "head")]
        plans += [("batch", place, p) for place in PLACES]
    return {
        f"{NORMS[norm]}, {f'dropout {p:g} {PLACES[place]}' if p else 'no dropout'}, {train} "
        f"samples, lr {rate:g}": {
            **scale.sizes(train),
            "norm": norm,
            "place": place,
            "p": p,
            "hidden": [64] * scale.pick(4, 6),
            "lr": rate,
            "epochs": epochs,
        }
        for norm, place, p in plans
        for train, epochs in ((few, scale.pick(25, 25)), (many, scale.pick(8, 8)))
        for rate in RATES
    }


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)

    def unit(width: int) -> list[Module]:
        norm: list[Module] = [nn.BatchNorm(width)] if settings["norm"] == "batch" else []
        drop: list[Module] = [nn.Dropout(settings["p"])]
        before = drop if settings["place"] == "before-norm" else []
        after = drop if settings["place"] == "after-relu" else []
        return [*before, *norm, nn.ReLU(), *after]

    head = [nn.Dropout(settings["p"])] if settings["place"] == "head" else []
    model = networks.mlp(data.input_shape, data.num_classes, settings["hidden"], unit, head)
    _, found = training.trained(model, data, settings, seed)
    if settings["norm"] == "batch" and settings["p"] and settings["place"] != "head":
        first, *_, last = _shifts(model, data.x_train[:500])
        found |= {"shift_first": first, "shift_last": last}
        bnext.reestimate(model, batches(data.x_train, data.y_train, 200))
        precise = training.measure(model, data, train=False)
        found |= {"precise": precise["test_accuracy"], "precise_loss": precise["test_loss"]}
    return found


def _shifts(model: nn.Sequential, x: Array) -> list[float]:
    """Variance of what each BatchNorm gets: in evaluation over in training."""
    model.train()
    training_x = evaluation_x = x
    ratios = []
    with nn.stats_updates(model, False):
        for layer in model:
            if isinstance(layer, nn.BatchNorm):
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = evaluation_x.var(axis=0) / training_x.var(axis=0)
                ratios.append(float(np.median(ratio[np.isfinite(ratio)])))
            training_x = layer.forward(training_x)[0]
            evaluation_x = layer(evaluation_x)
    return ratios


def _sizes(results: Results) -> tuple[int, int]:
    sizes = {arm.settings["train"] for arm in results}
    return min(sizes), max(sizes)


def _chosen(results: Results, train: int, norm: str, dropout: bool) -> NDArray[np.float64]:
    """Test accuracy of the best on validation data over p, places and learning rates."""
    found = [
        arm for arm in results.arms(train=train, norm=norm) if bool(arm.settings["p"]) == dropout
    ]
    return max(found, key=lambda arm: arm.mean("validation_accuracy")).values("test_accuracy")


def contrasts(results: Results) -> list[Contrast]:
    few, many = _sizes(results)
    plain = {n: _chosen(results, n, "none", False) for n in (few, many)}
    bn = {n: _chosen(results, n, "batch", False) for n in (few, many)}
    dropout = {n: _chosen(results, n, "none", True) for n in (few, many)}
    both = {n: _chosen(results, n, "batch", True) for n in (few, many)}
    before = results.best(norm="batch", place="before-norm", p=0.5, train=many)
    after = results.best(norm="batch", place="after-relu", p=0.5, train=many)
    head = results.best(norm="batch", place="head", p=0.5, train=many)
    gap = {
        norm: arm.values("train_accuracy") - arm.values("test_accuracy")
        for norm in NORMS
        for arm in [results.best(norm=norm, p=0.0, train=few)]
    }
    found = []
    for n in (few, many):
        found += [
            Contrast(
                f"{n} samples: dropout (p and place chosen) - none, without BN",
                dropout[n],
                plain[n],
                margin=0.5,
                claims={
                    "L7": {"higher": "supported", "same": "refined", "lower": "refuted"},
                    "L51": {"higher": "supported", "same": "refined", "lower": "refuted"},
                },
                says={
                    "higher": f"On {n} samples, dropout brings {{effect}} without BN (p, place "
                    "and learning rate chosen on validation data).",
                    "same": f"On {n} samples, dropout makes no difference that matters without "
                    "BN: {effect}.",
                    "lower": f"On {n} samples, dropout costs {{size}} without BN.",
                },
            ),
            Contrast(
                f"{n} samples: BN with dropout (p and place chosen) - BN alone",
                both[n],
                bn[n],
                margin=0.5,
                claims={"L62": {"higher": "supported", "same": "refuted", "lower": "refuted"}},
                says={
                    "higher": f"On {n} samples with BN, dropout adds {{effect}} (p, place and "
                    "learning rate chosen on validation data).",
                    "same": f"On {n} samples with BN, dropout adds nothing that matters: "
                    "{effect}.",
                    "lower": f"On {n} samples with BN, adding dropout costs {{size}}.",
                    "open": f"On {n} samples, it could not be shown that adding dropout to BN "
                    "helps or hurts: {effect}.",
                },
            ),
        ]
    return [
        *found,
        Contrast(
            f"{few} samples: BN - plain",
            bn[few],
            plain[few],
            margin=0.5,
            claims={"L7": {"higher": "supported", "same": "refined", "lower": "refuted"}},
            says={
                "higher": f"On {few} samples BN brings {{effect}}.",
                "lower": f"On {few} samples BN costs {{size}}.",
            },
        ),
        Contrast(
            f"{few} samples, training minus test accuracy: BN - plain",
            gap["batch"],
            gap["none"],
            margin=0.5,
            claims={"L28b": {"lower": "supported", "same": "refined", "higher": "refuted"}},
            says={
                "lower": f"On {few} samples, BN narrows the gap between training and test "
                "accuracy, by {effect}.",
                "higher": f"On {few} samples, BN widens the gap between training and test "
                "accuracy, by {effect}: it does not prevent overfitting.",
                "same": f"On {few} samples, BN does not change the gap between training and test "
                "accuracy: {effect}.",
            },
        ),
        Contrast(
            "with BN, p 0.5: dropout before every BN - before the last layer",
            before.values("test_accuracy"),
            head.values("test_accuracy"),
            margin=0.5,
            says={
                "lower": "In a network with BN, dropout of 0.5 before every BN instead of once "
                "before the last layer changes accuracy by {effect}: put it after the last BN.",
                "same": "In a network with BN it does not matter whether dropout comes before "
                "every BN or once before the last layer: {effect}.",
            },
            anchors={"order-dropout": "lower"},
            topic="where",
        ),
        Contrast(
            "with BN, p 0.5: dropout after every ReLU - before the last layer",
            after.values("test_accuracy"),
            head.values("test_accuracy"),
            margin=0.5,
            says={
                "lower": "Dropout of 0.5 after every ReLU, and so before the next BN, is worse "
                "than once before the last layer, too: {effect}.",
            },
            topic="where",
        ),
        Contrast(
            "dropout 0.5 after every ReLU: variance in evaluation over that in training at the "
            "last BN / at the second",
            after.values("shift_last"),
            after.values("shift_first"),
            unit="times",
            claims={"L28a": {"lower": "refuted", "higher": "refuted"}},
        ),
        Contrast(
            "dropout 0.5 before every BN: re-estimated statistics - running",
            before.values("precise"),
            before.values("test_accuracy"),
            margin=0.5,
            claims={"L28a": {"higher": "refuted", "same": "refined"}},
            says={
                "higher": "Where dropout does come before BN, statistics re-estimated without "
                "dropout (bnext.reestimate) bring back {effect}.",
                "same": "Where dropout comes before BN, re-estimated statistics change nothing "
                "that matters: {effect}.",
            },
            topic="how much",
        ),
    ]


def plot(figure: Any, results: Results) -> None:
    panels = figure.subplots(1, 2, sharey=False)
    for axes, train in zip(panels, _sizes(results), strict=True):
        for norm, place in [("none", "after-relu"), ("none", "head")] + [
            ("batch", p) for p in PLACES
        ]:
            ps = sorted({arm.settings["p"] for arm in results.arms(norm=norm, place=place)})
            best = [results.best(norm=norm, p=0.0, train=train)]
            best += [results.best(norm=norm, place=place, p=p, train=train) for p in ps]
            plots.lines(
                axes,
                [0.0, *ps],
                best,
                "test_accuracy",
                f"{NORMS[norm]}, {PLACES[place]}",
                linestyle="--" if norm == "none" else "-",
            )
        axes.set_title(f"{train} training samples")
        axes.set_xlabel("dropout p")
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(fontsize=7)


EXPERIMENT = Experiment(
    name="dropout-position",
    number=9,
    title="Dropout with BatchNorm: how much, where, on how much data",
    question="Does dropout help, where does it belong, and should it be combined with BN?",
    design="Four to six hidden layers of 64, with and without BN before ReLU; dropout of several "
    "p before every BN, after every ReLU, or once before the last layer; few and many samples; "
    "two learning rates. The variance shift is the variance of what a BN gets in evaluation over "
    "that in training (median over channels).",
    expected="Before BN is worst, re-estimated statistics cure it; dropout helps on few samples.",
    claims=("L7", "L28a", "L28b", "L51", "L62"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("validation_accuracy", "validation accuracy, %"),
        ("test_accuracy", "test accuracy, %"),
        ("test_loss", "test loss, nats"),
        ("shift_last", "variance shift, last BN"),
        ("precise", "accuracy re-estimated, %"),
    ),
)
