"""Activations without parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bnext import _core
from bnext import functional as F
from bnext.nn import _check
from bnext.nn.module import Array, Backward, Module

__all__ = ["GELU", "Hardswish", "LeakyReLU", "ReLU", "ReLU6", "SiLU", "activation_layer"]


class _Activation(Module):
    """One of `bnext.functional.activations`, on its own.

    Normalization by mean 0, variance 1 and eps 0 changes nothing, and its kernels do the rest.
    """

    _function: ClassVar[str]
    negative_slope = 0.01

    def __call__(self, x: npt.ArrayLike) -> Array:
        array = _check.floating(self, x)
        y: Array = self._applied(F.batch_norm_inference, array)
        return y.reshape(array.shape)

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        array = _check.floating(self, x)
        y, saved = self._applied(_core.batch_norm_inference_forward, array)

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, array.shape, array.dtype)
            return F.batch_norm_backward(grad.reshape(1, 1, -1), saved).x.reshape(array.shape)

        return y.reshape(array.shape), backward

    def _applied(self, function: Callable[..., Any], x: Array) -> Any:
        return function(
            x.reshape(1, 1, -1),
            mean=[0],
            var=[1],
            eps=0,
            activation=self._function,
            negative_slope=self.negative_slope,
        )


class ReLU(_Activation):
    """``max(x, 0)``; NaN stays NaN.

    x has any shape, float32, float64, float16 or bfloat16. The gradient at 0 is 0. After a
    `BatchNorm`, ``BatchNorm(..., activation="relu")`` is the same in one pass over memory; so it is
    for the other activations.

    Examples
    --------
    >>> ReLU()(np.array([-1.0, 0.0, 2.0]))
    array([0., 0., 2.])
    """

    _function = "relu"

    def forward(self, x: npt.ArrayLike) -> tuple[Array, Backward]:
        # Unlike x, y is kept by the next layer anyway.
        y = self(x)

        def backward(grad_y: Array) -> Array:
            grad = _check.gradient(self, grad_y, y.shape, y.dtype)
            return np.where(y <= 0, y.dtype.type(0), grad)

        return y, backward


class LeakyReLU(_Activation):
    """``x`` where x > 0, else ``negative_slope * x``.

    x has any shape, float32, float64, float16 or bfloat16. The gradient at 0 is `negative_slope`.

    Parameters
    ----------
    negative_slope : float, default 0.01
        Finite.

    Examples
    --------
    >>> LeakyReLU(0.5)(np.array([-1.0, 0.0, 2.0]))
    array([-0.5,  0. ,  2. ])
    """

    _function = "leaky_relu"

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = _check.finite("LeakyReLU", "negative_slope", negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope:g}"


class ReLU6(_Activation):
    """``min(max(x, 0), 6)``; NaN stays NaN.

    x has any shape, float32, float64, float16 or bfloat16. The gradient at 0 and at 6 is 0.

    References
    ----------
    Howard et al., "MobileNets", arXiv:1704.04861; Sandler et al., "MobileNetV2", arXiv:1801.04381.

    Examples
    --------
    >>> ReLU6()(np.array([-1.0, 2.0, 7.0]))
    array([0., 2., 6.])
    """

    _function = "relu6"


class Hardswish(_Activation):
    """``x * min(max(x + 3, 0), 6) / 6``.

    x has any shape, float32, float64, float16 or bfloat16. The gradient at -3 is 0, at 3 it is 1.

    References
    ----------
    Howard et al., "Searching for MobileNetV3", arXiv:1905.02244, section 5.2.

    Examples
    --------
    >>> Hardswish()(np.array([-3.0, 0.0, 3.0]))
    array([-0.,  0.,  3.])
    """

    _function = "hardswish"


class SiLU(_Activation):
    """``x / (1 + exp(-x))``, also called swish.

    x has any shape, float32, float64, float16 or bfloat16.

    References
    ----------
    Elfwing, Uchibe & Doya, "Sigmoid-weighted linear units for neural network function
    approximation in reinforcement learning", arXiv:1702.03118.

    Examples
    --------
    >>> SiLU()(np.array([0.0, np.inf]))
    array([ 0., inf])
    """

    _function = "silu"


class GELU(_Activation):
    r"""The approximation by tanh of x times the normal distribution function.

    .. math:: \frac{x}{2} \Bigl(1 + \tanh\bigl(\sqrt{2 / \pi}\,(x + 0.044715\, x^3)\bigr)\Bigr)

    It differs from the function itself, with erf, by less than 5e-4.

    x has any shape, float32, float64, float16 or bfloat16.

    Parameters
    ----------
    approximate : "tanh"
        As `torch.nn.GELU` calls it, whose default "none" (erf) is not offered.

    Raises
    ------
    ValueError
        For another `approximate`.

    References
    ----------
    Hendrycks & Gimpel, "Gaussian error linear units", arXiv:1606.08415, section 2.

    Examples
    --------
    >>> GELU()(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1588,  0.    ,  0.8412])
    """

    _function = "gelu"

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        if approximate != "tanh":
            raise ValueError(f'GELU: approximate: expected "tanh", got {approximate!r}')

    def extra_repr(self) -> str:
        return "approximate='tanh'"


_KINDS: dict[str, type[_Activation]] = {
    kind._function: kind for kind in (ReLU, LeakyReLU, ReLU6, Hardswish, SiLU, GELU)
}


def activation_layer(activation: str, negative_slope: float = 0.01) -> Module:
    """The layer for one of `bnext.functional.activations`."""
    kind = _KINDS[activation]
    return LeakyReLU(negative_slope) if kind is LeakyReLU else kind()
