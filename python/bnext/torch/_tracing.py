"""What the forward method of a module does, as a graph, and on what that depends.

`torch.fx` runs forward on placeholders. What Python decides on the way is decided once: a graph
stands for the method only if none of it can come out otherwise. `trace` refuses what it cannot see
through, and notes what else has to stay as it is.
"""

from __future__ import annotations

import dis
import gc
import inspect
import operator
import pickle
import random
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode


class NotTraceable(Exception):
    """Why a graph would not stand for the method."""


class Read(NamedTuple):
    """What forward saw of a module: an attribute of its own, or, of a parameter or buffer in the
    dictionary of that name, whether it is None.
    """

    module: nn.Module
    dictionary: str
    name: str
    value: Any

    @property
    def now(self) -> Any:
        own = self.module.__dict__
        if self.dictionary:
            return own[self.dictionary].get(self.name) is None
        return own.get(self.name)


class Traced(NamedTuple):
    """The graph, and what it holds for.

    `reads`: attributes that Python looked at; `children`: those of each module that forward may
    have looked into, not only called; `entered`: modules on the way to those that are called.
    """

    graph: fx.Graph
    reads: list[Read]
    children: list[tuple[nn.Module, tuple[tuple[str, nn.Module | None], ...]]]
    entered: list[nn.Module]


class ClassForward:
    """In the place of a module's ``forward``, and the same as the method of its class."""


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward method of its class and nothing else."""
    forward = module.__dict__.get("forward")
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ) and (forward is None or isinstance(forward, ClassForward))


def is_transparent(module: nn.Module) -> bool:
    """Whether its children can be called in its place."""
    return type(module) is nn.Sequential and is_plain(module)


def as_leaf(module: nn.Module, *values: Any) -> Any:
    """A call of `module` in a graph that `torch.fx` traces, `values[0]` being one of its
    placeholders. It looks into other modules than those of `torch.nn`.
    """
    tracer = values[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), values, {})


def trace(module: nn.Module) -> Traced:
    """What ``type(module).forward`` does.

    Raises
    ------
    NotTraceable
        If a graph cannot stand for it.
    """
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not (
            parameter.empty
        ):
            raise NotTraceable(f"argument {parameter.name} of forward may be left out")
    before, seen = _states(module), _Seen()
    try:
        with _lock, _record(module, seen), _NoValues(seen):
            graph = _Tracer(seen).trace(module)
    except NotTraceable:
        raise
    except Exception as error:  # whatever placeholders made of the user's code
        if not seen.unseen:
            message = str(error).splitlines()[0] if str(error) else repr(error)
            raise NotTraceable(message) from error
    finally:
        changed = _restore(before)
    if seen.unseen:
        raise NotTraceable(f"forward {seen.unseen[0]}")
    if changed:
        raise NotTraceable(f"forward sets {changed}")
    for code in seen.codes:
        _refuse(code)
    for read in seen.reads.values():
        if not _is_constant(read.value):
            raise NotTraceable(f"forward reads {read.name}, a {type(read.value).__name__}")
    targets = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    called = {id(module.get_submodule(target)) for target in targets}
    parents = {target[: dot.start()] for target in targets for dot in re.finditer(r"\.", target)}
    return Traced(
        graph,
        list(seen.reads.values()),
        [(m, tuple(m._modules.items())) for m in _descendants(module, called)],
        [module.get_submodule(name) for name in parents],
    )


# torch.fx, and what records here, change nn.Module while they trace.
_lock = threading.RLock()


def _descendants(module: nn.Module, without: set[int]) -> Iterator[nn.Module]:
    """`module` and what is below it, each once, but for `without` and what is below those."""
    without.add(id(module))
    yield module
    for child in module.children():
        if id(child) not in without:
            yield from _descendants(child, without)


@dataclass
class _Seen:
    """What is noticed while forward is traced: attributes that are read, code of others than
    PyTorch that runs, and what a graph cannot repeat.
    """

    reads: dict[tuple[int, str], Read] = field(default_factory=dict)
    codes: set[CodeType] = field(default_factory=set)
    unseen: list[str] = field(default_factory=list)
    asking: bool = False  # inside of hasattr or getattr

    def refuse(self, reason: str) -> NotTraceable:
        """To be raised; it counts even if somebody catches it."""
        self.unseen.append(reason)
        return NotTraceable(f"forward {reason}")


class _NoValues(TorchFunctionMode):
    """Inside, Python does not look at the numbers in tensors, such as random ones."""

    _reads = (
        *(getattr(Tensor, f"__{name}__") for name in
          ("array", "bool", "complex", "contains", "float", "index", "int")),
        *(Tensor.item, Tensor.numpy, Tensor.tolist, Tensor.equal, Tensor.is_nonzero),
        *(torch.equal, torch.is_nonzero, torch.allclose, Tensor.allclose),
    )  # fmt: skip

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self._reads:
            raise self._seen.refuse("looks at the numbers in a tensor")
        return func(*args, **(kwargs or {}))


class _Value(fx.Proxy):
    """A placeholder that does not let itself be taken for something else than a tensor."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance asks after the type itself
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            raise self.tracer.seen.refuse("asks for the type of a value")
        return _Value

    def __getattr__(self, name: str) -> Any:
        # A placeholder has every attribute.
        if self.tracer.seen.asking and not hasattr(Tensor, name):
            raise self.tracer.seen.refuse(f"asks whether a value has {name}")
        return super().__getattr__(name)


