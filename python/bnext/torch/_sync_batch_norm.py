"""SyncBatchNorm on CPU tensors, which PyTorch's refuses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from bnext import _core
from bnext.torch import _bridge
from bnext.torch._batch_norm import BatchNormAct, is_eligible, normalize, update_running_stats
from bnext.torch._bridge import Norm
from bnext.torch._tracing import as_leaf


class SyncBatchNorm(TorchBatchNorm):
    """`torch.nn.SyncBatchNorm` for CPU tensors too, over a backend of torch.distributed like gloo.

    In training, mean and variance are those of the batches of all processes together, and so are
    the gradients through them: n processes with m samples each do what one does with n m samples.
    Batches may differ in size, and some may be empty. Evaluation, and training without other
    processes, are those of `BatchNorm2d`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias
        As for `torch.nn.SyncBatchNorm`.

    Shape: (N, C, *), kept.

    Raises
    ------
    ValueError
        In training, if a channel has one value only in all processes together.
    RuntimeError
        For derivatives of the gradient.

    Notes
    -----
    Forward gathers count, mean and variance of each process, in float64, and merges them in the
    order of ranks (Chan et al., "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979), so that all processes hold the same bits. Backward adds up two sums.

    It is no subclass of `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on CPU.

    Examples
    --------
    >>> import torch, bnext.torch
    >>> norm = bnext.torch.SyncBatchNorm(3)  # without processes, as BatchNorm
    >>> norm(torch.randn(8, 3, 4, 4)).shape
    torch.Size([8, 3, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return as_leaf(self, input)
        if not input.is_cpu:
            return nn.SyncBatchNorm.forward(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = self.process_group
        if self.training and dist.is_available() and dist.is_initialized():
            if dist.get_world_size(group) > 1:
                return _synchronized(self, input, group)
        return normalize(self, input)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Make all BatchNorms of a model synchronized ones, as `torch.nn.SyncBatchNorm` does.

        Raises
        ------
        TypeError
            If the model has a `BatchNormAct2d`, whose activation would be lost, or one like it.

        Examples
        --------
        >>> import torch, bnext.torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU())
        >>> type(bnext.torch.SyncBatchNorm.convert_sync_batchnorm(model)[0]).__name__
        'SyncBatchNorm'
        """
        for name, each in module.named_modules():
            if isinstance(each, BatchNormAct):
                raise TypeError(
                    f"SyncBatchNorm.convert_sync_batchnorm: module: {name or 'it'} is a "
                    f"{type(each).__name__}, of which there is no synchronized one"
                )
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for each in module.modules():
            if type(each) is nn.SyncBatchNorm:
                each.__class__ = cls
        return module


@torch.compiler.disable
def _synchronized(layer: SyncBatchNorm, x: Tensor, group: Any) -> Tensor:
    if x.numel() and not is_eligible(layer, x, None):
        raise TypeError(
            f"SyncBatchNorm: input: expected {layer.num_features} channels of float32, float64, "
            "or 16 bits with parameters of these or float32, eps > 0, and neither torch.func nor "
            f"forward-mode derivatives; got shape {tuple(x.shape)}, {x.dtype}, eps={layer.eps}"
        )
    y, mean, var, count = _Synchronized.apply(x, layer.weight, layer.bias, layer.eps, group)
    if layer.track_running_stats and count > 0:
        update_running_stats(layer, mean, var, count)
    return y


def _moments(x: Tensor, last: bool) -> Tensor:
    """Count, means and biased variances of a batch, (1 + 2 C,) in float64."""
    channels = x.shape[1]
    count = x.numel() // channels
    if count > 1:
        _bridge.follow_threads()
        axis = -1 if last else 1
        _, saved = _core.batch_norm_forward(_bridge.to_array(x, last), channel_axis=axis)
        mean, var = map(torch.from_numpy, saved.moments)
    else:
        mean = x.detach().double().sum([axis for axis in range(x.dim()) if axis != 1])
        var = torch.zeros_like(mean)
    return torch.cat([torch.tensor([count], dtype=torch.float64), mean, var])


def _merge(all_moments: list[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and count of the batches together."""
    channels = (all_moments[0].numel() - 1) // 2
    count, mean, m2 = 0.0, torch.zeros(channels).double(), torch.zeros(channels).double()
    for moments in all_moments:
        other = float(moments[0])
        other_mean, other_var = moments[1:].split(channels)
        if other:
            total = count + other
            delta = other_mean - mean
            mean = mean + delta * (other / total)
            m2 = m2 + other_var * other + delta * delta * (count * other / total)
            count = total
    return mean, m2 / max(count, 1), int(count)


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        last = _bridge.is_channels_last(x)
        own = _moments(x, last)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        mean, var, count = _merge(gathered)
        if count == 1:
            raise ValueError(
                "SyncBatchNorm: 1 value per channel in all processes together in training mode; "
                "batch statistics need 2 or more"
            )
        dtype = _bridge.parameter_dtype(x.dtype)
        mean, var = mean.to(dtype), var.to(dtype)
        # The sums that backward needs are the gradients of weight and bias.
        scale = torch.ones_like(mean) if weight is None else weight
        shift = torch.zeros_like(mean) if bias is None else bias
        norm = Norm(eps, last)
        if x.numel():
            y, ctx.core = _bridge.norm_forward(x, scale, shift, None, mean, var, None, norm)
        else:
            y, ctx.core = torch.empty_like(x), None
        ctx.norm, ctx.count, ctx.group = norm, count, group
        ctx.save_for_backward(x, scale, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> Any:
        """As for given statistics, less what these take: with sums over all processes,

        weight r (sum g + n sum g n) / count,    n = (x - mean) r,    r = 1 / sqrt(var + eps)
        """
        x, weight, mean, var = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(mean), torch.zeros_like(mean)
        if x.numel():
            grad_x, grad_weight, grad_bias = _bridge.norm_backward(grad_y, ctx.core, ctx.norm)[:3]
        sums = torch.stack([grad_weight, grad_bias]).double()
        dist.all_reduce(sums, group=ctx.group)
        if x.numel():
            r = (var.double() + ctx.norm.eps).rsqrt()
            slope, offset = (sums * (-weight.double() * r / ctx.count)).to(mean.dtype)
            grad_x = _bridge.norm_inference(x, slope, offset, grad_x, mean, var, ctx.norm)
        grads = zip((grad_x, grad_weight, grad_bias), ctx.needs_input_grad, strict=False)
        return *(grad if needed else None for grad, needed in grads), None, None
