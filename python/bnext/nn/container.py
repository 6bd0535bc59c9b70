"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bnext.nn import _blas
from bnext.nn.module import Array, Backward, Module


class Sequential(Module):
    """Layers one after the other.

    Parameters
    ----------
    *layers : Module
        Their names are "0", "1", ...; one mapping of names to layers may be given instead.

    Examples
    --------
    >>> from bnext import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> list(model.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(self, *layers: Module | Mapping[str, Module]) -> None:
        super().__init__()
        named: Mapping[str, Module | Mapping[str, Module]]
        if len(layers) == 1 and isinstance(layers[0], Mapping):
            named = layers[0]
        else:
            named = {str(index): layer for index, layer in enumerate(layers)}
        for name, layer in named.items():
            if not isinstance(layer, Module):
                raise TypeError(
                    f"Sequential: {name}: expected a Module, got {type(layer).__name__}"
                )
            self.register_module(name, layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __getitem__(self, index: int) -> Module:
        return list(self)[index]

    def __call__(self, x: Array) -> Array:
        for layer in self:
            x = layer(x)
        return x

    def forward(self, x: Array) -> tuple[Array, Backward]:
        steps: list[Backward] = []
        for layer in self:
            x, step = layer.forward(x)
            steps.append(step)

        def backward(grad: Array) -> Array:
            for step in reversed(steps):
                grad = step(grad)
            return grad

        return x, backward


class Residual(Module):
    """``y = body(x) + shortcut(x)``.

    Parameters
    ----------
    body : Module
    shortcut : Module, optional
        By default the identity.

    Raises
    ------
    ValueError
        If the two terms differ in shape.

    Examples
    --------
    >>> from bnext import nn
    >>> nn.Residual(nn.ReLU())(np.array([-1.0, 2.0]))
    array([-1.,  4.])
    """

    def __init__(self, body: Module, shortcut: Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def _add(self, body: Array, shortcut: Array) -> Array:
        if body.shape != shortcut.shape:
            raise ValueError(
                f"{self.label}: expected body and shortcut of one shape, "
                f"got {body.shape} and {shortcut.shape}"
            )
        return _blas.add(body, shortcut)

    def __call__(self, x: Array) -> Array:
        x = np.asarray(x)
        return self._add(self.body(x), x if self.shortcut is None else self.shortcut(x))

    def forward(self, x: Array) -> tuple[Array, Backward]:
        x = np.asarray(x)
        body, body_backward = self.body.forward(x)
        if self.shortcut is None:
            return self._add(body, x), lambda grad: _blas.add(body_backward(grad), grad)
        shortcut, shortcut_backward = self.shortcut.forward(x)

        def backward(grad: Array) -> Array:
            return _blas.add(body_backward(grad), shortcut_backward(grad))

        return self._add(body, shortcut), backward
