"""Which calls the core serves. All others are PyTorch's own, by the class that ours inherits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bnext.torch import _bridge
from bnext.torch._autograd import transforms_active


def compiling() -> bool:
    """Whether torch.compile traces, which takes custom operators. Exported programs stay portable:
    they get PyTorch's operators.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _plain(x: Tensor) -> bool:
    """Whether x is a tensor where the core has a backend, and nothing more special."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and (x.is_cpu or (x.is_cuda and _bridge.gpu_available()))
        and x.layout is torch.strided
        and not x.is_nested
    )


def is_eligible(x: Tensor) -> bool:
    """Whether the core can work on x, here and now."""
    if not _plain(x):
        return False
    if torch.compiler.is_compiling():
        special = torch.compiler.is_exporting()
    else:
        special = (
            transforms_active()
            or torch._C._len_torch_dispatch_stack() > 0  # somebody wants to see PyTorch's ops
            or x.is_neg()
            or torch.jit.is_tracing()
            or forward_ad._current_level >= 0  # derivatives of outputs by one input
        )
    return not special and x.dtype in _bridge.DTYPES and x.numel() > 0


def are_parameters_for(x: Tensor, *values: Tensor | None) -> bool:
    """Whether `values` of each channel fit data x: of their dtype, or float32 for 16 bits."""
    dtype, device, shape = x.dtype, x.device, x.shape[1:2]
    wide = _bridge.parameter_dtype(dtype)
    for value in values:
        if value is not None and not (
            _plain(value)
            and value.device == device
            and (value.dtype is dtype or value.dtype is wide)
            and value.shape == shape
        ):
            return False
    return True


def is_like(value: Tensor, x: Tensor) -> bool:
    """Whether a residual fits x."""
    return (
        _plain(value)
        and value.device == x.device
        and value.dtype is x.dtype
        and value.shape == x.shape
    )
