"""Parameters and the base class of every layer."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnext._table import Table

Array = npt.NDArray[Any]
Backward = Callable[[Array], Array]


def number(kind: str, argument: str, value: Any) -> float:
    """`value` as a float; TypeError ``kind: argument: expected a number, got ...``."""
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{kind}: {argument}: expected a number, got {type(value).__name__}")


def check_state(kind: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Whether `state` can take the place of `own`, as `load_state_dict` of a `kind` wants it."""
    where = f"{kind}.load_state_dict"
    if not isinstance(state, Mapping):
        raise TypeError(f"{where}: state: expected a mapping, got {type(state).__name__}")
    problems = [f"missing key {key!r}" for key in own.keys() - state.keys()]
    problems += [f"unexpected key {key!r}" for key in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        mine, given = own[key], np.asarray(state[key])
        if np.shape(mine) != given.shape:
            problems.append(f"{key!r}: expected shape {np.shape(mine)}, got {given.shape}")
        elif isinstance(mine, np.ndarray) and not np.can_cast(given.dtype, mine.dtype, "same_kind"):
            problems.append(f"{key!r}: expected dtype {mine.dtype}, got {given.dtype}")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(sorted(problems)))


class Parameter:
    """A trainable array and its gradient.

    Parameters
    ----------
    data : ndarray
        The value; optimizers update it in place.
    decay : bool, default True
        Whether weight decay applies. BatchNorm's weight and bias and every other
        layer's bias say no.

    Attributes
    ----------
    grad : ndarray or None
        Sum of the gradients since the last `zero_grad`; `None` before the first.
    """

    def __init__(self, data: Array, *, decay: bool = True) -> None:
        self.data = data
        self.grad: Array | None = None
        self.decay = decay

    def accumulate(self, grad: Array) -> None:
        """Add `grad` into `.grad`."""
        if self.grad is None:
            self.grad = np.array(grad, dtype=self.data.dtype)
        else:
            self.grad += grad

    def __repr__(self) -> str:
        return f"Parameter(shape={self.data.shape}, dtype={self.data.dtype})"


class Mode(NamedTuple):
    """What a normalization layer would do in `forward` now.

    Attributes
    ----------
    name, kind : str
        The layer's dotted path and class.
    training : bool
    statistics : str
        What it normalizes by: "batch", "ghost batch" or "running".
    bank : str or None
        The bank of running statistics in use.
    updates : bool
        Whether running statistics move.
    trains : bool
        Whether `weight` and `bias` get gradients.
    dropout : float
        Probability in effect.
    """

    name: str
    kind: str
    training: bool
    statistics: str
    bank: str | None
    updates: bool
    trains: bool
    dropout: float


