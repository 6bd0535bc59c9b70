"""Networks of `bnext.nn`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from bnext import nn, random
from bnext.diagnosis._network import Graph, Node, Norm, Watch, by_channel
from bnext.nn._normalize import Moments
from bnext.nn.batchnorm import BatchNorm, batch_norms
from bnext.nn.dropout import Dropout, _ChannelDropout
from bnext.nn.module import Array, Module

_LINEAR = (nn.Linear, nn.Conv2d)
_RELU = (nn.ReLU, nn.ReLU6)


class OurNetwork:
    framework = "bnext"
    last_batch = "merge"

    def __init__(self, model: Module) -> None:
        self.model = model

    def norms(self) -> list[Norm]:
        return [_norm(name, layer) for name, layer in batch_norms(self.model)]

    # -- state -------------------------------------------------------------------------
    @contextmanager
    def preserved(self) -> Iterator[None]:
        arrays = [(array, array.copy()) for array in self.model.state_dict().values()]
        modules = list(self.model.modules())
        modes = [module.training for module in modules]
        given = [set(layer._given) for _, layer in batch_norms(self.model)]
        generators = {
            id(generator): (generator, generator.state)
            for module in modules
            if (generator := getattr(module, "generator", None)) is not None
        }
        default = random.default_generator.state
        try:
            yield
        finally:
            for array, before in arrays:
                array[...] = before
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for (_, layer), names in zip(batch_norms(self.model), given, strict=True):
                layer._given = names
            for generator, state in generators.values():
                generator.state = state
            random.default_generator.state = default

    def seed(self, seed: int) -> None:
        random.default_generator.state = {"seed": seed, "offset": 0}

    def state(self) -> dict[str, Array]:
        return {k: np.array(v, np.float64) for k, v in self.model.state_dict().items()}

    def weights(self, state: Mapping[str, Any], node: Node) -> Array | None:
        key = f"{node.name}.weight" if node.name else "weight"
        return np.asarray(state[key], np.float64) if key in state else None

    def set_statistics(self, name: str, mean: Array, var: Array) -> None:
        layer = dict(batch_norms(self.model))[name]
        active = slice(None) if layer.channel_mask is None else layer.channel_mask
        layer.running_mean[active] = mean[active]
        layer.running_var[active] = var[active]

    # -- running -----------------------------------------------------------------------
    def convert(self, x: Any) -> Array:
        array = np.asarray(x)
        wanted = next((p.data.dtype for p in self.model.parameters()), np.dtype(np.float32))
        half = array.dtype.itemsize == 2 and array.dtype.kind in "fV"
        return array if half and wanted == np.float32 else array.astype(wanted, copy=False)

    def labels(self, y: Array) -> Array:
        return y

    def array(self, y: Any) -> Array:
        return np.asarray(y, np.float64)

    def run(self, x: Any, mode: str, watch: Watch | None = None) -> Array:
        self.model.train(mode == "training")
        with ExitStack() as stack:
            stack.enter_context(nn.stats_updates(self.model, False))
            for name, layer in batch_norms(self.model):
                if mode == "batch":
                    layer.training = True
                    stack.enter_context(_observed(layer))
                if watch is not None:
                    stack.enter_context(_patched(layer, _watching(name, layer, watch)))
            y, _ = self.model.forward(x)
        return np.asarray(y)

    def graph(self, x: Any) -> Graph:
        self.model.eval()
        graph = Graph()
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.enter_context(_patched(module, _recording(name, module, graph)))
            self.model.forward(x)
        return graph

    def squared(self, node: Node) -> Array:
        layer = node.layer
        weight = layer.weight.data
        zero = np.zeros_like(node.x)
        try:
            layer.weight.data = np.square(weight)
            y = layer.forward(np.square(node.x))[0] - layer.forward(zero)[0]
        finally:
            layer.weight.data = weight
        return by_channel(np.asarray(y, np.float64), 1)


def _norm(name: str, layer: BatchNorm) -> Norm:
    def copied(array: Array) -> Array:
        return np.array(array, np.float64)

    tracked = layer.track_running_stats
    return Norm(
        name,
        layer.num_features,
        layer.eps,
        layer.momentum,
        None if layer.weight is None else copied(layer.weight.data),
        None if layer.bias is None else copied(layer.bias.data),
        copied(layer.running_mean) if tracked else None,
        copied(layer.running_var) if tracked else None,
        int(layer.num_batches_tracked) if tracked else None,
        np.ones(layer.num_features, bool) if layer.channel_mask is None else layer.channel_mask,
        layer.ghost_batch_size,
        not layer.frozen_stats,
        layer.channel_axis,
    )


@contextmanager
def _observed(layer: BatchNorm) -> Iterator[None]:
    """Batch statistics without what else belongs to training; see `BatchNorm._as_in_training`."""

    def ignore(moments: Moments) -> None:
        pass

    before = layer._observer
    layer._observer = ignore
    try:
        yield
    finally:
        layer._observer = before


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextmanager
def _patched(module: Module, wrap: Wrapper) -> Iterator[None]:
    """Inside, ``module.forward`` is what `wrap` makes of it."""
    own = module.__dict__
    before = own.get("forward")
    own["forward"] = wrap(module.forward)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _watching(name: str, layer: BatchNorm, watch: Watch) -> Wrapper:
    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(x: Any, *args: Any, **kwargs: Any) -> Any:
            result = forward(x, *args, **kwargs)
            axis = layer.channel_axis
            watch(name, by_channel(np.asarray(x), axis), by_channel(result[0], axis))
            return result

        return watched

    return wrap


def _recording(name: str, module: Module, graph: Graph) -> Wrapper:
    leaf = not any(True for _ in module.children()) or isinstance(module, BatchNorm)

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(x: Any, *args: Any, **kwargs: Any) -> Any:
            first = len(graph.nodes)
            y, backward = forward(x, *args, **kwargs)
            if isinstance(module, BatchNorm):
                _record_norm(name, module, graph, x, args, kwargs, y)
            elif leaf:
                graph.add(name, _kind(module), (x,), y, **_details(module, x))
            elif not graph.made(y):
                # A sum or the like of what the layers inside have made.
                graph.add(name, "other", (x, *graph.outputs_since(first)), y)
            return y, backward

        return recorded

    return wrap


def _record_norm(
    name: str, layer: BatchNorm, graph: Graph, x: Any, args: Any, kwargs: Any, y: Any
) -> None:
    """One node for each thing that the layer does in its pass."""
    residual = args[0] if args else kwargs.get("residual")
    steps: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [(name, "norm", (), {})]
    if residual is not None:
        steps.append((name, "other", (residual,), {}))
    if layer.activation is not None:
        kind = "relu" if layer.activation in ("relu", "relu6") else "other"
        steps.append((name, kind, (), {}))
    if layer.dropout:
        steps.append((name, "dropout", (), {"p": layer.dropout, "noise": "element"}))
    for index, (called, kind, others, options) in enumerate(steps):
        # What lies between the steps exists nowhere, but needs an identity.
        output = y if index == len(steps) - 1 else np.empty(0)
        graph.add(called, kind, (x, *others), output, **options)
        x = output


def _kind(module: Module) -> str:
    if isinstance(module, _LINEAR):
        return "linear"
    if isinstance(module, _RELU):
        return "relu"
    if isinstance(module, Dropout):
        return "dropout"
    return "same" if isinstance(module, nn.Flatten | nn.InputStatistics) else "other"


def _details(module: Module, x: Any) -> dict[str, Any]:
    if isinstance(module, Dropout):
        element = "element" if type(module) in (nn.Dropout, nn.GaussianDropout) else ""
        channel = "channel" if isinstance(module, _ChannelDropout) else ""
        return {"p": module.p, "noise": element or channel}
    if isinstance(module, _LINEAR):
        return {"layer": module, "x": x, "axis": -1 if isinstance(module, nn.Linear) else 1}
    return {}
