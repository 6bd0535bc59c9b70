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

    _alpha = False
    _by_channel = False
    _rank: int | None = None  # of a batch, for channels; None: any

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.p > 0 and is_eligible(input)):
            return super().forward(input)
        if self._by_channel:
            if self._rank in (3, 5) and input.dim() == self._rank - 1:  # a sample without batch
                y = self.forward(input[None])
                return input if self.inplace else y[0]
            if input.dim() < 2 or self._rank not in (None, input.dim()):
                return super().forward(input)
        elif not input.is_contiguous():
            return self._in_order_of_memory(input)
        last = self._by_channel and _bridge.is_last(input)
        # Memory must lie as the mask does; and operators in graphs change no arguments.
        dense = input.is_contiguous() or (last and input.movedim(1, -1).is_contiguous())
        if self.inplace and (compiling() or not dense):
            return super().forward(input)
        drop = Drop(self.p, last, self._by_channel, self._alpha)
        seed = _bridge.draw_seed(input)
        if compiling():
            return _library.dropout(input, seed, *drop)
        number = _bridge.known_seed(seed)
        if self.inplace or (torch.is_grad_enabled() and input.requires_grad):
            return _autograd.Dropout.apply(input, number, drop, self.inplace)
        return _bridge.dropout_forward(input, number, drop)[0]

    def _in_order_of_memory(self, x: Tensor) -> Tensor:
        """With the axes ordered by their strides, so that those of the result are ordered alike."""
        order = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))
        ordered = x.permute(order)
        if not ordered.is_contiguous():
            if self.inplace:
                return super().forward(x)
            ordered = ordered.contiguous()
        y = self.forward(ordered)
        return x if self.inplace else y.permute([order.index(axis) for axis in range(x.dim())])


class Dropout(_Dropout, nn.Dropout):
    """`torch.nn.Dropout`, faster on CPU tensors.

    The mask follows from a seed that is drawn from PyTorch's default generator, so that
    `torch.manual_seed` governs it and `torch.utils.checkpoint` draws it again. It is another mask
    than PyTorch's for the same seed, lies in the order of memory, and is not stored. Evaluation and
    p=0 return the input.

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

    _rank = 3
    _by_channel = True


class Dropout2d(_Dropout, nn.Dropout2d):
    """`torch.nn.Dropout2d`, faster on CPU tensors: whole channels of (N, C, H, W)."""

    _rank = 4
    _by_channel = True


class Dropout3d(_Dropout, nn.Dropout3d):
    """`torch.nn.Dropout3d`, faster on CPU tensors: whole channels of (N, C, D, H, W)."""

    _rank = 5
    _by_channel = True


class AlphaDropout(_Dropout, nn.AlphaDropout):
    """`torch.nn.AlphaDropout`, faster on CPU tensors."""

    _alpha = True


class FeatureAlphaDropout(_Dropout, nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout`, faster on CPU tensors: whole channels of (N, C, *)."""

    _by_channel = True
    _alpha = True
