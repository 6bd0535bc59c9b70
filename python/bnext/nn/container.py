"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bnext.nn import _blas, _check
from bnext.nn.batchnorm import BatchNorm
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
            self.register_module(name, _check.layer("Sequential", name, layer))

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
    """``y = body(x) + shortcut(x)``, or ``norm(body(x), shortcut(x))`` in one pass.

    Parameters
    ----------
    body : Module
    shortcut : Module, optional
        By default the identity.
    norm : BatchNorm, optional
        Normalizes what the body gives, adds the shortcut, and applies its activation, as at the
        end of a block of He et al. (2015).

    Raises
    ------
    ValueError
        If the two terms differ in shape.

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> nn.Residual(nn.ReLU())(np.array([-1.0, 2.0]))
    array([-1.,  4.])
    >>> body = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    >>> block = nn.Residual(body, norm=nn.BatchNorm(8, activation="relu"))
    >>> block(np.ones((2, 8, 4, 4), np.float32)).shape
    (2, 8, 4, 4)
    """

    def __init__(
        self, body: Module, shortcut: Module | None = None, *, norm: BatchNorm | None = None
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        if norm is not None and not isinstance(norm, BatchNorm):
            raise TypeError(f"{kind}: norm: expected a BatchNorm, got {type(norm).__name__}")
        self.body = _check.layer(kind, "body", body)
        self.shortcut = None if shortcut is None else _check.layer(kind, "shortcut", shortcut)
        self.norm = norm

    def _add(self, body: Array, shortcut: Array) -> Array:
        if body.shape != shortcut.shape:
            raise ValueError(
                f"{self.label}: expected body and shortcut of one shape, "
                f"got {body.shape} and {shortcut.shape}"
            )
        return _blas.add(body, shortcut)

    def __call__(self, x: Array) -> Array:
        x = _check.native(self.label, "x", x)
        body, shortcut = self.body(x), x if self.shortcut is None else self.shortcut(x)
        return self._add(body, shortcut) if self.norm is None else self.norm(body, shortcut)

    def forward(self, x: Array) -> tuple[Array, Backward]:
        x = _check.native(self.label, "x", x)
        body, body_backward = self.body.forward(x)
        shortcut, shortcut_backward = (
            (x, _same) if self.shortcut is None else self.shortcut.forward(x)
        )
        y, both_backward = (
            (self._add(body, shortcut), _twice)
            if self.norm is None
            else self.norm.forward(body, shortcut)
        )

        def backward(grad: Array) -> Array:
            grad_body, grad_shortcut = both_backward(grad)
            return _blas.add(body_backward(grad_body), shortcut_backward(grad_shortcut))

        return y, backward


def _same(grad: Array) -> Array:
    return grad


def _twice(grad: Array) -> tuple[Array, Array]:
    return grad, grad
