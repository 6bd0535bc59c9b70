"""BatchNorm1d/2d/3d, and the same with residual, activation and dropout in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from bnext.nn import _check
from bnext.nn.module import number
from bnext.torch import _autograd, _bridge, _eligible, _library
from bnext.torch._bridge import Norm
from bnext.torch._eligible import are_parameters_for, compiling, is_like
from bnext.torch._tracing import as_leaf


def normalize(
    layer: TorchBatchNorm,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    dropout: float = 0.0,
) -> Tensor:
    """``dropout(activation(layer(x) + residual))``, in one pass where the core can.

    `layer` gives parameters, buffers and mode. Dropout is for training only.
    """
    dropout = dropout if layer.training else 0.0
    if not is_eligible(layer, x, residual):
        return composed(layer, x, residual, activation, negative_slope, dropout)
    layer._check_input_dim(x)
    norm = Norm(layer.eps, _bridge.is_channels_last(x), activation, negative_slope, dropout)
    if layer.training or layer.running_mean is None:
        count = x.numel() // x.shape[1]
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}"
            )
        y, mean, var = _by_batch(layer, x, residual, norm)
        if layer.training and layer.track_running_stats:
            update_running_stats(layer, mean, var, count)
        return y
    return _by_running_stats(layer, x, residual, norm)


def is_eligible(layer: TorchBatchNorm, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the core can do what `layer` does to x."""
    if not (_eligible.is_eligible(x) and 0 < layer.eps < math.inf):
        return False
    mean, var = layer.running_mean, layer.running_var
    return (
        x.dim() > 1
        and x.shape[1] == layer.num_features
        and (mean is None) == (var is None)
        and are_parameters_for(x, layer.weight, layer.bias, mean, var)
        and (residual is None or is_like(residual, x))
    )


def composed(
    layer: TorchBatchNorm,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    dropout: float,
) -> Tensor:
    """What `normalize` is, by operations of PyTorch."""
    if isinstance(x, fx.Proxy):
        return as_leaf(layer, *((x,) if residual is None else (x, residual)))
    y = TorchBatchNorm.forward(layer, x)
    if residual is not None:
        y = y + residual
    y = _bridge.ACTIVATIONS[activation](y, negative_slope)
    return F.dropout(y, dropout) if dropout > 0 else y


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _by_batch(
    layer: TorchBatchNorm, x: Tensor, residual: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x, layer.weight, layer.bias, residual)
    seed = _bridge.draw_seed(x) if norm.dropout > 0 else None
    if compiling():
        y, mean, var, _ = _library.batch_norm(*tensors, seed, *norm)
        return y, mean.detach(), var.detach()
    number = _bridge.known_seed(seed)
    if _needs_grad(*tensors):
        y = _autograd.BatchNorm.apply(*tensors, None, None, number, norm)
        return y, *y.grad_fn.batch
    y, saved = _bridge.norm_forward(*tensors, None, None, number, norm)
    return y, *_bridge.moments(saved)


def _by_running_stats(
    layer: TorchBatchNorm, x: Tensor, residual: Tensor | None, norm: Norm
) -> Tensor:
    tensors = (x, layer.weight, layer.bias, residual)
    statistics = (layer.running_mean, layer.running_var)
    if compiling():
        return _library.batch_norm_inference(*tensors, *statistics, *norm[:-1])
    if _needs_grad(*tensors):
        return _autograd.BatchNorm.apply(*tensors, *statistics, None, norm)
    return _bridge.norm_inference(*tensors, *statistics, norm)


def update_running_stats(layer: TorchBatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the buffers of `layer` by a batch of `count` values per channel; `var` is biased."""
    momentum = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None and layer.running_mean is not None:  # the average of all batches
            wide = _bridge.parameter_dtype(layer.running_mean.dtype)
            momentum = layer.num_batches_tracked.to(wide).reciprocal()
    if layer.running_mean is None or momentum is None:
        return
    for running, batch in (
        (layer.running_mean, mean),
        (layer.running_var, var * (count / (count - 1))),
    ):
        wide = _bridge.parameter_dtype(running.dtype)
        if running.dtype is wide:
            running.lerp_(batch.to(wide), momentum)
        else:  # of 16 bits
            running.copy_(torch.lerp(running.to(wide), batch.to(wide), momentum))


class _BatchNorm(TorchBatchNorm):
    """The one difference to `torch.nn`'s classes."""

    def forward(self, input: Tensor) -> Tensor:
        return normalize(self, input)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, faster on CPU tensors; see ``docs/torch.md``."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, faster on CPU tensors.

    Parameters, buffers, keys of ``state_dict()`` and results up to rounding are those of
    `torch.nn.BatchNorm2d`, which also runs where the core cannot: on other devices and dtypes, and
    under `torch.func` and `torch.export`.

    Raises
    ------
    ValueError
        In training, if a channel has one value only; running statistics stay as they are.

    Notes
    -----
    As PyTorch's, and unlike `bnext.nn.BatchNorm`, the running statistics take in what is not
    finite.

    Examples
    --------
    >>> import torch, bnext.torch
    >>> norm = bnext.torch.BatchNorm2d(3)
    >>> y = norm(torch.randn(8, 3, 4, 4) + 7)
    >>> bool(y.mean().abs() < 1e-5)
    True
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, faster on CPU tensors; see ``docs/torch.md``."""


class BatchNormAct(TorchBatchNorm):
    def __init__(
        self,
        *args: Any,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        kind = type(self).__name__
        if activation not in tuple(_bridge.ACTIVATIONS):
            raise ValueError(
                f"{kind}: activation: expected one of {tuple(_bridge.ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        if not 0 <= number(kind, "dropout", dropout) <= 1:
            raise ValueError(f"{kind}: dropout: expected a number in [0, 1], got {dropout}")
        _check.finite(kind, "negative_slope", negative_slope)
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.negative_slope = negative_slope
        self.dropout = dropout

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalize(
            self,
            input,
            residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            dropout=self.dropout,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, dropout={self.dropout}"


class BatchNormAct1d(BatchNormAct, nn.BatchNorm1d):
    """`BatchNormAct2d` for (N, C) and (N, C, L)."""


class BatchNormAct2d(BatchNormAct, nn.BatchNorm2d):
    """BatchNorm, sum with a residual, activation and dropout, in one pass over memory.

    ``y = dropout(activation(BatchNorm2d(x) + residual))``

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.BatchNorm2d`; so are the keys of ``state_dict()``.
    activation : str or None, default "relu"
        One of `bnext.functional.activations`. "gelu" is ``GELU(approximate="tanh")``.
    negative_slope : float, default 0.01
        Of "leaky_relu".
    dropout : float, default 0
        In training, probability of a zero.

    Shape: x and residual (N, C, H, W); so is y.

    Raises
    ------
    ValueError
        For other activations, or `dropout` outside [0, 1].

    Examples
    --------
    >>> import torch, bnext.torch
    >>> norm = bnext.torch.BatchNormAct2d(3, activation="relu")
    >>> x, shortcut = torch.randn(2, 8, 3, 4, 4)
    >>> y = norm(x, shortcut)
    >>> bool(y.min() == 0)
    True
    """


class BatchNormAct3d(BatchNormAct, nn.BatchNorm3d):
    """`BatchNormAct2d` for (N, C, D, H, W)."""
