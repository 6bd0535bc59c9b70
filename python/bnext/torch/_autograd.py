"""The operations as `torch.autograd.Function`, for tensors outside torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnext.torch import _bridge
from bnext.torch._bridge import Drop, Norm


def transforms_active() -> bool:
    """Whether vmap, grad or another transform of torch.func is at work: it needs PyTorch's ops."""
    return bool(torch._C._are_functorch_transforms_active())


def _is_batched(grad_y: Tensor) -> bool:
    """In backward: whether it runs for many gradients at once, by one of the two vmaps."""
    return transforms_active() or bool(torch._C._functorch.is_legacy_batchedtensor(grad_y))


def _hooks_on_saved_tensors() -> bool:
    """Whether what is saved for backward goes elsewhere: checkpoints, save_on_cpu and the like."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _graph_is_kept() -> bool:
    """In backward: whether it may run once more."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


class BatchNorm(torch.autograd.Function):
    """y of a normalization. If not by `mean` and `var`, those of the batch are `grad_fn.batch`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        seed: _bridge.Seed,
        norm: Norm,
    ) -> Tensor:
        ctx.norm, ctx.seed = norm, seed
        ctx.set_materialize_grads(False)
        y, core = _bridge.norm_forward(x, weight, bias, residual, mean, var, seed, norm)
        by_batch = ctx.by_batch = mean is None
        moments = _bridge.moments(core)
        if by_batch:
            ctx.batch = moments
        # What the core keeps would hold x back from the hooks, so it is made again from tensors.
        again = _hooks_on_saved_tensors()
        ctx.core = None if again else core
        # Beside the core's own, tensors are saved so that changes in place are noticed and for
        # derivatives of the gradient.
        ctx.has_residual = residual is not None
        ctx.residual_is_bits = ctx.has_residual and not (
            norm.keeps_residual(by_batch) or (again and _bridge.on_gpu(x))
        )
        ctx.save_for_backward(
            x,
            weight,
            bias if again or norm.activation is not None else None,
            None if ctx.residual_is_bits else residual,
            *(moments if again or not by_batch else (None, None)),
            _bridge.passes(core) if again else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * 8
        x, weight, bias, residual, mean, var, passes = ctx.saved_tensors
        core = ctx.core
        if core is None:
            core = _bridge.norm_saved(
                x, weight, bias, residual, mean, var, passes,
                ctx.seed, ctx.norm, ctx.by_batch, ctx.has_residual,
            )  # fmt: skip
        elif not _graph_is_kept():
            ctx.core = None  # as saved tensors go: the graph lives on as long as the loss does
        if torch.is_grad_enabled() or _is_batched(grad_y):
            grads = _composed_gradients(ctx, grad_y, core, x, weight, bias, residual, mean, var)
        else:
            grads = _bridge.norm_backward(grad_y, core, ctx.norm)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad if needed else None for grad, needed in wanted), None, None, None, None


def _composed_gradients(
    ctx: Any,
    grad_y: Tensor,
    core: _bridge.NormSaved,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias and residual, by operations of PyTorch that have derivatives.

    With n the normalized x, r = 1 / sqrt(var + eps) and h the gradient at weight n + bias:
    grad_x = weight r (h - mean(h) - n mean(h n)), or weight r h for given statistics.
    """
    norm: Norm = ctx.norm
    axes = [axis for axis in range(x.dim()) if axis != 1]

    def by_channel(value: Tensor) -> Tensor:
        return value.to(values.dtype).view(-1, *[1] * (x.dim() - 2))

    values = x.to(_bridge.parameter_dtype(x.dtype))
    if ctx.by_batch or mean is None or var is None:
        var, mean = torch.var_mean(values, axes, correction=0)
    r = by_channel((var + norm.eps).rsqrt())
    n = (values - by_channel(mean)) * r
    scale = r if weight is None else r * by_channel(weight)
    if ctx.residual_is_bits:  # its gradient is grad_y times something constant
        factor = _bridge.norm_backward(torch.ones_like(x), core, norm)[3]
    else:
        z = n if weight is None else n * by_channel(weight)
        z = z if bias is None else z + by_channel(bias)
        factor = _derivative(norm, z if residual is None else z + residual)
        if norm.dropout > 0:
            drop = Drop(norm.dropout, norm.last)
            factor = factor * _bridge.dropout_forward(torch.ones_like(values), ctx.seed, drop)[0]
    h = grad_y.to(values.dtype) * factor
    grad_x = h - h.mean(axes, keepdim=True) - n * (h * n).mean(axes, keepdim=True)
    return (
        (scale * (grad_x if ctx.by_batch else h)).to(x.dtype),
        None if weight is None else (h * n).sum(axes),
        h.sum(axes),
        h.to(x.dtype),
    )


def _derivative(norm: Norm, z: Tensor) -> Tensor:
    """Of the activation at z."""
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        y = _bridge.ACTIVATIONS[norm.activation](z, norm.negative_slope)
        return torch.autograd.grad(y.sum(), z, create_graph=True)[0]


class Dropout(torch.autograd.Function):
    """x with elements or channels dropped; in place, x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: _bridge.Seed, drop: Drop, in_place: bool) -> Tensor:
        y, ctx.core = _bridge.dropout_forward(x, seed, drop, in_place)
        ctx.last, ctx.shape = drop.last, x.shape
        if in_place:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        return _scaled(grad_y, ctx.core, ctx.shape, ctx.last), None, None, None


class _Scaled(torch.autograd.Function):
    """The gradient of `Dropout`, which is linear: its gradient is itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, core: _bridge.DropSaved, shape: torch.Size, last: bool
    ) -> Tensor:
        ctx.core, ctx.shape, ctx.last = core, shape, last
        return _bridge.dropout_backward(x, core, last)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        return _scaled(grad_y, ctx.core, ctx.shape, ctx.last), None, None, None


def _scaled(x: Tensor, core: _bridge.DropSaved, shape: torch.Size, last: bool) -> Tensor:
    if _is_batched(x):
        ones = torch.ones(shape, dtype=x.dtype, device=x.device)
        return x * _bridge.dropout_backward(ones, core, last)
    if torch.is_grad_enabled():
        y: Tensor = _Scaled.apply(x, core, shape, last)
        return y
    return _bridge.dropout_backward(x, core, last)
