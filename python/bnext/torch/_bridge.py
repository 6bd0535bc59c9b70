"""Tensors as arrays and back without copies, and the operations of the core on tensors.

Results lie in the core's buffers, which are used again: memory that PyTorch allocates is new for
every result, and its page faults cost several times what BatchNorm costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bnext import _core, _device

Array = npt.NDArray[Any]

try:
    import ml_dtypes
except ImportError:  # then bfloat16 stays with PyTorch
    _bfloat16 = None
else:
    _bfloat16 = np.dtype(ml_dtypes.bfloat16)

NormSaved = _core.BatchNormSaved | _device.DeviceBatchNormSaved
DropSaved = _core.DropoutSaved | _device.DeviceDropoutSaved

# Those the core takes.
DTYPES = {torch.float32, torch.float64, torch.float16} | ({torch.bfloat16} if _bfloat16 else set())

ACTIVATIONS = {
    None: lambda x, negative_slope: x,
    "relu": lambda x, negative_slope: torch.relu(x),
    "leaky_relu": torch.nn.functional.leaky_relu,
    "relu6": lambda x, negative_slope: torch.nn.functional.relu6(x),
    "hardswish": lambda x, negative_slope: torch.nn.functional.hardswish(x),
    "silu": lambda x, negative_slope: torch.nn.functional.silu(x),
    "gelu": lambda x, negative_slope: torch.nn.functional.gelu(x, approximate="tanh"),
}
"""What PyTorch calls the activations of the core: functions of (x, negative_slope)."""

# Activations whose gradient needs one bit of an element only.
GATED = {"relu", "leaky_relu", "relu6"}


# Of a mask: a number, or a number in the memory of a GPU.
Seed: TypeAlias = int | Tensor | None


class Norm(NamedTuple):
    """What of a normalization is no tensor. `last`: channels lie last in memory."""

    eps: float
    last: bool
    activation: str | None = None
    negative_slope: float = 0.01
    dropout: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        return {
            "channel_axis": -1 if self.last else 1,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }

    def keeps_residual(self, by_batch: bool) -> bool:
        """Whether backward needs a residual itself, not only bits of its elements."""
        return self.activation is not None and not (by_batch and self.activation in GATED)


class Drop(NamedTuple):
    """What of a dropout is no tensor. `by_channel`: one bit for each channel of each sample."""

    p: float
    last: bool
    by_channel: bool = False
    alpha: bool = False


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of weight, bias and statistics in the core where the data are of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


# -- layouts ---------------------------------------------------------------------------------------
def _to_last(x: Tensor) -> Tensor:
    """(N, C, *) as (N, *, C), a view."""
    return x.permute(0, *range(2, x.dim()), 1)


def _to_first(x: Tensor) -> Tensor:
    """(N, *, C) as (N, C, *), a view."""
    return x.permute(0, x.dim() - 1, *range(1, x.dim() - 1))


def is_last(x: Tensor) -> bool:
    """Whether the channels of (N, C, *) lie closest to each other: as in the format channels_last,
    for any rank and any gaps.
    """
    if x.dim() < 3 or x.shape[1] == 1 or x.is_contiguous():
        return False
    others = (axis for axis in range(x.dim()) if axis != 1 and x.shape[axis] != 1)
    return all(x.stride(1) < x.stride(axis) for axis in others)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch gives what BatchNorm makes of x the format channels_last, or else the
    contiguous one (`suggest_memory_format` in its c10/core/TensorImpl.h).
    """
    if x.dim() not in _CHANNELS_LAST or x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]):
        return True
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(axis) < least or (axis == 0 and least == x.stride(1)):
            return False
        least = x.stride(axis) * max(x.shape[axis], 1)
    return x.stride(1) > 0


def empty(x: Tensor, last: bool) -> Tensor:
    """What `to_tensor` returns for a result like x, in shape, dtype and strides."""
    if not last:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    like = _to_last(x)
    return _to_first(torch.empty_like(like, memory_format=torch.contiguous_format)).detach()


def to_array(x: Tensor, last: bool = False) -> Array:
    """A C-contiguous array, (N, *, C) if `last`; copied only if the tensor does not lie so."""
    x = x.detach()
    if last:
        x = _to_last(x)
    if not x.is_contiguous():
        x = x.contiguous()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(_bfloat16)
    return x.numpy()


def to_tensor(array: Array, last: bool = False) -> Tensor:
    """The tensor that `to_array` made an array of; it shares the memory."""
    if array.dtype == _bfloat16:
        x = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        x = torch.from_numpy(array)
    # As a view it could not be changed in place after an autograd.Function returned it.
    return _to_first(x).detach() if last else x


def _statistic(value: Tensor, dtype: torch.dtype) -> Array:
    """`value` of each channel, for data of `dtype`."""
    wanted = parameter_dtype(dtype)
    return to_array(value if value.dtype is wanted else value.detach().to(wanted))


