"""Ways to normalize an array, each with its gradient. `BatchNorm` chooses among them.

n is the normalized x, g the gradient that arrives at weight n + bias, m the number of values that
the statistics of a channel are of, r = 1 / sqrt(var + eps). The work is done by the functions of
`bnext.functional`; `options` are their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bnext import _core
from bnext import functional as F
from bnext._dtypes import is_half
from bnext.nn.module import Array
from bnext.random import Generator


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance (C,) in float64, of `count` values per channel."""

    mean: Array
    var: Array
    count: int


class Gradients(NamedTuple):
    """Those of weight and bias may be there although the layer has none."""

    x: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


class Pass(NamedTuple):
    """A result, its gradients as a function of (grad_y, out), and the statistics it is by."""

    y: Array
    gradients: Callable[[Array, Array | None], Gradients]
    moments: list[Moments]


class Dropout(NamedTuple):
    """After the activation; p = 0 is none. Consistent: all samples share one mask."""

    p: float = 0.0
    generator: Generator | None = None
    consistent: bool = False


Options = dict[str, Any]
Rescale = Callable[[Moments], tuple[Array, Array]]
"""R and d, (C,), of batch renormalization: it takes n R + d in place of n."""


def by_statistics(
    x: Array,
    statistics: Options,
    options: Options,
    dropout: Dropout,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Pass:
    """By constants: `statistics` are mean, var and eps."""
    if dropout.p > 0:
        plain = partial(by_statistics, statistics=statistics, options=options, dropout=Dropout())
        return _in_float32(partial(_then_dropout, plain, dropout), x, residual, out)
    y, saved = _core.batch_norm_inference_forward(
        x, residual=residual, out=out, **{**options, **statistics}
    )

    def gradients(grad_y: Array, out: Array | None) -> Gradients:
        grads = F.batch_norm_backward(grad_y, saved, out=out)
        return Gradients(grads.x, grads.weight, grads.bias, grads.residual)

    return Pass(y, gradients, [])


def _then_dropout(
    plain: Callable[..., Pass],
    dropout: Dropout,
    x: Array,
    residual: Array | None,
    out: Array | None,
) -> Pass:
    """`plain` and then dropout, where there is no single pass for both."""
    result = plain(x, residual=residual, out=out)
    shape = result.y.shape
    y, drop = F.dropout_forward(
        result.y,
        dropout.p,
        mask_shape=(1, *shape[1:]) if dropout.consistent else None,
        generator=dropout.generator,
        out=result.y,
    )

    def gradients(grad_y: Array, out: Array | None) -> Gradients:
        return result.gradients(F.dropout_backward(grad_y, drop), out)

    return result._replace(y=y, gradients=gradients)


def _in_float32(
    run: Callable[[Array, Array | None, Array | None], Pass],
    x: Array,
    residual: Array | None,
    out: Array | None,
) -> Pass:
    """``run(x, residual, out)``, which takes several steps: half types are rounded once, after."""
    if not is_half(x.dtype):
        return run(x, residual, out)

    def wide(array: Array) -> Array:
        return array.astype(np.float32)

    def rounded(array: Array, out: Array | None) -> Array:
        out = _core.empty_like(x) if out is None else out
        with np.errstate(all="ignore"):
            np.copyto(out, array, casting="unsafe")
        return out

    result = run(wide(x), None if residual is None else wide(residual), None)

    def gradients(grad_y: Array, out: Array | None) -> Gradients:
        grad_y = np.asanyarray(grad_y)
        if grad_y.dtype.name != x.dtype.name:
            raise TypeError(
                f"batch_norm_backward: grad_y: expected dtype {x.dtype} like the data, "
                f"got {grad_y.dtype}"
            )
        grads = result.gradients(wide(grad_y), None)
        return grads._replace(
            x=rounded(grads.x, out),
            residual=None if grads.residual is None else rounded(grads.residual, None),
        )

    return result._replace(y=rounded(result.y, out), gradients=gradients)


def by_batch(
    x: Array,
    options: Options,
    dropout: Dropout,
    *,
    residual: Array | None = None,
    positions: Array | None = None,
    channels: Array | None = None,
    rescale: Rescale | None = None,
    out: Array | None = None,
) -> Pass:
    """By the statistics of x.

    `positions` (like x, with one channel, bool) are those whose values count in the statistics,
    `channels` ((C,), bool) those that are normalized; by default all.
    """
    if dropout.p > 0 and dropout.consistent:
        plain = partial(
            by_batch,
            options=options,
            dropout=Dropout(),
            positions=positions,
            channels=channels,
            rescale=rescale,
        )
        return _in_float32(partial(_then_dropout, plain, dropout), x, residual, out)
    if positions is not None or channels is not None:
        part = partial(_by_part, options, dropout, positions, channels, rescale)
        return _in_float32(part, x, residual, out)
    if rescale is not None and x.size:
        return _renormalized(x, options, dropout, residual, rescale, out)
    y, saved = F.batch_norm_forward(
        x, residual=residual, dropout=dropout.p, generator=dropout.generator, out=out, **options
    )

    def gradients(grad_y: Array, out: Array | None) -> Gradients:
        grads = F.batch_norm_backward(grad_y, saved, out=out)
        return Gradients(grads.x, grads.weight, grads.bias, grads.residual)

    return Pass(y, gradients, [Moments(*saved.moments, saved.count)])


def by_groups(
    x: Array,
    groups: list[slice],
    normalize: Callable[..., Pass],
    *,
    residual: Array | None = None,
    positions: Array | None = None,
) -> Pass:
    """`normalize` each of `groups` of samples by itself; gradients of parameters add up."""

    def part(array: Array | None, group: slice) -> Array | None:
        return None if array is None else array[group]

    y = _core.empty_like(x)
    passes = [
        normalize(
            x[group], residual=part(residual, group), positions=part(positions, group), out=y[group]
        )
        for group in groups
    ]

    def gradients(grad_y: Array, out: Array | None) -> Gradients:
        grad_y = np.asanyarray(grad_y)
        if grad_y.shape != y.shape:
            raise ValueError(
                f"batch_norm_backward: grad_y: expected shape {y.shape}, got {grad_y.shape}"
            )
        grad_x = _core.empty_like(y) if out is None else out
        parts = [
            one.gradients(grad_y[group], grad_x[group])
            for group, one in zip(groups, passes, strict=True)
        ]
        weights, biases, residuals = zip(*(one[1:] for one in parts), strict=True)
        return Gradients(
            grad_x,
            _merged(np.sum, weights),
            _merged(np.sum, biases),
            _merged(np.concatenate, residuals),
        )

    return Pass(y, gradients, [moments for one in passes for moments in one.moments])


def _renormalized(
    x: Array,
    options: Options,
    dropout: Dropout,
    residual: Array | None,
    rescale: Rescale,
    out: Array | None,
) -> Pass:
    """weight (n R + d) + bias is the plain operation with weight R and bias + weight d."""
    # A first run for the statistics, from which R and d follow.
    _, first = F.batch_norm_forward(x, channel_axis=options["channel_axis"])
    factor, offset = rescale(Moments(*first.moments, first.count))
    weight, bias = _parameters(options, len(factor))
    dtype = first.mean.dtype
    changed = {
        "weight": (weight * factor).astype(dtype),
        "bias": (bias + weight * offset).astype(dtype),
    }
    fused = by_batch(x, {**options, **changed}, dropout, residual=residual, out=out)

    def gradients(grad_y: Array, out: Array | None) -> Gradients:
        grads = fused.gradients(grad_y, out)
        assert grads.weight is not None
        assert grads.bias is not None
        return grads._replace(weight=factor * grads.weight + offset * grads.bias)

    return fused._replace(gradients=gradients)


def _by_part(
    options: Options,
    dropout: Dropout,
    positions: Array | None,
    channels: Array | None,
    rescale: Rescale | None,
    x: Array,
    residual: Array | None,
    out: Array | None,
) -> Pass:
    """Statistics of a part of x as if they were constants, and in backward what they are not.

    All positions are normalized, so sums over g are over all of them, but the statistics hand
    gradients only to those they are of:

        grad_x = weight r (g - [position counts] (sum g + n sum g n) / m)

    In the other channels n is x, and grad_x = weight g. grad_weight = sum g n.
    """
    axis = options["channel_axis"]
    if channels is None:
        channels = np.ones(x.shape[axis], bool)
    moments, dtype = _moments_of_part(x, positions, channels, axis)
    factor, offset = np.ones(len(channels)), np.zeros(len(channels))
    if moments.count:
        center = np.where(channels, moments.mean, 0)
        spread = np.where(channels, moments.var + options["eps"], 1)
        if rescale is not None:
            R, d = rescale(moments)
            factor, offset = np.where(channels, R, factor), np.where(channels, d, offset)
    else:
        center = np.zeros(len(channels))
        spread = np.where(channels, np.inf, 1)  # n is 0 where no value counts

    weight, bias = _parameters(options, len(channels))
    with np.errstate(all="ignore"):  # var + eps = 0 and what is not finite: as IEEE has it
        # The kernel takes a mean of the dtype of x; what that has no digits for goes into the bias.
        rounded = center.astype(dtype)
        statistics: Options = {"mean": rounded, "var": spread.astype(dtype), "eps": 0.0}
        r = 1 / np.sqrt(statistics["var"].astype(np.float64))
        low = (center - rounded) * r
        scale, shift = weight * factor, bias + weight * (offset - factor * low)
        changed = {"weight": scale.astype(dtype), "bias": shift.astype(dtype)}
    constant = by_statistics(
        x, statistics, {**options, **changed}, dropout, residual=residual, out=out
    )

    counts = np.moveaxis(channels.reshape(-1, *[1] * (x.ndim - 1)), 0, axis)
    if positions is not None:
        counts = counts & positions

    @np.errstate(all="ignore")
    def gradients(grad_y: Array, out: Array | None) -> Gradients:
        grads = constant.gradients(grad_y, out)
        sum_g = np.asarray(grads.bias, np.float64)
        sum_gn = np.asarray(grads.weight, np.float64) - low * sum_g
        if moments.count:
            each = np.where(channels, scale * r / moments.count, 0)
            through_statistics = F.batch_norm_inference(
                x,
                weight=(each * sum_gn).astype(dtype),
                bias=(each * (sum_g - low * sum_gn)).astype(dtype),
                channel_axis=axis,
                **statistics,
            )
            np.subtract(grads.x, through_statistics, out=grads.x, where=counts)
        return grads._replace(weight=factor * sum_gn + offset * sum_g, bias=sum_g)

    return Pass(constant.y, gradients, [moments])


def _moments_of_part(
    x: Array, positions: Array | None, channels: Array, axis: int
) -> tuple[Moments, np.dtype[Any]]:
    """Statistics of the values that count, and the dtype of x; none if no channel asks."""
    if not channels.any():
        part = x[:0]
    elif positions is None:
        part = x
    else:
        part = np.moveaxis(x, axis, -1)[np.moveaxis(positions, axis, -1)[..., 0]]
        axis = -1
    _, saved = F.batch_norm_forward(part, channel_axis=axis)
    return Moments(*saved.moments, saved.count), saved.mean.dtype


def _merged(merge: Callable[..., Array], arrays: Iterable[Array | None]) -> Array | None:
    given = [array for array in arrays if array is not None]
    return merge(given, axis=0) if given else None


def _parameters(options: Options, channels: int) -> tuple[Array, Array]:
    """weight and bias in float64."""
    weight, bias = options["weight"], options["bias"]
    return (
        np.ones(channels) if weight is None else np.asarray(weight, np.float64),
        np.zeros(channels) if bias is None else np.asarray(bias, np.float64),
    )
