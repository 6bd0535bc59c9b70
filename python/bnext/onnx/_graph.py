"""A module for layers that do not just follow each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bnext.nn import _blas
from bnext.nn.module import Array, Backward, Module


class Graph(Module):
    """Layers and sums wired as in an ONNX graph; what `load` returns if it is no plain sequence.

    Parameters
    ----------
    layers : mapping of str to Module
        Each is called once.
    steps : sequence of (str or None, tuple of int)
        The layer's name, or None for a sum of two, and the numbers of what goes in: 0 is the
        input x, k the result of step k - 1. The last step gives the output.

    Raises
    ------
    ValueError
        If two terms of a sum differ in shape.

    Examples
    --------
    >>> from bnext import nn, onnx
    >>> graph = onnx.Graph({"relu": nn.ReLU()}, [("relu", (0,)), (None, (0, 1))])
    >>> graph(np.array([-1.0, 2.0]))  # x + relu(x)
    array([-1.,  4.])
    """

    def __init__(
        self, layers: Mapping[str, Module], steps: Sequence[tuple[str | None, tuple[int, ...]]]
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.register_module(name, layer)
        self.steps = tuple(steps)

    def _add(self, terms: list[Array]) -> Array:
        if terms[0].shape != terms[1].shape:
            raise ValueError(
                f"{self.label}: expected two terms of one shape, "
                f"got {terms[0].shape} and {terms[1].shape}"
            )
        return _blas.add(terms[0], terms[1])

    def __call__(self, x: Array) -> Array:
        values = [np.asarray(x)]
        for name, inputs in self.steps:
            terms = [values[index] for index in inputs]
            values.append(self._add(terms) if name is None else self._modules[name](terms[0]))
        return values[-1]

    def forward(self, x: Array) -> tuple[Array, Backward]:
        values = [np.asarray(x)]
        backwards: list[Backward | None] = []
        for name, inputs in self.steps:
            terms = [values[index] for index in inputs]
            if name is None:
                y, backward = self._add(terms), None
            else:
                y, backward = self._modules[name].forward(terms[0])
            values.append(y)
            backwards.append(backward)
        steps = self.steps

        def graph_backward(grad_y: Array) -> Array:
            grads: list[Array | None] = [None] * len(steps) + [grad_y]
            for index in reversed(range(len(steps))):
                # Not None: every result but the last is used by a later step.
                grad, backward = grads[index + 1], backwards[index]
                assert grad is not None
                if backward is not None:
                    grad = backward(grad)
                for target in steps[index][1]:
                    known = grads[target]
                    grads[target] = grad if known is None else _blas.add(known, grad)
            grad_x = grads[0]
            assert grad_x is not None
            return grad_x

        return values[-1], graph_backward
