"""The modules of the Dropout family."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from bnext.torch import _autograd, _bridge, _library
from bnext.torch._bridge import Drop
from bnext.torch._eligible import compiling, is_eligible
from bnext.torch._tracing import as_leaf


class _Dropout(_DropoutNd):
    """The one difference to `torch.nn`'s classes."""

    _alpha = False
    _by_channel = False
    _rank: int | None = None  # of a batch, for channels; None: any

    @property
    def _in_place(self) -> bool:
        return self.inplace and not self._alpha  # which PyTorch's do not do in place either

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return as_leaf(self, input)
        if not (self.training and self.p > 0 and is_eligible(input)):
            return super().forward(input)
        if self._in_place and not _may_change(input):
            return super().forward(input)
        if self._by_channel:
            if self._rank in (3, 5) and input.dim() == self._rank - 1:  # a sample without batch
                y = self._drop(input[None])
                return input if self._in_place else y[0]
            if input.dim() < 2 or self._rank not in (None, input.dim()):
                return super().forward(input)
        elif not input.is_contiguous():
            return self._in_order_of_memory(input)
        return self._drop(input)

    def _in_order_of_memory(self, x: Tensor) -> Tensor:
        """With the axes ordered by their strides, so that those of the result are ordered alike."""
        order = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))
        if 0 in x.stride():  # an expanded tensor: the result is none
            order.sort()
        ordered = x.permute(order)
        if self._in_place:
            if not ordered.is_contiguous():
                return super().forward(x)
            self._drop(ordered)
            return x
        y = self._drop(ordered.contiguous())
        return y.permute([order.index(axis) for axis in range(x.dim())])

    def _drop(self, x: Tensor) -> Tensor:
        last = self._by_channel and _bridge.is_last(x)
        # Memory must lie as the mask does.
        if self._in_place and not (
            x.is_contiguous() or (last and x.movedim(1, -1).is_contiguous())
        ):
            return super().forward(x)
        drop = Drop(self.p, last, self._by_channel, self._alpha)
        seed = _bridge.draw_seed(x)
        if compiling():
            return _library.dropout(x, seed, *drop)
        number = _bridge.known_seed(seed)
        if self._in_place or (torch.is_grad_enabled() and x.requires_grad):
            return _autograd.Dropout.apply(x, number, drop, self._in_place)
        return _bridge.dropout_forward(x, number, drop)[0]


def _may_change(x: Tensor) -> bool:
    """Whether nothing forbids to change x: the core would, before autograd says no. Operators in
    graphs change no arguments.
    """
    return not compiling() and not (
        x.requires_grad and torch.is_grad_enabled() and (x.is_leaf or x._is_view())
    )


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