def _in_place(operation: Any) -> Any:
    def method(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


# Without these, Python takes x += y for x = x + y, which leaves x what it was.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
              "iand", "ior", "ixor", "ilshift", "irshift"):  # fmt: skip
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or what they are now would be constant

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_transparent(m)

    def create_arg(self, a: Any) -> Any:
        # A graph makes plain ones of others.
        plain = (list, dict, tuple, torch.Size)
        kind = type(a)
        if issubclass(kind, plain) and kind not in plain and not hasattr(kind, "_fields"):
            raise self.seen.refuse(f"makes a container that a graph has not: {kind.__name__}")
        if issubclass(
            kind, np.floating
        ):  # of which float64 passes for a float, but is written else
            a = float(a)
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


# Attributes of every module that are not the user's.
_INTERNAL = set(nn.Module().__dict__) - {"training"}
# Parts of PyTorch whose effect a graph does not keep.
_UNSEEN = ("torch.autograd", "torch.amp", "torch.utils.checkpoint")
# Functions whose answer it does not ask for again, or which it does not call again.
_NOT_AGAIN = {
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.is_autocast_enabled,
    torch.is_autocast_cpu_enabled,
    torch.get_default_dtype,
    print,
    warnings.warn,
}
_NOT_AGAIN_IN_PYTHON = {
    function.__code__: function.__name__
    for function in (torch.are_deterministic_algorithms_enabled, torch.jit.is_tracing)
}


@contextmanager
def _record(root: nn.Module, seen: _Seen) -> Iterator[None]:
    """Note in `seen` what happens inside in `root` and its descendants."""
    ours = {id(module) for module in root.modules()}

    def getattribute(self: nn.Module, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if id(self) in ours and name not in _INTERNAL:
            for dictionary in ("_parameters", "_buffers"):
                if name in own[dictionary]:
                    is_none = own[dictionary][name] is None
                    seen.reads[id(self), name] = Read(self, dictionary, name, is_none)
            # What the class has, the module has not. (Of children, all are watched.)
            if name in own or not (hasattr(nn.Module, name) or name in own["_modules"]):
                seen.reads.setdefault((id(self), name), Read(self, "", name, own.get(name)))
        return object.__getattribute__(self, name)

    def is_users(frame: FrameType | None) -> bool:
        package = frame.f_globals.get("__name__", "").partition(".")[0] if frame else "torch"
        return package not in ("torch", "bnext") and package not in sys.stdlib_module_names

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        # Nothing may be raised from here, where PyTorch may be importing a part of itself.
        if event == "c_call":
            if is_users(frame):
                seen.asking = argument in (hasattr, getattr)
                if argument in _NOT_AGAIN:
                    seen.unseen.append(f"uses {argument.__name__}")
        elif event in ("c_return", "c_exception"):
            if argument in (hasattr, getattr):
                seen.asking = False
        elif event == "call":
            module = frame.f_globals.get("__name__", "")
            if module.startswith(_UNSEEN):
                seen.unseen.append(f"uses {module}")
            if is_users(frame):
                seen.codes.add(frame.f_code)
            elif is_users(frame.f_back):
                if frame.f_code in _NOT_AGAIN_IN_PYTHON:
                    seen.unseen.append(f"uses {_NOT_AGAIN_IN_PYTHON[frame.f_code]}")
                if module == "logging":
                    seen.unseen.append("uses logging")

    def generators() -> bytes:
        legacy = np.random.get_state(legacy=False)  # noqa: NPY002
        return pickle.dumps((random.getstate(), legacy))

    previous, before, collecting = sys.getprofile(), generators(), gc.isenabled()
    gc.disable()  # what others let the garbage collector call is not forward's
    nn.Module.__getattribute__ = getattribute
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(previous)
        del nn.Module.__getattribute__
        if collecting:
            gc.enable()
        if generators() != before:
            seen.unseen.append("draws random numbers")


def _refuse(code: CodeType) -> None:
    """NotTraceable for decisions that placeholders do not notice."""
    before = ""
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("BEFORE_WITH", "SETUP_WITH") or instruction.argrepr == "__enter__":
            raise NotTraceable(f"a with statement in {code.co_name}")
        if (name == "IS_OP" or "_NONE" in name) and before not in ("LOAD_ATTR", "LOAD_METHOD"):
            raise NotTraceable(f"{code.co_name} compares a value with None, or by `is`")
        if name in ("PUSH_EXC_INFO", "SETUP_FINALLY"):
            raise NotTraceable(f"a try statement in {code.co_name}")
        if name == "STORE_GLOBAL" or (name == "LOAD_GLOBAL" and instruction.argval == "type"):
            raise NotTraceable(f"{code.co_name} sets a global variable, or asks for types")
        if name not in ("CACHE", "LOAD_CONST", "EXTENDED_ARG", "NOT_TAKEN"):
            before = name


def _is_constant(value: Any) -> bool:
    """Whether a later comparison shows that it is still the same."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    simple = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
    return isinstance(value, simple) or inspect.isroutine(value)


_State = list[tuple[dict[str, Any], dict[str, Any]]]


def _states(root: nn.Module) -> _State:
    """All dictionaries of attributes, and copies of them."""
    kinds = ("_parameters", "_buffers", "_modules")
    dictionaries = [
        dictionary
        for module in root.modules()
        for dictionary in (module.__dict__, *(module.__dict__[kind] for kind in kinds))
    ]
    return [(dictionary, dict(dictionary)) for dictionary in dictionaries]


def _restore(states: _State) -> str:
    """Make the dictionaries what they were; the name of something that had changed."""
    changed = ""
    for dictionary, before in states:
        now = dict(dictionary)
        for name in now.keys() | before.keys():
            if name not in now or name not in before or now[name] is not before[name]:
                changed = name
        if changed:
            dictionary.clear()
            dictionary.update(before)
    return changed
