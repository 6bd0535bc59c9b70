"""The modules of the Dropout family."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bnext.torch import _autograd, _bridge, _library
from bnext.torch._bridge import Drop
from bnext.torch._eligible import compiling, is_eligible


class _Dropout(_DropoutNd):
    """The one difference to `torch.nn`'s classes."""

    _ranks: tuple[int, ...] | None = None  # that the core's channel masks are for; None: any
    _by_channel = False
    _alpha = False

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.p > 0 and self._is_eligible(input)):
            return super().forward(input)
        drop = Drop(self.p, _bridge.is_last(input), self._by_channel, self._alpha)
        seed = _bridge.draw_seed()
        if compiling():
            return _library.dropout(input, seed, *drop)
        if self.inplace or (torch.is_grad_enabled() and input.requires_grad):
            return _autograd.Dropout.apply(input, int(seed), drop, self.inplace)
        return _bridge.dropout_forward(input, int(seed), drop)[0]

    def _is_eligible(self, x: Tensor) -> bool:
        if not is_eligible(x) or not (self._ranks is None or x.dim() in self._ranks):
            return False
        if self._by_channel and x.dim() < 2:
            return False
        # In place, memory must lie as the mask does; an operator in a graph changes no argument.
        return not self.inplace or (
            (x.is_contiguous() or _bridge.is_last(x)) and not torch.compiler.is_compiling()
        )


class Dropout(_Dropout, nn.Dropout):
    """`torch.nn.Dropout`, faster on CPU tensors.

    The mask follows from a seed that is drawn from PyTorch's default generator, so that
    `torch.manual_seed` governs it and `torch.utils.checkpoint` draws it again. It is another mask
    than PyTorch's for the same seed. None is stored. p=0 and evaluation return the input.

    Examples
    --------
    >>> import torch, bnext.torch
    >>> drop = bnext.torch.Dropout(0.5)
    >>> y = drop(torch.ones(1000))
    >>> sorted(set(y.tolist()))
    [0.0, 2.0]
    """


class Dropout1d(_Dropout, nn.Dropout1d):
    """`torch.nn.Dropout1d`, faster on CPU tensors: whole channels of (N, C, L)."""

    _ranks = (3,)
    _by_channel = True


class Dropout2d(_Dropout, nn.Dropout2d):
    """`torch.nn.Dropout2d`, faster on CPU tensors: whole channels of (N, C, H, W)."""

    _ranks = (4,)
    _by_channel = True


class Dropout3d(_Dropout, nn.Dropout3d):
    """`torch.nn.Dropout3d`, faster on CPU tensors: whole channels of (N, C, D, H, W)."""

    _ranks = (5,)
    _by_channel = True


class AlphaDropout(_Dropout, nn.AlphaDropout):
    """`torch.nn.AlphaDropout`, faster on CPU tensors."""

    _alpha = True


class FeatureAlphaDropout(_Dropout, nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout`, faster on CPU tensors: whole channels of (N, C, *)."""

    _by_channel = True
    _alpha = True
