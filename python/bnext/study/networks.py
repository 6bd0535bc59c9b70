"""Small networks for the experiments, and layers that only experiments need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bnext import functional as F
from bnext import nn
from bnext.nn.module import Array, Backward, Module, Parameter

__all__ = ["DetachedBatchNorm", "GroupNorm", "StepNoise", "cnn", "mlp", "normalization", "residual"]

Unit = Callable[[int], Sequence[Module]]
"""``unit(channels)``: the layers that follow a linear layer or a convolution."""


def plain(_: int) -> list[Module]:
    """Nothing but ReLU."""
    return [nn.ReLU()]


def batch_norm(channels: int) -> list[Module]:
    """BatchNorm and ReLU."""
    return [nn.BatchNorm(channels, activation="relu")]


def normalization(kind: str, channels: int, **options: Any) -> list[Module]:
    """The layers called `kind`: "none", "batch", "group", "renorm", "ghost"."""
    if kind == "none":
        return []
    if kind == "group":
        return [GroupNorm(channels, **options)]
    if kind == "renorm":
        return [nn.BatchRenorm(channels, **options)]
    if kind == "ghost":
        return [nn.BatchNorm(channels, **{"ghost_batch_size": 4, **options})]
    if kind == "batch":
        return [nn.BatchNorm(channels, **options)]
    raise ValueError(f"normalization: kind: unknown {kind!r}")


def mlp(
    input_shape: tuple[int, ...],
    outputs: int,
    hidden: Sequence[int],
    unit: Unit,
    head: Sequence[Module] = (),
) -> nn.Sequential:
    """Linear layers of the widths `hidden`, each with its `unit`, then `head` and a last one."""
    layers: list[Module] = [nn.Flatten()]
    features = math.prod(input_shape)
    for width in hidden:
        layers += [nn.Linear(features, width), *unit(width)]
        features = width
    return nn.Sequential(*layers, *head, nn.Linear(features, outputs))


def cnn(
    input_shape: tuple[int, ...],
    outputs: int,
    unit: Unit,
    *,
    dense_unit: Unit | None = None,
    head: Sequence[Module] = (),
    channels: tuple[int, int] = (8, 16),
    dense: int = 64,
) -> nn.Sequential:
    """Two 3x3 convolutions, each halved by max-pooling, and a hidden linear layer.

    `dense_unit` follows the linear layer; by default `unit` does.
    """
    layers: list[Module] = []
    before, height, width = input_shape
    for number in channels:
        layers += [nn.Conv2d(before, number, 3, padding=1), *unit(number), nn.MaxPool2d(2)]
        before, height, width = number, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(before * height * width, dense)]
    layers += (dense_unit or unit)(dense)
    return nn.Sequential(*layers, *head, nn.Linear(dense, outputs))


def residual(
    input_shape: tuple[int, ...], outputs: int, width: int, block: Callable[[], Module], blocks: int
) -> nn.Sequential:
    """A linear layer, residual blocks of `width` units, and a last linear layer."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), width),
        *(block() for _ in range(blocks)),
        nn.Linear(width, outputs),
    )


class GroupNorm(Module):
    """Normalize groups of channels of each sample by themselves (Wu & He, arXiv:1803.08494).

    A sample's group is a channel of a batch of one for `batch_norm_forward`.
    """

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.groups = math.gcd(groups, channels)
        self.weight = Parameter(np.ones(channels, np.float32), decay=False)
        self.bias = Parameter(np.zeros(channels, np.float32), decay=False)

    def forward(self, x: Array) -> tuple[Array, Backward]:
        y, saved = F.batch_norm_forward(x.reshape(1, len(x) * self.groups, -1))
        n = y.reshape(x.shape)
        per_channel = (1, -1, *[1] * (x.ndim - 2))
        others = (0, *range(2, x.ndim))
        weight = self.weight.data.reshape(per_channel)

        def backward(grad: Array) -> Array:
            self.weight.accumulate((grad * n).sum(axis=others))
            self.bias.accumulate(grad.sum(axis=others))
            inner = np.ascontiguousarray(grad * weight).reshape(y.shape)
            grad_x: Array = F.batch_norm_backward(inner, saved).x.reshape(x.shape)
            return grad_x

        return n * weight + self.bias.data.reshape(per_channel), backward

    def __call__(self, x: Array) -> Array:
        y: Array = self.forward(x)[0]
        return y


class DetachedBatchNorm(nn.BatchNorm):
    """`BatchNorm` whose gradient takes mean and variance of the batch for constants."""

    def forward(self, x: Any, residual: Any = None, **options: Any) -> Any:
        if not self.uses_batch_statistics or residual is not None:
            return super().forward(x, residual, **options)
        y, exact = super().forward(x, **options)
        axes = (0, *range(2, x.ndim))
        var = x.var(axis=axes, keepdims=True)
        weight = 1.0 if self.weight is None else self.weight.data.reshape(var.shape)
        factor = (weight / np.sqrt(var + self.eps)).astype(x.dtype)

        def backward(grad: Array) -> Array:
            exact(grad)  # for weight and bias
            constant: Array = grad * factor
            return constant * (y > 0) if self.activation == "relu" else constant

        return y, backward


class StepNoise(Module):
    """In training, shift and scale each channel at random, anew at every step.

    Santurkar et al., arXiv:1805.11604, figure 2: noise that undoes the stable distributions of
    BatchNorm.
    """

    def __init__(self, seed: int, shift: float = 0.5, scale: float = 0.25) -> None:
        super().__init__()
        self._rng = np.random.default_rng([seed, 3])
        self._shift, self._scale = shift, scale

    def forward(self, x: Array) -> tuple[Array, Backward]:
        if not self.training:
            return x, lambda grad: grad
        channels = (1, x.shape[1], *[1] * (x.ndim - 2))
        shift = self._rng.normal(0, self._shift, channels).astype(x.dtype)
        factor = np.exp(self._rng.normal(0, self._scale, channels)).astype(x.dtype)
        return x * factor + shift, lambda grad: grad * factor

    def __call__(self, x: Array) -> Array:
        return x