def _parameter(value: Tensor | None, dtype: torch.dtype) -> Array | None:
    return None if value is None else _statistic(value, dtype)


def _optional(x: Tensor | None, last: bool) -> Array | None:
    return None if x is None else to_array(x, last)


# -- surroundings ----------------------------------------------------------------------------------
def follow_threads() -> None:
    """Use as many threads as PyTorch does now."""
    threads = torch.get_num_threads()
    if _core.get_num_threads() != threads:
        _core.set_num_threads(threads)


def draw_seed(x: Tensor) -> Tensor:
    """Of a mask, from PyTorch's default generator for x's device: it moves as for any random op."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)


def known_seed(seed: Tensor | None) -> Seed:
    """As operations take it. One on a GPU stays there: nothing waits for it, and a captured graph,
    in which PyTorch draws a new one each time, gets a new mask each time.
    """
    return seed if seed is None or on_gpu(seed) else int(seed)


def on_gpu(x: Tensor) -> bool:
    """Whether it is for the CUDA backend."""
    return bool(x.is_cuda)


def gpu_available() -> bool:
    return not _core.cuda_unavailable_reason()


# torch.compiler.assume_constant_result, without the seconds that importing the compiler takes.
gpu_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _laid_out(x: Tensor | None, last: bool) -> Tensor | None:
    """As `to_array`, on a GPU."""
    return None if x is None else (_to_last(x) if last else x).detach().contiguous()


def _gpu_parameter(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.detach().to(parameter_dtype(dtype))


def _gpu_draw(seed: Seed) -> _device.Draw | None:
    if seed is None or isinstance(seed, int):
        return None if seed is None else _device.Draw(seed, 0)
    # The core knows no integers; it takes the bits.
    view = _device.view_of_tensor(seed.view(torch.float64))
    return _device.Draw(0, 0, view)


def _from_gpu(y: Tensor, last: bool) -> Tensor:
    return _to_first(y).detach() if last else y


# -- operations ------------------------------------------------------------------------------------
def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    seed: Seed,
    norm: Norm,
) -> tuple[Tensor, NormSaved]:
    """By the statistics of x, or by `mean` and `var`; and what backward needs."""
    if on_gpu(x):
        return _gpu_norm_forward(x, weight, bias, residual, mean, var, seed, norm)
    follow_threads()
    assert not isinstance(seed, Tensor)
    affine = [_parameter(value, x.dtype) for value in (weight, bias)]
    options = {"eps": norm.eps, "residual": _optional(residual, norm.last), **norm.options}
    array = to_array(x, norm.last)
    if mean is None or var is None:
        y, saved = _core.batch_norm_forward(
            array,
            *affine,
            dropout=norm.dropout,
            generator=None if seed is None else _core.Generator(seed),
            **options,
        )
    else:
        y, saved = _core.batch_norm_inference_forward(
            array, _statistic(mean, x.dtype), _statistic(var, x.dtype), *affine, **options
        )
    return to_tensor(y, norm.last), saved


def _gpu_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    seed: Seed,
    norm: Norm,
) -> tuple[Tensor, NormSaved]:
    data, added = _laid_out(x, norm.last), _laid_out(residual, norm.last)
    m, v, w, b = (_gpu_parameter(value, x.dtype) for value in (mean, var, weight, bias))
    axis, activation, slope = norm.options.values()
    if m is None:
        y, saved = _device.batch_norm_forward(
            data, w, b, norm.eps, axis, added, activation, slope, norm.dropout,
            _gpu_draw(seed), None,
        )  # fmt: skip
    else:
        y, saved = _device.batch_norm_inference_forward(
            data, m, v, w, b, norm.eps, axis, added, activation, slope, None
        )
    return _from_gpu(y, norm.last), saved


def norm_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    norm: Norm,
) -> Tensor:
    """By the statistics `mean` and `var`, with nothing kept."""
    if on_gpu(x):
        m, v, w, b = (_gpu_parameter(value, x.dtype) for value in (mean, var, weight, bias))
        axis, activation, slope = norm.options.values()
        added = _laid_out(residual, norm.last)
        z = _device.batch_norm_inference(
            _laid_out(x, norm.last), m, v, w, b, norm.eps, axis, added, activation, slope, None
        )
        return _from_gpu(z, norm.last)
    follow_threads()
    y = _core.batch_norm_inference(
        to_array(x, norm.last),
        _statistic(mean, x.dtype),
        _statistic(var, x.dtype),
        _parameter(weight, x.dtype),
        _parameter(bias, x.dtype),
        eps=norm.eps,
        residual=_optional(residual, norm.last),
        **norm.options,
    )
    return to_tensor(y, norm.last)


def norm_backward(
    grad_y: Tensor, saved: NormSaved, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and residual, None for those that were not there.

    That of the residual may be `grad_y` itself.
    """
    if isinstance(saved, _device.DeviceBatchNormSaved):
        there = _laid_out(grad_y, norm.last)
        found = _device.batch_norm_backward(there, saved, None)
        passed_on = found.residual is there
        return (
            _from_gpu(found.x, norm.last),
            found.weight,
            found.bias,
            grad_y if passed_on else _optional_from_gpu(found.residual, norm.last),
        )
    follow_threads()
    g = to_array(grad_y, norm.last)
    grads = _core.batch_norm_backward(g, saved)
    residual = None
    if grads.residual is g:
        residual = grad_y
    elif grads.residual is not None:
        residual = to_tensor(grads.residual, norm.last)
    return (
        to_tensor(grads.x, norm.last),
        None if grads.weight is None else to_tensor(grads.weight),
        None if grads.bias is None else to_tensor(grads.bias),
        residual,
    )


