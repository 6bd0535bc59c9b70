"""BatchNorm with what follows it in one pass, in modules whose forward method allows it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from importlib import import_module
from inspect import ismodule
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from bnext.torch import _bridge
from bnext.torch._batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, normalize
from bnext.torch._dropout import Dropout
from bnext.torch._eligible import is_like
from bnext.torch._tracing import ClassForward, Traced, is_plain, trace

NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}
FUNCTIONS = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
}
SUMS = (operator.add, torch.add)
SUMS_IN_PLACE = (operator.iadd,)


class Chain(NamedTuple):
    """Nodes of a graph, a BatchNorm first, that become one."""

    norm: fx.Node
    nodes: list[fx.Node]  # the others, in order
    adds: bool  # the first of them, a residual
    activation: str | None
    activation_module: str | None  # targets of call_module
    dropout_module: str | None

    @property
    def residual(self) -> fx.Node | None:
        """As the graph has it now, in which chains before this one may have become one node."""
        return _other_summand(self.nodes[0], self.norm) if self.adds else None

    def __str__(self) -> str:
        parts = ["residual"] if self.adds else []
        parts += [self.activation] if self.activation else []
        parts += ["dropout"] if self.dropout_module else []
        return " + ".join(parts)


# -- in the graph ----------------------------------------------------------------------------------
def _module(owner: nn.Module, node: Any) -> nn.Module | None:
    """What a node calls with nothing but one value, if it is a module."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    if len(node.args) != 1 or node.kwargs:
        return None
    return owner.get_submodule(str(node.target))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(owner: nn.Module, node: fx.Node) -> str | None:
    module = _module(owner, node)
    if module is not None:
        if isinstance(module, nn.GELU) and module.approximate != "tanh":
            return None
        return ACTIVATIONS.get(type(module)) if is_plain(module) else None
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu"
    if node.op != "call_function" or len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    return FUNCTIONS.get(node.target)


def _in_place(sum_: fx.Node) -> bool:
    return sum_.target in SUMS_IN_PLACE or (sum_.op == "call_method" and sum_.target == "add_")


def _other_summand(node: fx.Node, value: fx.Node) -> Any:
    """What `node` adds to `value` without changing it; None if it does something else."""
    in_place = _in_place(node)
    if not in_place and not (
        (node.op == "call_function" and node.target in SUMS)
        or (node.op == "call_method" and node.target == "add")
    ):
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if left is right:
        return None
    if left is value:
        return right
    return None if in_place else left


def _chain(owner: nn.Module, norm: fx.Node) -> Chain | None:
    """The longest one that begins with the BatchNorm of `norm`."""
    nodes: list[fx.Node] = []
    activation = activation_module = dropout_module = None

    def following() -> fx.Node | None:
        return _only_user(nodes[-1] if nodes else norm)

    node = following()
    adds = node is not None and isinstance(_other_summand(node, norm), fx.Node)
    if node is not None and adds:
        nodes.append(node)
        node = following()
    if node is not None:
        activation = _activation(owner, node)
        if activation is not None:
            activation_module = str(node.target) if node.op == "call_module" else None
            nodes.append(node)
            node = following()
    if node is not None:
        module = _module(owner, node)
        if type(module) is Dropout and is_plain(module):
            dropout_module = str(node.target)
            nodes.append(node)
    if not nodes:
        return None
    return Chain(norm, nodes, adds, activation, activation_module, dropout_module)


def _may_wait(owner: nn.Module, order: list[fx.Node], chain: Chain) -> bool:
    """Whether the BatchNorm may run where the last node of its chain does, and nothing notices."""
    first = order.index(chain.nodes[0])
    if order[first : first + len(chain.nodes)] != chain.nodes:
        return False
    if order.index(chain.norm) == first - 1:
        return True
    # Others run in between, and may read what the BatchNorm changes.
    own = f"{chain.norm.target}."
    if any(node.op == "get_attr" and str(node.target).startswith(own) for node in order):
        return False
    # They cannot change the input, if it is new and for the BatchNorm alone.
    source = chain.norm.args[0]
    fresh = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return (
        isinstance(source, fx.Node)
        and _only_user(source) is chain.norm
        and type(_module(owner, source)) in fresh
    )


def chains(owner: nn.Module, graph: fx.Graph) -> list[Chain]:
    """All that can be fused."""
    order = list(graph.nodes)
    calls = [node.target for node in order if node.op == "call_module"]
    taken: set[fx.Node] = set()
    found = []
    for node in order:
        module = _module(owner, node)
        if module is None or type(module) not in NORMS or not is_plain(module):
            continue
        same = [target for target in calls if owner.get_submodule(str(target)) is module]
        chain = _chain(owner, node)
        if len(same) > 1 or chain is None or not _may_wait(owner, order, chain):
            continue
        if taken.isdisjoint(chain.nodes):
            taken.update(chain.nodes)
            found.append(chain)
    return found


