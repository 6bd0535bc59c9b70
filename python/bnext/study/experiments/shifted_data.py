"""17: test data that are not like the training data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import bnext
from bnext.data import Dataset
from bnext.nn.module import Array
from bnext.study import networks, training
from bnext.study.experiment import Contrast, Experiment, Results, Scale, Settings
from bnext.study.statistics import t_interval

SHIFTS = {"contrast": "contrast 30 %", "brightness": "brighter by 1", "noise": "noise of 1.5"}
RATES = (0.02, 0.1)
NORMS = {"none": "plain", "batch": "BN"}


def arms(scale: Scale) -> dict[str, Settings]:
    return {
        f"{label}, lr {rate:g}": {
            **scale.sizes(),
            "norm": norm,
            "lr": rate,
            "hidden": [128, 128],
            "epochs": 12 * scale.epochs,
        }
        for norm, label in NORMS.items()
        for rate in RATES
    }


def _shifted(x: Array, kind: str, seed: int) -> Array:
    if kind == "contrast":
        return x * np.float32(0.3)
    if kind == "brightness":
        return x + np.float32(1.0)
    noise = np.random.default_rng([seed, 5]).normal(0, 1.5, x.shape)
    return x + noise.astype(np.float32)


def run(settings: Settings, dataset: Dataset, seed: int) -> dict[str, Any]:
    data = training.split(dataset, settings, seed)
    unit = networks.batch_norm if settings["norm"] == "batch" else networks.plain
    model = networks.mlp(data.input_shape, data.num_classes, settings["hidden"], unit)
    _, found = training.trained(model, data, settings, seed)
    running = {name: array.copy() for name, array in model.state_dict().items()}
    for kind in SHIFTS:
        x = _shifted(data.x_test, kind, seed)
        found[kind] = _accuracy(training.predict(model, x), data)
        if settings["norm"] == "batch":
            # From the shifted inputs alone: labels are not looked at.
            bnext.reestimate(model, [x[start : start + 500] for start in range(0, len(x), 500)])
            found[f"{kind}_again"] = _accuracy(training.predict(model, x), data)
            model.load_state_dict(running)
    return found


def _accuracy(logits: Array, data: training.Split) -> float:
    return 100 * float(np.mean(logits.argmax(axis=1) == data.y_test))


def contrasts(results: Results) -> list[Contrast]:
    bn, plain = results.best(norm="batch"), results.best(norm="none")

    def drop(arm: Any) -> NDArray[np.float64]:
        shifted = np.mean([arm.values(kind) for kind in SHIFTS], axis=0)
        return np.asarray(shifted - arm.values("test_accuracy"))

    again = np.mean([bn.values(f"{kind}_again") for kind in SHIFTS], axis=0)
    found = [
        Contrast(
            "change of accuracy by shifted test data (mean of three): BN - plain",
            drop(bn),
            drop(plain),
            margin=1.0,
            claims={
                "L12": {"higher": "supported", "same": "refuted", "lower": "refuted"},
                "L25b": {"higher": "supported", "same": "refuted", "lower": "refuted"},
            },
            says={
                "lower": "Shifted test data hurt a network with BN more than one without, by "
                "{size}: BN makes training robust, not the model.",
                "higher": "Shifted test data hurt a network with BN less than one without, by "
                "{size}.",
                "same": "Shifted test data hurt networks with and without BN alike: {effect} of "
                "difference.",
                "open": "Whether shifted test data hurt a network with BN more or less than one "
                "without could not be shown: {effect}.",
            },
        ),
        Contrast(
            "BN on shifted test data (mean of three): statistics re-estimated on them - running",
            again,
            np.mean([bn.values(kind) for kind in SHIFTS], axis=0),
            margin=1.0,
            claims={"L12": {"higher": "refined"}, "L25b": {"higher": "refined"}},
            says={
                "higher": "Statistics re-estimated on unlabelled shifted data (bnext.reestimate) "
                "bring back {effect}.",
                "lower": "Statistics re-estimated on shifted data make it worse: {effect}.",
                "same": "Statistics re-estimated on shifted data change nothing that matters: "
                "{effect}.",
            },
            topic="how much",
        ),
    ]
    return found + [
        Contrast(
            f"BN, {label}: statistics re-estimated - running",
            bn.values(f"{kind}_again"),
            bn.values(kind),
        )
        for kind, label in SHIFTS.items()
    ]


def plot(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    bn, plain = results.best(norm="batch"), results.best(norm="none")
    kinds = ["test_accuracy", *SHIFTS]
    series = [
        ("plain", [plain.values(kind) for kind in kinds]),
        ("BN, running statistics", [bn.values(kind) for kind in kinds]),
        (
            "BN, re-estimated on the test inputs",
            [bn.values(kind if kind == "test_accuracy" else f"{kind}_again") for kind in kinds],
        ),
    ]
    for offset, (label, values) in enumerate(series):
        middle, half = t_interval(np.array(values).T)
        place = np.arange(len(kinds)) + 0.12 * (offset - 1)
        axes.errorbar(place, middle, half, fmt="o", capsize=3, label=label)
    axes.set_xticks(range(len(kinds)), ["not shifted", *SHIFTS.values()])
    axes.set_ylabel("test accuracy, %")
    axes.legend()


EXPERIMENT = Experiment(
    name="shifted-data",
    number=17,
    title="Shifted test data",
    question="Does BN make a model robust to data unlike those it was trained on?",
    design="Two hidden layers of 128 with and without BN, trained on data as they are; tested with "
    "the contrast at 30 %, brighter by one standard deviation, and with noise of 1.5 standard "
    "deviations; BN with running statistics and with those of the shifted inputs.",
    expected="BN is no more robust; re-estimation recovers.",
    claims=("L12", "L25b"),
    arms=arms,
    run=run,
    contrasts=contrasts,
    plot=plot,
    columns=(
        ("test_accuracy", "test accuracy, %"),
        *((kind, f"{label}, %") for kind, label in SHIFTS.items()),
        *((f"{kind}_again", f"{label}, re-estimated, %") for kind, label in SHIFTS.items()),
    ),
)
