"""Fully connected layer."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bnext import random
from bnext.nn import _blas, _check
from bnext.nn.module import Array, Backward, Module, Parameter


class Linear(Module):
    r"""Affine map of the last axis, as `torch.nn.Linear`: :math:`y = x W^T + b`.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool, default True
    dtype : float32 or float64

    Attributes
    ----------
    weight : Parameter (out_features, in_features)
        Drawn from U(-k, k), k = 1 / sqrt(in_features).
    bias : Parameter (out_features,), or None
        Drawn likewise.

    Notes
    -----
    x is (*, in_features) of `dtype`; y is (*, out_features). There are no half types. Results do
    not depend on the number of threads.

    Raises
    ------
    ValueError
        If the last axis of x has another size.
    TypeError
        If x has another dtype.

    Examples
    --------
    >>> Linear(3, 2)(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        self.in_features = _check.integer("Linear", "in_features", in_features, 1)
        self.out_features = _check.integer("Linear", "out_features", out_features, 1)
        self.dtype = _check.weight_dtype("Linear", dtype)
        bound = 1 / math.sqrt(self.in_features)
        draw = random.initial_rng().uniform
        shape = (self.out_features, self.in_features)
        self.weight = Parameter(draw(-bound, bound, shape).astype(self.dtype))
        self.bias = (
            Parameter(draw(-bound, bound, self.out_features).astype(self.dtype), decay=False)
            if bias
            else None
        )

    def _checked(self, x: npt.ArrayLike) -> Array:
        array = _check.floating(self, x, self.dtype)
        if array.ndim == 0 or array.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.label}: x: expected shape (*, {self.in_features}), got {array.shape}"
            )
        return array

    def _output(self, x: Array) -> Array:
        y = _blas.matmul(x.reshape(-1, self.in_features), self.weight.data.T)
        if self.bias is not None:
            y += self.bias.data
        return y.reshape(*x.shape[:-1], self.out_features)

    def __call__(self, x: npt.ArrayLike) -> Array:
        return self._output(self._checked(x))

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        array = self._checked(x)
        y = self._output(array)
        y_shape = y.shape

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, y_shape, self.dtype)
            grad = grad.reshape(-1, self.out_features)
            self.weight.accumulate(_blas.matmul(grad.T, array.reshape(-1, self.in_features)))
            if self.bias is not None:
                self.bias.accumulate(grad.sum(axis=0))
            return _blas.matmul(grad, self.weight.data).reshape(array.shape)

        return y, backward

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_features}, {self.out_features}{bias}"