def _optional_from_gpu(y: Tensor | None, last: bool) -> Tensor | None:
    return None if y is None else _from_gpu(y, last)


def moments(saved: NormSaved) -> tuple[Tensor, Tensor]:
    """Mean and biased variance that were used, in float64."""
    mean, var = saved.moments
    if isinstance(saved, _device.DeviceBatchNormSaved):
        return mean, var
    return torch.from_numpy(mean), torch.from_numpy(var)


def passes(saved: NormSaved) -> Tensor | None:
    """A bit for each element, if the activation's gradient needs no more of the residual."""
    if isinstance(saved, _device.DeviceBatchNormSaved) or saved.passes is None:
        return None
    return torch.from_numpy(saved.passes)


def passes_bytes(x: Tensor) -> int:
    """The size of `passes`, of x that may have no data, nor an extent that is known."""
    return _core.passes_bytes(0) + x.numel() // 8


def norm_saved(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    passes: Tensor | None,
    seed: Seed,
    norm: Norm,
    by_batch: bool,
    has_residual: bool,
) -> NormSaved:
    """What forward kept, from what `moments` and `passes` found in it, and from its arguments; of
    them, `residual` may be missing where `Norm.keeps_residual` says so, but on a GPU.
    """
    if on_gpu(x):  # which does forward again
        m, v = (None, None) if by_batch else (mean, var)
        return _gpu_norm_forward(x, weight, bias, residual, m, v, seed, norm)[1]
    assert not isinstance(seed, Tensor)
    return _core.BatchNormSaved(
        to_array(x, norm.last),
        to_array(mean.double()),
        to_array(var.double()),
        passes.numpy() if passes is not None and passes.numel() else None,
        _parameter(weight, x.dtype),
        _parameter(bias, x.dtype),
        eps=norm.eps,
        has_residual=has_residual,
        residual=_optional(residual, norm.last),
        dropout=norm.dropout,
        generator=_core.Generator(0 if seed is None else seed),
        batch_statistics=by_batch,
        **norm.options,
    )


def _mask_shape(array: Array | Tensor, drop: Drop) -> tuple[int, ...] | None:
    if not drop.by_channel:
        return None
    shape = [1] * array.ndim
    for axis in (0, -1 if drop.last else 1):
        shape[axis] = array.shape[axis]
    return tuple(shape)


def dropout_forward(
    x: Tensor, seed: Seed, drop: Drop, in_place: bool = False
) -> tuple[Tensor, DropSaved]:
    """As `drop` says; `in_place` needs an x that lies as `drop.last` says, and returns it."""
    if on_gpu(x):
        there = _laid_out(x, drop.last)
        assert there is not None
        run = _device.alpha_dropout_forward if drop.alpha else _device.dropout_forward
        out = there if in_place else None
        z, kept = run(there, drop.p, _mask_shape(there, drop), _gpu_draw(seed), out)
        return x if in_place else _from_gpu(z, drop.last), kept
    follow_threads()
    assert isinstance(seed, int)
    array = to_array(x, drop.last)
    operation = _core.alpha_dropout_forward if drop.alpha else _core.dropout_forward
    y, saved = operation(
        array,
        drop.p,
        mask_shape=_mask_shape(array, drop),
        generator=_core.Generator(seed),
        out=array if in_place else None,
    )
    return x if in_place else to_tensor(y, drop.last), saved


def dropout_backward(grad_y: Tensor, saved: DropSaved, last: bool) -> Tensor:
    """grad_y times the factors that forward used."""
    if isinstance(saved, _device.DeviceDropoutSaved):
        return _from_gpu(_device.dropout_backward(_laid_out(grad_y, last), saved, None), last)
    follow_threads()
    return to_tensor(_core.dropout_backward(to_array(grad_y, last), saved), last)
