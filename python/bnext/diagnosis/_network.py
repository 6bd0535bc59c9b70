"""A network as the diagnoses see it, whatever framework it is of.

`Network` is implemented for `bnext.nn` in `_ours` and for PyTorch in `_torch`. Arrays that it hands
out are NumPy's; inputs and outputs of the network are the framework's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bnext.nn.module import Array, Module

Watch = Callable[[str, Array, Array], None]
"""Takes the name of a BatchNorm, its input and its output, both (N, C, S)."""


@dataclass(frozen=True)
class Norm:
    """A BatchNorm. Arrays are copies in float64; None where the layer has none.

    Attributes
    ----------
    channels : array (C,) of bool
        Those that are normalized.
    group : int or None
        Samples in a ghost batch.
    batches : int or None
        That the running statistics have seen.
    by_batch : bool
        Whether training normalizes by the batch, and the statistics are not frozen.
    axis : int
        Of the channels in the input.
    """

    name: str
    num_features: int
    eps: float
    momentum: float | None
    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    batches: int | None
    channels: Array
    group: int | None
    by_batch: bool
    axis: int = 1

    @property
    def untrained(self) -> bool:
        """Whether the running statistics are those that a layer begins with."""
        return (
            self.running_mean is not None
            and self.running_var is not None
            and not self.batches
            and not self.running_mean.any()
            and bool((self.running_var == 1).all())
        )


@dataclass(frozen=True, eq=False)
class Node:
    """One call of a layer, or one operation.

    Attributes
    ----------
    name : str
        Of the layer; of the function for an operation.
    kind : str
        "norm", "dropout", "linear" (Linear, convolutions), "relu", "same" (what changes neither
        values nor their number: Flatten, Identity) or "other".
    inputs : tuple of int
        Nodes that made the inputs; those that nothing made are left out.
    shape : tuple of int
        Of the (first) input.
    p : float
        Of dropout.
    noise : "element", "channel" or ""
        Whether dropout multiplies each element or each channel by a variable of its own, of mean
        1 and variance p / (1 - p); "" for dropout of other kinds.
    layer, x : object
    axis : int
        The layer itself, its input, and the axis of its outputs' features, of kind "linear".
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    p: float = 0.0
    noise: str = ""
    layer: Any = None
    x: Any = None
    axis: int = 1


@dataclass
class Graph:
    """Nodes in the order of the calls."""

    nodes: list[Node] = field(default_factory=list)
    # Objects that nodes have made, by id; kept, so that no id is used twice.
    _made: dict[int, int] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)

    def add(
        self, name: str, kind: str, inputs: tuple[Any, ...], output: Any, **options: Any
    ) -> None:
        known = tuple(self._made[id(x)] for x in inputs if id(x) in self._made)
        shape = tuple(inputs[0].shape) if inputs and hasattr(inputs[0], "shape") else ()
        self.nodes.append(Node(name, kind, known, shape, **options))
        self._made[id(output)] = len(self.nodes) - 1
        # In evaluation, layers such as dropout return their input itself: the last of them made it.
        self._kept += [output, *inputs]

    def made(self, output: Any) -> bool:
        return id(output) in self._made

    def outputs_since(self, first: int) -> list[Any]:
        """What nodes have made since there were `first` of them."""
        return [x for x in self._kept if self._made.get(id(x), -1) >= first]

    def users(self, index: int) -> list[Node]:
        return [node for node in self.nodes if index in node.inputs]

    def before(self, node: Node, through: tuple[str, ...]) -> tuple[int, Node] | None:
        """What made the input of `node`, nodes of the kinds in `through` left out."""
        while len(node.inputs) == 1:
            index = node.inputs[0]
            node = self.nodes[index]
            if node.kind not in through:
                return index, node
        return None


class Network(Protocol):
    """What diagnoses need of a framework.

    `mode` of `run`: "running" (evaluation), "batch" (batch statistics, all else as in evaluation)
    or "training".
    """

    framework: str
    last_batch: str  # what its loaders usually do with a remainder

    def norms(self) -> list[Norm]: ...

    def preserved(self) -> AbstractContextManager[None]:
        """Afterwards parameters, buffers, modes and generators are what they were."""
        ...

    def seed(self, seed: int) -> None:
        """Start the generators of dropout; for use inside `preserved`."""
        ...

    def convert(self, x: Any) -> Any:
        """An array as an input of the network."""
        ...

    def labels(self, y: Array) -> Any:
        """Labels as the framework's losses take them."""
        ...

    def array(self, y: Any) -> Array: ...

    def graph(self, x: Any) -> Graph: ...

    def run(self, x: Any, mode: str, watch: Watch | None = None) -> Any: ...

    def squared(self, node: Node) -> Array:
        """What a layer of kind "linear" makes of its squared input with squared weights and no
        bias, as (N, C, S)."""
        ...

    def set_statistics(self, name: str, mean: Array, var: Array) -> None: ...

    def state(self) -> dict[str, Array]:
        """Parameters and buffers by name, as float64 copies."""
        ...

    def weights(self, state: Mapping[str, Any], node: Node) -> Array | None:
        """Those of a layer of kind "linear" in `state`."""
        ...


def by_channel(x: Array, axis: int) -> Array:
    """x as (N, C, S)."""
    if axis != 1:
        x = np.moveaxis(x, axis, 1)
    return x.reshape(x.shape[0], x.shape[1], -1)


def network_of(model: Any) -> Network:
    """TypeError if it is of no framework that is known."""
    if isinstance(model, Module):
        from bnext.diagnosis._ours import OurNetwork

        return OurNetwork(model)
    # A PyTorch module exists only where PyTorch has been imported.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        from bnext.diagnosis._torch import TorchNetwork

        return TorchNetwork(model)
    raise TypeError(
        f"doctor: model: expected a bnext.nn.Module or torch.nn.Module, got {type(model).__name__}"
    )
