"""Networks of PyTorch, those of `bnext.torch` included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from bnext.diagnosis._network import Graph, Node, Norm, Watch, by_channel
from bnext.nn.module import Array

_CHANNEL_DROPOUT = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Kinds of functions that forward methods call, by name.
_FUNCTIONS = {
    "relu": "relu",
    "relu_": "relu",
    "relu6": "relu",
    "flatten": "same",
    "view": "same",
    "reshape": "same",
    "dropout": "dropout",
    "contiguous": "same",
}


class TorchNetwork:
    framework = "torch"
    last_batch = "keep"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        first = next((p for p in (*model.parameters(), *model.buffers())), None)
        self._device = torch.device("cpu") if first is None else first.device
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self._dtype = next(floating, torch.float32)
        # Layers in evaluation mode in a network that trains: their statistics are frozen.
        self._frozen = {
            name for name, layer in self._named() if model.training and not layer.training
        }

    def _named(self) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in self.model.named_modules() if isinstance(m, _BatchNorm)]

    def norms(self) -> list[Norm]:
        return [_norm(name, layer, name not in self._frozen) for name, layer in self._named()]

    # -- state -------------------------------------------------------------------------
    @contextmanager
    def preserved(self) -> Iterator[None]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        modules = list(self.model.modules())
        modes = [module.training for module in modules]
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            try:
                yield
            finally:
                for tensor, values in zip(tensors, before, strict=True):
                    tensor.copy_(values)
                for module, mode in zip(modules, modes, strict=True):
                    module.training = mode

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def state(self) -> dict[str, Array]:
        return {name: _array(tensor) for name, tensor in self.model.state_dict().items()}

    def weights(self, state: Mapping[str, Any], node: Node) -> Array | None:
        value = state.get(f"{node.name}.weight" if node.name else "weight")
        return None if value is None else self.array(value)

    def set_statistics(self, name: str, mean: Array, var: Array) -> None:
        layer = dict(self._named())[name]
        for buffer, values in ((layer.running_mean, mean), (layer.running_var, var)):
            buffer.copy_(torch.from_numpy(values))

    # -- running -----------------------------------------------------------------------
    def convert(self, x: Any) -> Tensor:
        tensor = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
        if tensor.is_floating_point() or tensor.dtype == torch.uint8:  # other integers are tokens
            tensor = tensor.to(self._dtype)
        return tensor.to(self._device)

    def labels(self, y: Array) -> Tensor:
        return torch.from_numpy(np.array(y)).to(self._device)

    def array(self, y: Any) -> Array:
        return _array(y) if isinstance(y, Tensor) else np.asarray(y, np.float64)

    def run(self, x: Any, mode: str, watch: Watch | None = None) -> Any:
        self.model.train(mode == "training")
        with ExitStack() as stack:
            for name, layer in self._named():
                layer.training = mode != "running" and name not in self._frozen
                if layer.training:
                    # Then buffers are neither used nor moved.
                    stack.callback(setattr, layer, "track_running_stats", layer.track_running_stats)
                    layer.track_running_stats = False
                if watch is not None:
                    hook = layer.register_forward_hook(_watching(name, watch), with_kwargs=True)
                    stack.callback(hook.remove)
            return self.model(x)

    def graph(self, x: Any) -> Graph:
        self.model.eval()
        graph = Graph()
        # Inside a layer, functions are its own business.
        depth = [0]
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if any(True for _ in module.children()):
                    continue
                before, after = _recording(name, graph, depth)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            with _Functions(graph, depth):
                self.model(x)
        return graph

    def squared(self, node: Node) -> Array:
        parameters = {"weight": torch.square(node.layer.weight)}
        if node.layer.bias is not None:
            parameters["bias"] = torch.zeros_like(node.layer.bias)
        y = torch.func.functional_call(node.layer, parameters, (torch.square(node.x),))
        return by_channel(_array(y), 1)


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.detach().cpu().double().numpy())


def _norm(name: str, layer: Any, by_batch: bool) -> Norm:
    def copied(tensor: Tensor | None) -> Array | None:
        return None if tensor is None else _array(tensor)

    tracked = layer.num_batches_tracked
    return Norm(
        name,
        layer.num_features,
        layer.eps,
        layer.momentum,
        copied(layer.weight),
        copied(layer.bias),
        copied(layer.running_mean),
        copied(layer.running_var),
        None if tracked is None else int(tracked),
        np.ones(layer.num_features, bool),
        None,
        by_batch,
    )


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Of a call of a layer, its input first."""
    names = sorted(kwargs, key=lambda name: name != "input")
    values = (*args, *(kwargs[name] for name in names))
    return tuple(x for x in values if isinstance(x, Tensor))