class Module:
    """Base class of layers and models.

    A subclass assigns `Parameter`s, sub-`Module`s and (through `register_buffer`)
    arrays that are saved but not trained, and implements

    - ``forward(x) -> (y, backward)``: one pass that can be differentiated.
      ``grad_x = backward(grad_y)`` adds into each parameter's ``.grad``. What
      backward needs lives in that closure, so one layer can be used twice.
      ``training`` chooses batch statistics and dropout, or neither.
    - ``__call__(x) -> y``: evaluation, whatever the mode: running statistics, no
      dropout, nothing kept for backward.
    """

    training: bool
    name: str
    _parameters: dict[str, Parameter]
    _buffers: dict[str, Array]
    _modules: dict[str, Module]

    def __init__(self) -> None:
        # Set past __setattr__, which looks things up in these dictionaries.
        self.__dict__.update(_parameters={}, _buffers={}, _modules={}, training=True, name="")

    def forward(self, x: Array) -> tuple[Array, Backward]:
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def __call__(self, x: Array) -> Array:
        raise NotImplementedError(f"{type(self).__name__}.__call__")

    # -- registration ------------------------------------------------------------------
    def __setattr__(self, name: str, value: Any) -> None:
        for registry in (self._parameters, self._modules):
            registry.pop(name, None)
        if isinstance(value, Parameter):
            self._parameters[name] = value
        elif isinstance(value, Module):
            self.register_module(name, value)
        elif name in self._buffers:
            self._buffers[name] = value
        object.__setattr__(self, name, value)

    def register_buffer(self, name: str, value: Array) -> None:
        """Keep `value` as ``self.<name>`` and in `state_dict`, untrained."""
        self._buffers[name] = value
        object.__setattr__(self, name, value)

    def register_module(self, name: str, module: Module) -> None:
        """Make `module` a child called `name`; error messages use the dotted path."""
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"{type(self).__name__}: expected names of layers that are strings and not empty, "
                f"got {name!r}"
            )
        self._modules[name] = module
        module._set_name(f"{self.name}.{name}" if self.name else name)

    def _set_name(self, name: str) -> None:
        object.__setattr__(self, "name", name)
        for child_name, child in self._modules.items():
            child._set_name(f"{name}.{child_name}")

    @property
    def label(self) -> str:
        """What error messages call this layer: its type and dotted path."""
        return f"{type(self).__name__} {self.name!r}" if self.name else type(self).__name__

    # -- walking -----------------------------------------------------------------------
    def children(self) -> Iterator[Module]:
        yield from self._modules.values()

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, each once, with dotted names."""
        yield from self._walk(prefix, set())

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, module in self._modules.items():
            yield from module._walk(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        for _, module in self.named_modules():
            yield module

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter once, with its dotted name."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}" if path else name, parameter

    def parameters(self) -> Iterator[Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    # -- mode --------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Module:
        """Set training mode (or, with False, evaluation mode) here and below."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Set evaluation mode here and below."""
        return self.train(False)

    def _mode(self) -> Mode | None:
        """What `forward` would do now; None for layers without statistics."""
        return None

    def modes(self) -> Table[Mode]:
        """What each normalization layer, here and below, would do now; prints as a table.

        Examples
        --------
        >>> from bnext import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3), nn.BatchNorm(3, banks=("a",)))
        >>> _ = model[1].freeze(affine=False)
        >>> print(model.modes())
        name  kind       training  statistics  bank  updates  trains  dropout
        1     BatchNorm  yes       running     -     no       yes     0
        2     BatchNorm  yes       batch       a     yes      yes     0
        """
        modes = ((name, module._mode()) for name, module in self.named_modules())
        return Table(Mode, [mode._replace(name=name) for name, mode in modes if mode is not None])

    # -- state -------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Array]:
        """Parameters and buffers by dotted name; the arrays themselves, not copies.

        Raises
        ------
        ValueError
            If two have the same name, such as "b.weight" of "a" and "weight" of "a.b".
        """
        state: dict[str, Array] = {}

        def add(name: str, array: Array) -> None:
            if name in state:
                raise ValueError(
                    f"{self.label}: state_dict: expected different names, got {name!r} twice"
                )
            state[name] = array

        for name, parameter in self.named_parameters():
            add(name, parameter.data)
        for path, module in self.named_modules():
            for name, buffer in module._buffers.items():
                add(f"{path}.{name}" if path else name, buffer)
        return state

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Copy `state` into this module's parameters and buffers.

        Raises
        ------
        ValueError
            If a key is missing or unexpected, or an array has another shape or a dtype that this
            one has no place for. Nothing has changed then.
        TypeError
            If `state` is no mapping.
        """
        own = self.state_dict()
        check_state(type(self).__name__, own, state)
        for key, array in own.items():
            array[...] = state[key]

    # -- display -----------------------------------------------------------------------
    def extra_repr(self) -> str:
        """The arguments shown between the brackets of `repr`."""
        return ""

    def __repr__(self) -> str:
        head = f"{type(self).__name__}({self.extra_repr()}"
        if not self._modules:
            return head + ")"
        lines = [
            f"  ({name}): " + repr(module).replace("\n", "\n  ")
            for name, module in self._modules.items()
        ]
        return "\n".join([head, *lines, ")"])