def belongs_to_a_child(chain: Chain) -> bool:
    """Whether all of it lies in one Sequential, whose own forward method can do it."""
    nodes = [chain.norm, *chain.nodes]
    if any(node.op != "call_module" for node in nodes):
        return False
    parents = {str(node.target).rpartition(".")[0] for node in nodes}
    return len(parents) == 1 and parents != {""}


def rewrite(graph: fx.Graph, found: list[Chain]) -> None:
    """Put one node in the place of each chain."""
    for chain in found:
        last = chain.nodes[-1]
        with graph.inserting_before(last):
            modules = [
                None if target is None else graph.get_attr(target)
                for target in (chain.norm.target, chain.activation_module, chain.dropout_module)
            ]
            layer, activation_module, dropout = modules
            arguments = (layer, chain.norm.args[0], chain.residual, chain.activation)
            in_place = chain.adds and _in_place(chain.nodes[0])
            new = graph.call_function(run, (*arguments, activation_module, dropout, in_place))
        last.replace_all_uses_with(new)
        for node in reversed([chain.norm, *chain.nodes]):
            graph.erase_node(node)
    graph.lint()


def run(
    layer: TorchBatchNorm,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    activation_module: nn.Module | None,
    dropout: nn.Dropout | None,
    in_place: bool,
) -> Tensor:
    """What a chain does; `in_place`: its sum changes the result of the BatchNorm."""
    slope = getattr(activation_module, "negative_slope", 0.01)
    if in_place and residual is not None and not is_like(residual, x):
        y = layer(x)
        y += residual  # which keeps its shape and dtype, or is an error
        y = _bridge.ACTIVATIONS[activation](y, slope)
        return y if dropout is None else dropout(y)
    drops = dropout is not None and dropout.training
    inside = drops and layer.training
    y = normalize(
        layer,
        x,
        residual,
        activation=activation,
        negative_slope=slope,
        dropout=dropout.p if inside and dropout is not None else 0.0,
    )
    return dropout(y) if drops and not inside and dropout is not None else y


# -- in the module ---------------------------------------------------------------------------------
class FusedForward(ClassForward):
    """In the place of a module's ``forward``: the same with fewer passes over memory.

    Where anything is not as it was when the graph was made, it runs the method of the class.
    """

    def __init__(self, owner: nn.Module, traced: Traced, found: list[Chain]) -> None:
        self.owner = owner
        self.method: Callable[..., Any] | None = type(owner).forward
        self.reads = traced.reads
        self.children = traced.children
        targets = [
            target
            for chain in found
            for target in (chain.norm.target, chain.activation_module, chain.dropout_module)
            if target is not None
        ]
        self.skipped = [owner.get_submodule(str(target)) for target in targets]
        self.skipped += traced.entered
        self.kinds = list(map(_kind, self.skipped))
        rewrite(traced.graph, found)
        code = traced.graph.python_code("self")
        self.source, self.names = code.src, dict(code.globals)
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            kwargs
            or torch.compiler.is_compiling()
            or nn_module._has_any_global_hook()
            or any(type(x) is not Tensor for x in args)
            or not self.holds()
        ):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        if self.function is None:
            self.method = type(self.owner).forward
            names = dict(self.names)
            exec(self.source, names)
            self.function = names["forward"]
        return self.function(self.owner, *args)

    def holds(self) -> bool:
        """Whether the module is what it was when the graph was made."""
        return (
            self.method in (None, type(self.owner).forward)
            and list(map(_kind, self.skipped)) == self.kinds
            and all(map(is_plain, self.skipped))
            and all(tuple(m._modules.items()) == children for m, children in self.children)
            and all(_same(read.now, read.value) for read in self.reads)
        )

    def __getattr__(self, name: str) -> Any:
        """What looks into methods, like torch.export, finds the class's own."""
        if name in ("__code__", "__defaults__", "__globals__", "__qualname__", "__wrapped__"):
            method = MethodType(type(self.owner).forward, self.owner)
            return method if name == "__wrapped__" else getattr(method, name)
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: each.__name__ for name, each in self.names.items() if ismodule(each)}
        names = {name: each for name, each in self.names.items() if name not in modules}
        # A copy's class may have a method of its own, as those of torch.fx.GraphModule: its first
        # call asks for it.
        own = {"function": None, "method": None, "names": names, "modules": modules}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = state.pop("modules")
        self.__dict__.update(state)
        self.names.update({name: import_module(each) for name, each in modules.items()})


def _kind(module: nn.Module) -> tuple[type[nn.Module], Any]:
    """The class, and what makes another function of GELU."""
    return type(module), module.__dict__.get("approximate")


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and bool(value == before))


def fuse(owner: nn.Module) -> list[Chain]:
    """Fuse what `owner` itself calls; the chains, none if there is nothing to do.

    Raises
    ------
    NotTraceable
        If its forward method does not allow it.
    """
    traced = trace(owner)
    found = chains(owner, traced.graph)
    if all(map(belongs_to_a_child, found)):
        return []
    owner.__dict__["forward"] = FusedForward(owner, traced, found)
    return found
