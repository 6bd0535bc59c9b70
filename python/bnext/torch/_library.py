"""The operations as custom operators, `torch.ops.bnext`: what torch.compile puts into its graphs.

Tensors are all that they may keep for backward, and the core cannot take up what it saved from
tensors: backward runs forward once more. So inside a compiled graph training costs about half as
much again as outside.
"""

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
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and biased variance of the batch. See `bnext.torch._bridge.Norm`."""
    norm = Norm(eps, last, activation, negative_slope, dropout)
    number = _bridge.known_seed(seed)
    y, saved = _bridge.norm_forward(x, weight, bias, residual, None, None, number, norm)
    return y, *_bridge.moments(saved, x.dtype)


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
    mean: Tensor | None,
    var: Tensor | None,
    seed: Tensor | None,
    eps: float,
    last: bool,
    activation: str | None,
    negative_slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; empty for those that are not there."""
    norm = Norm(eps, last, activation, negative_slope, dropout)
    number = _bridge.known_seed(seed)
    saved = _bridge.norm_forward(x, weight, bias, residual, mean, var, number, norm)[1]
    grad_x, *grads = _bridge.norm_backward(grad_y, saved, norm)
    grad_weight, grad_bias, grad_residual = (
        x.new_empty(0) if grad is None or value is None else grad.to(value.dtype)
        for grad, value in zip(grads, (weight, bias, residual), strict=True)
    )
    if grad_residual is grad_y:  # what an operator returns must not be what it was given
        grad_residual = _bridge.empty(x, last).copy_(grad_y)
    return grad_x, grad_weight, grad_bias, grad_residual


@batch_norm.register_fake
def _(x, weight, bias, residual, seed, eps, last, *options):  # type: ignore[no-untyped-def]
    mean = x.new_empty(x.shape[1], dtype=_bridge.parameter_dtype(x.dtype))
    return _bridge.empty(x, last), mean, torch.empty_like(mean)


@batch_norm_inference.register_fake
def _(x, weight, bias, residual, mean, var, eps, last, *options):  # type: ignore[no-untyped-def]
    return _bridge.empty(x, last)


@batch_norm_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_y, x, weight, bias, residual, mean, var, seed, eps, last, *options
):
    weights = (
        x.new_empty(0) if value is None else torch.empty_like(value) for value in (weight, bias)
    )
    grad_residual = x.new_empty(0) if residual is None else _bridge.empty(x, last)
    return _bridge.empty(x, last), *weights, grad_residual


def _setup_batch_norm(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, residual, seed, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, residual, None, None, seed)
    ctx.set_materialize_grads(False)


def _setup_batch_norm_inference(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, residual, mean, var, *options = inputs
    ctx.options = [*options, 0.0]
    ctx.save_for_backward(x, weight, bias, residual, mean, var, None)


def _gradients(ctx, grad_y):  # type: ignore[no-untyped-def]
    grads = batch_norm_backward(grad_y, *ctx.saved_tensors, *ctx.options)
    given = ctx.saved_tensors[:4]
    return [grad if value is not None else None for grad, value in zip(grads, given, strict=True)]


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