def _watching(name: str, watch: Watch) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        x = _tensors(args, kwargs)[0]
        watch(name, by_channel(_array(x), 1), by_channel(_array(output), 1))

    return hook


def _recording(
    name: str, graph: Graph, depth: list[int]
) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        depth[0] += 1

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        depth[0] -= 1
        tensors = _tensors(args, kwargs)
        if not (tensors and isinstance(output, Tensor)):
            return
        if isinstance(module, _BatchNorm):
            _record_norm(name, module, graph, tensors, output)
        else:
            graph.add(name, _kind(module), tensors, output, **_details(module, tensors[0]))

    return before, after


def _record_norm(
    name: str, layer: nn.Module, graph: Graph, tensors: tuple[Tensor, ...], output: Tensor
) -> None:
    """`bnext.torch.BatchNormAct2d` does several things, and each is a node."""
    steps: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [("norm", (), {})]
    if len(tensors) > 1:
        steps.append(("other", tensors[1:], {}))
    activation, p = getattr(layer, "activation", None), getattr(layer, "dropout", 0.0)
    if isinstance(activation, str):
        steps.append(("relu" if activation in ("relu", "relu6") else "other", (), {}))
    if isinstance(p, float) and p:
        steps.append(("dropout", (), {"p": p, "noise": "element"}))
    x = tensors[0]
    for index, (kind, others, options) in enumerate(steps):
        y = output if index == len(steps) - 1 else torch.empty(0)
        graph.add(name, kind, (x, *others), y, **options)
        x = y


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear | _ConvNd):
        return "linear"
    if isinstance(module, nn.ReLU | nn.ReLU6):
        return "relu"
    if isinstance(module, _DropoutNd):
        return "dropout"
    return "same" if isinstance(module, nn.Flatten | nn.Identity | nn.Unflatten) else "other"


def _details(module: nn.Module, x: Tensor) -> dict[str, Any]:
    if isinstance(module, _DropoutNd):
        element = "element" if isinstance(module, nn.Dropout) else ""
        channel = "channel" if isinstance(module, _CHANNEL_DROPOUT) else ""
        return {"p": float(module.p), "noise": element or channel}
    if isinstance(module, nn.Linear | _ConvNd):
        spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
        return {"layer": module, "x": x, "axis": -1 - spatial}
    return {}


class _Functions(TorchFunctionMode):
    """Adds to a graph what forward methods do without layers."""

    def __init__(self, graph: Graph, depth: list[int]) -> None:
        super().__init__()
        self._graph = graph
        self._depth = depth

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._depth[0] or not isinstance(output, Tensor):
            return output
        given = [*args, *(kwargs or {}).values()]
        given += [x for item in given if isinstance(item, tuple | list) for x in item]
        tensors = tuple(x for x in given if isinstance(x, Tensor))
        if any(self._graph.made(x) for x in tensors):
            name = getattr(func, "__name__", "")
            kind = _FUNCTIONS.get(name, "other")
            options: dict[str, Any] = {}
            if kind == "dropout":
                p = (kwargs or {}).get("p", args[1] if len(args) > 1 else 0.5)
                options = {"p": float(p), "noise": "element"}
            self._graph.add(name, kind, tensors, output, **options)
        return output
