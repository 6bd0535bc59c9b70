"""What can be known before training: from the network, the shape of its input, sizes of batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bnext.diagnosis._batches import Batches
from bnext.diagnosis._network import Graph, Network, Node, Norm
from bnext.diagnosis.report import Finding
from bnext.diagnosis.rules import rule
from bnext.nn.module import Array

# Between dropout and what it disturbs: ReLU(b x / q) is b ReLU(x) / q, so dropout passes through.
_THROUGH = ("same", "relu")


def finding(code: str, layer: str, figure: float, detail: str = "") -> list[Finding]:
    """One, if the figure is beyond the rule's threshold."""
    severity = rule(code).severity(figure)
    return [Finding(code, layer, float(figure), severity, detail)] if severity else []


def values_per_sample(graph: Graph, norms: list[Norm]) -> dict[str, int]:
    """Per channel, of every BatchNorm that the input reaches."""
    features = {norm.name: norm.num_features for norm in norms}
    values: dict[str, int] = {}
    for node in graph.nodes:
        if node.kind == "norm" and len(node.shape) > 1:
            own = math.prod(node.shape[1:]) // features[node.name]
            values[node.name] = min(own, values.get(node.name, own))
    return values


def findings(
    network: Network, norms: list[Norm], graph: Graph, x: object, batches: Batches
) -> Iterator[Finding]:
    spatial = values_per_sample(graph, norms)
    inputs = _inputs(network, x)
    by_name = {norm.name: norm for norm in norms}
    for norm in norms:
        if norm.by_batch:
            if norm.name in spatial:
                yield from _sizes(norm, spatial[norm.name], batches)
            yield from _momentum(norm)
    for index, node in enumerate(graph.nodes):
        if node.kind == "norm" and by_name[node.name].by_batch:
            norm = by_name[node.name]
            yield from _bias(norm, graph, node)
            if norm.name in inputs:
                yield from _dropout(network, norm, graph, index, inputs[norm.name])


def _sizes(norm: Norm, spatial: int, batches: Batches) -> Iterator[Finding]:
    def group(samples: int) -> int:
        return samples // max(1, samples // norm.group) if norm.group else samples

    usual, last = group(batches.batch_size) * spatial, group(batches.last) * spatial
    where = f"{batches.batch_size} samples"
    if norm.group:
        where += f" in ghost batches of {norm.group}"
    if usual < rule("BNX101").threshold:
        yield from finding("BNX101", norm.name, usual, f"in every batch: {where}")
        return
    yield from finding("BNX102", norm.name, usual, where)
    if spatial > 1:
        yield from finding("BNX108", norm.name, group(batches.batch_size), f"{spatial} values each")
    last_detail = f"last batch: {batches.last} samples"
    if last < rule("BNX101").threshold:
        yield from finding("BNX101", norm.name, last, last_detail)
    elif last < usual:
        yield from finding("BNX103", norm.name, last, last_detail)


def _momentum(norm: Norm) -> Iterator[Finding]:
    if norm.momentum is None or norm.running_mean is None:
        return
    if norm.momentum == 0:
        yield from finding("BNX107", norm.name, 1.0, "momentum 0: running statistics never move")
    else:
        keras = f"Keras's {norm.momentum:g} is {1 - norm.momentum:.3g} here"
        yield from finding("BNX107", norm.name, norm.momentum, keras)


def _bias(norm: Norm, graph: Graph, node: Node) -> Iterator[Finding]:
    found = graph.before(node, ("same",))
    if found is None or not norm.channels.all():
        return
    index, before = found
    users = graph.users(index)
    if before.kind != "linear" or len(users) != 1:
        return
    same = _same_channels(users[0].shape, before.axis, node.shape, norm.axis)
    if same and getattr(before.layer, "bias", None) is not None:
        yield from finding("BNX104", before.name, norm.num_features, f"before {norm.name!r}")


def _same_channels(made: tuple[int, ...], a: int, taken: tuple[int, ...], b: int) -> bool:
    """Whether axis `a` of an array is axis `b` of what a reshape makes of it."""
    a, b = a % len(made), b % len(taken)
    return made[a] == taken[b] and math.prod(made[:a]) == math.prod(taken[:b])


def _dropout(network: Network, norm: Norm, graph: Graph, index: int, x: Array) -> Iterator[Finding]:
    """Of x to BatchNorm, in evaluation: R = Var / (Var + what dropout adds).

    Dropout multiplies by b / q, of mean 1 and variance p / q. Directly before BatchNorm that adds
    E[x^2] p / q; through weights w, with one b for each x_i, it adds E[sum w_i^2 x_i^2] p / q.
    """
    found = graph.before(graph.nodes[index], _THROUGH)
    if found is None:
        return
    node, between = found[1], None
    if node.kind == "linear":
        if graph.before(graph.nodes[index], ("same",)) != found:
            return  # the sum above is of what comes before the activation
        between = node
        found = graph.before(node, _THROUGH)
        if found is None:
            return
        node = found[1]
    if node.kind != "dropout" or not 0 < node.p < 1:
        return
    var = x.var((0, 2))
    detail = f"{node.name!r}, p = {node.p:g}"
    if between is None:
        added = np.square(x).mean((0, 2)) if node.noise else np.full(len(var), np.nan)
    elif node.noise == "element":
        squares = network.squared(between)
        if squares.shape[1] != len(var):
            return
        added = squares.mean((0, 2))
        detail += f", then {between.name!r}"
    else:
        return
    ratio = typical(_ratio(var, var + node.p / (1 - node.p) * added, norm.eps), norm.channels)
    if between is not None:
        yield from finding("BNX106", norm.name, ratio, detail)
        return
    if math.isnan(ratio):  # a kind of dropout without a prediction
        yield Finding("BNX105", norm.name, ratio, "warning", detail)
    yield from finding("BNX105", norm.name, ratio, detail)


def _ratio(a: Array, b: Array, eps: float) -> Array:
    return (a + eps) / (b + eps)


def typical(values: Array, channels: Array) -> float:
    """Median over channels that count and have a figure; NaN if there are none."""
    kept = values[channels & np.isfinite(values)]
    return float(np.median(kept)) if kept.size else math.nan


def _inputs(network: Network, x: object) -> dict[str, Array]:
    """Of each BatchNorm, in evaluation."""
    inputs: dict[str, Array] = {}

    def watch(name: str, x: Array, y: Array) -> None:
        inputs[name] = np.asarray(x, np.float64)

    network.run(x, "running", watch)
    return inputs
