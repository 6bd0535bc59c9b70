"""What the forward method of a module does, as a graph, and on what that depends.

`torch.fx` runs forward on placeholders. What Python decides on the way is decided once: a graph
stands for the method only if none of it can come out otherwise. `trace` refuses what it cannot see
through, and notes what else has to stay as it is.
"""

from __future__ import annotations

import dis
import inspect
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode


class NotTraceable(Exception):
    """Why a graph would not stand for the method."""


_Read = tuple[nn.Module, str, Any]


class Traced(NamedTuple):
    """The graph, and what it holds for.

    `reads`: attributes that Python looked at; `children`: those of each module that forward may
    have looked into, not only called.
    """

    graph: fx.Graph
    reads: list[_Read]
    children: list[tuple[nn.Module, tuple[nn.Module, ...]]]


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
    before = _states(module)
    unseen: list[str] = []
    try:
        with _lock, _no_draws(), _record(module) as (reads, codes, unseen), _NoValues():
            graph = _Tracer().trace(module)
    except NotTraceable:
        raise
    except Exception as error:  # whatever placeholders made of the user's code
        if not unseen:
            message = str(error).splitlines()[0] if str(error) else repr(error)
            raise NotTraceable(message) from error
    finally:
        changed = _restore(before)
    if unseen:
        raise NotTraceable(f"forward uses {unseen[0]}")
    if changed:
        raise NotTraceable(f"forward sets {changed}")
    for code in codes:
        _refuse(code)
    for _, name, value in reads:
        if not _is_constant(value):
            raise NotTraceable(f"forward reads {name}, a {type(value).__name__}")
    called = [module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"]
    looked_into = _descendants(module, set(map(id, called)))
    return Traced(graph, reads, [(m, tuple(m._modules.values())) for m in looked_into])


# torch.fx, and what records here, change nn.Module while they trace.
_lock = threading.RLock()


def _descendants(module: nn.Module, without: set[int]) -> Iterator[nn.Module]:
    """`module` and what is below it, each once, but for `without` and what is below those."""
    without.add(id(module))
    yield module
    for child in module.children():
        if id(child) not in without:
            yield from _descendants(child, without)


class _NoValues(TorchFunctionMode):
    """Inside, Python does not look at the numbers in tensors, such as buffers and random ones."""

    _reads = (
        *(getattr(Tensor, f"__{name}__") for name in
          ("array", "bool", "complex", "contains", "float", "index", "int")),
        *(Tensor.item, Tensor.numpy, Tensor.tolist, Tensor.equal, Tensor.is_nonzero),
        *(torch.equal, torch.is_nonzero, torch.allclose, Tensor.allclose),
    )  # fmt: skip

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self._reads:
            raise NotTraceable("forward looks at the numbers in a tensor")
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_draws() -> Iterator[None]:
    """NotTraceable if random numbers are drawn inside, and as if they had not been."""

    def states() -> tuple[Any, ...]:
        legacy = np.random.get_state()  # noqa: NPY002 (which is what users may draw from)
        return random.getstate(), legacy, torch.get_rng_state()

    def key(python: Any, numpy: Any, pytorch: Tensor) -> tuple[Any, ...]:
        _, words, position, *_ = numpy
        return python, words.tobytes(), position, pytorch.numpy().tobytes()

    before = states()
    try:
        yield
    finally:
        drawn = key(*states()) != key(*before)
        for restore, state in zip(
            (random.setstate, np.random.set_state, torch.set_rng_state), before, strict=True
        ):
            restore(state)
    if drawn:
        raise NotTraceable("forward draws random numbers")


class _Value(fx.Proxy):
    """A placeholder that does not let itself be taken for something else than a tensor."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance asks after the type itself
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            raise NotTraceable("forward asks for the type of a value")
        return _Value


def _in_place(operation: Any) -> Any:
    def method(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


# Without these, Python takes x += y for x = x + y, which leaves x what it was.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
              "iand", "ior", "ixor", "ilshift", "irshift"):  # fmt: skip
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_transparent(m)

    def create_arg(self, a: Any) -> Any:
        # A graph makes plain ones of others.
        plain = (list, dict, tuple, torch.Size)
        kind = type(a)
        if issubclass(kind, plain) and kind not in plain and not hasattr(kind, "_fields"):
            raise NotTraceable(f"forward makes a container that a graph has not: {kind.__name__}")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


# Attributes of every module that are not the user's.
_INTERNAL = set(nn.Module().__dict__) - {"training"}
# Parts of PyTorch whose effect a graph does not keep,
_UNSEEN = ("torch.autograd", "torch.amp", "torch.utils.checkpoint")
# and functions whose answer it does not ask for again.
_ASKS = {
    hasattr,  # of which every placeholder has every attribute
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.is_autocast_enabled,
}


@contextmanager
def _record(root: nn.Module) -> Iterator[tuple[list[_Read], set[CodeType], list[str]]]:
    """What happens inside: attributes of `root` and its descendants that are read, code of others
    than PyTorch that runs, modules of PyTorch in `_UNSEEN` that do, and functions of `_ASKS`.
    """
    reads: dict[tuple[int, str], _Read] = {}
    found: list[_Read] = []
    codes: set[CodeType] = set()
    unseen: list[str] = []
    ours = {id(module) for module in root.modules()}

    def getattribute(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        own = object.__getattribute__(self, "__dict__")
        if id(self) in ours and name not in _INTERNAL and name in own:
            reads[id(self), name] = (self, name, value)
        return value

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        # Nothing may be raised from here, where PyTorch may be importing a part of itself.
        if event not in ("call", "c_call"):
            return
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        users = package not in ("torch", "bnext") and package not in sys.stdlib_module_names
        if event == "c_call":
            if users and argument in _ASKS:
                unseen.append(argument.__name__)
            return
        if module.startswith(_UNSEEN):
            unseen.append(module)
        if users:
            codes.add(frame.f_code)

    previous = sys.getprofile()
    nn.Module.__getattribute__ = getattribute
    sys.setprofile(profile)
    try:
        yield found, codes, unseen
    finally:
        sys.setprofile(previous)
        del nn.Module.__getattribute__
        found += reads.values()


def _refuse(code: CodeType) -> None:
    """NotTraceable for decisions that placeholders do not notice."""
    before = ""
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("BEFORE_WITH", "SETUP_WITH") or instruction.argrepr == "__enter__":
            raise NotTraceable(f"a with statement in {code.co_name}")
        if (name == "IS_OP" or "_NONE" in name) and before not in ("LOAD_ATTR", "LOAD_METHOD"):
            raise NotTraceable(f"{code.co_name} compares a value with None, or by `is`")
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
