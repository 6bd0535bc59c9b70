"""The operations as custom operators, `torch.ops.bnext`: what torch.compile puts into its graphs.

Tensors are all that they may keep for backward. So BatchNorm returns what the core found, and
backward puts together from it and from its arguments what the core would have kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from bnext.torch import _bridge
from bnext.torch._bridge import Drop, Norm


@custom_op("bnext::batch_norm", mutates_args=())
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    last: bool,
    activation: str | None,
    negative_slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean and biased variance of the batch in float64, and bits of elements, which are empty
    where backward needs none. See `bnext.torch._bridge.Norm`.
    """
    norm = Norm(eps, last, activation, negative_slope, dropout)
    number = _bridge.known_seed(seed)
    y, saved = _bridge.norm_forward(x, weight, bias, residual, None, None, number, norm)
    passes = _bridge.passes(saved)
    if passes is None:
        passes = torch.empty(0, dtype=torch.uint8, device=x.device)
    return y, *_bridge.moments(saved), passes


@custom_op("bnext::batch_norm_inference", mutates_args=())
def batch_norm_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    last: bool,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """y by given statistics."""
    norm = Norm(eps, last, activation, negative_slope)
    return _bridge.norm_inference(x, weight, bias, residual, mean, var, norm)


@custom_op("bnext::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    passes: Tensor | None,
    seed: Tensor | None,
    by_batch: bool,
    has_residual: bool,
    eps: float,
    last: bool,
    activation: str | None,
    negative_slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; empty for those that are not there."""
    norm = Norm(eps, last, activation, negative_slope, dropout)
    number = _bridge.known_seed(seed)
    saved = _bridge.norm_saved(
        x, weight, bias, residual, mean, var, passes, number, norm, by_batch, has_residual
    )
    grad_x, *grads = _bridge.norm_backward(grad_y, saved, norm)
    grad_weight, grad_bias, grad_residual = (
        x.new_empty(0) if grad is None else grad.to(like.dtype)
        for grad, like in zip(grads, (weight, bias, x), strict=True)
    )
    return grad_x, grad_weight, grad_bias, grad_residual


@batch_norm.register_fake
def _(x, weight, bias, residual, seed, eps, last, activation, *options):  # type: ignore[no-untyped-def]
    mean = x.new_empty(x.shape[1], dtype=torch.float64)
    bits = residual is not None and activation in _bridge.GATED and not _bridge.on_gpu(x)
    passes = x.new_empty(_bridge.passes_bytes(x) if bits else 0, dtype=torch.uint8)
    return _bridge.empty(x, last), mean, torch.empty_like(mean), passes


@batch_norm_inference.register_fake
def _(x, weight, bias, residual, mean, var, eps, last, *options):  # type: ignore[no-untyped-def]
    return _bridge.empty(x, last)


@batch_norm_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_y, x, weight, bias, residual, mean, var, passes, seed, by_batch, has_residual, *norm
):
    last = Norm(*norm).last
    weights = (
        x.new_empty(0) if value is None else torch.empty_like(value) for value in (weight, bias)
    )
    grad_residual = _bridge.empty(x, last) if has_residual else x.new_empty(0)
    return _bridge.empty(x, last), *weights, grad_residual


def _setup_batch_norm(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, residual, seed, *options = inputs
    _, mean, var, passes = output
    _save(ctx, (x, weight, bias, residual, mean, var, passes, seed), True, Norm(*options))
    ctx.set_materialize_grads(False)


def _setup_batch_norm_inference(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, eps, last, activation, negative_slope = inputs
    norm = Norm(eps, last, activation, negative_slope)
    _save(ctx, (*tensors, None, None), False, norm)


def _save(ctx: Any, tensors: tuple[Any, ...], by_batch: bool, norm: Norm) -> None:
    """For the arguments of `batch_norm_backward` after the first."""
    x, weight, bias, residual, *others = tensors
    ctx.norm, ctx.by_batch, ctx.has_residual = norm, by_batch, residual is not None
    if not (norm.keeps_residual(by_batch) or _bridge.on_gpu(x)):
        residual = None
    ctx.save_for_backward(x, weight, bias, residual, *others)


def _gradients(ctx, grad_y):  # type: ignore[no-untyped-def]
    _, weight, bias, *_ = ctx.saved_tensors
    # The gradient of a residual that is only added: an operator must not return what it was given.
    through = ctx.has_residual and ctx.norm.activation is None and ctx.norm.dropout == 0
    has_residual = ctx.has_residual and not through
    grad_x, grad_weight, grad_bias, grad_residual = batch_norm_backward(
        grad_y, *ctx.saved_tensors, ctx.by_batch, has_residual, *ctx.norm
    )
    return (
        grad_x,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        grad_y if through else grad_residual if has_residual else None,
    )


def _batch_norm_gradients(ctx, grad_y, *_):  # type: ignore[no-untyped-def]
    if grad_y is None:
        return (None,) * 10
    return *_gradients(ctx, grad_y), *[None] * 6  # type: ignore[no-untyped-call]


def _batch_norm_inference_gradients(ctx, grad_y):  # type: ignore[no-untyped-def]
    return *_gradients(ctx, grad_y), *[None] * 6  # type: ignore[no-untyped-call]


batch_norm.register_autograd(_batch_norm_gradients, setup_context=_setup_batch_norm)
batch_norm_inference.register_autograd(
    _batch_norm_inference_gradients, setup_context=_setup_batch_norm_inference
)


@custom_op("bnext::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float, last: bool, by_channel: bool, alpha: bool) -> Tensor:
    """x with elements or channels dropped. See `bnext.torch._bridge.Drop`."""
    return _bridge.dropout_forward(x, _bridge.known_seed(seed), Drop(p, last, by_channel, alpha))[0]


@custom_op("bnext::dropout_backward", mutates_args=())
def dropout_backward(
    grad_y: Tensor, seed: Tensor, p: float, last: bool, by_channel: bool, alpha: bool
) -> Tensor:
    """grad_y times the factors that `dropout` used."""
    drop = Drop(p, last, by_channel, alpha)
    # For its `saved`. Without alpha, y is what is sought already.
    y, saved = _bridge.dropout_forward(grad_y, _bridge.known_seed(seed), drop)
    return _bridge.dropout_backward(grad_y, saved, last) if alpha else y


@dropout.register_fake
@dropout_backward.register_fake
def _(x, seed, p, last, by_channel, alpha):  # type: ignore[no-untyped-def]
    return _bridge.empty(x, last)


def _setup_dropout(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, seed, *ctx.options = inputs
    ctx.save_for_backward(seed)


def _dropout_gradients(ctx, grad_y):  # type: ignore[no-untyped-def]
    return dropout_backward(grad_y, *ctx.saved_tensors, *ctx.options), *[None] * 5


# The gradient is linear in grad_y with the same factors, and so is its own.
dropout.register_autograd(_dropout_gradients, setup_context=_setup_dropout)
dropout_backward.register_autograd(_dropout_gradients, setup_context=_setup_dropout)
