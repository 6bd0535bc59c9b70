"""What BatchNorm can be besides itself: fused arguments, masks, ghost batches, renormalization,
frozen layers, banks. Values against NumPy in extended precision, gradients against differences."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import bnext
import reference
from bnext import nn, optim
from bnext.nn import Module, Parameter
from cases import DTYPES, HALF_DTYPES, TOLERANCE, data, dtype_name, parameter_dtype, shapes
from gradcheck import gradcheck

CHANNELS = 5
MASK = np.array([True, False, True, True, False])
SHAPES = [((6, CHANNELS), 1), ((7, CHANNELS, 3, 4), 1), ((6, 4, 3, CHANNELS), -1)]

# What can be combined: each may be there or not.
CHOICES = ["channel_mask", "ghost_batch_size", "mask", "renorm", "epilogue"]
COMBINATIONS = [
    frozenset(chosen)
    for count in range(len(CHOICES) + 1)
    for chosen in itertools.combinations(CHOICES, count)
]


def layer_of(chosen, axis=1, dtype=np.float64, channels=CHANNELS, **options):
    if "channel_mask" in chosen:
        options["channel_mask"] = np.resize(MASK, channels)
    if "ghost_batch_size" in chosen:
        options["ghost_batch_size"] = 3
    if "epilogue" in chosen:
        options |= {"activation": "leaky_relu", "negative_slope": 0.3}
    if "renorm" in chosen:
        kind, options = nn.BatchRenorm, options | {"r_max": 1.1, "d_max": 0.05}
    else:
        kind = nn.BatchNorm
    norm = kind(channels, channel_axis=axis, dtype=parameter_dtype(dtype), **options)
    rng = np.random.default_rng(5)
    for parameter in norm.parameters():
        parameter.data[...] = rng.normal(size=channels)
    norm.running_mean[...] = rng.normal(size=channels)
    norm.running_var[...] = rng.uniform(0.3, 3, channels)
    return norm


def positions(shape, axis, seed=2):
    """A mask with at least two values in every sample."""
    one = [1 if a == axis % len(shape) else size for a, size in enumerate(shape)]
    mask = np.random.default_rng(seed).random(one) < 0.6
    if len(shape) == 2:
        mask[[0, 1, -1, -2]] = True
    else:
        mask[:, :, 0, :2] = True
    return mask


class Expected:
    """The layer in NumPy: one group of samples after the other, each as the formulas say."""

    def __init__(self, norm, x, mask=None, residual=None, groups=((0, None),)):
        axis = norm.channel_axis
        other = tuple(a for a in range(x.ndim) if a != axis % x.ndim)

        def wide(values):
            return reference._per_channel(values, x, axis)

        on = wide(np.ones(norm.num_features) if norm.channel_mask is None else norm.channel_mask)
        weight, bias = wide(norm.weight.data), wide(norm.bias.data)
        x = reference.wide(x)
        counted = np.ones_like(x) if mask is None else np.broadcast_to(mask, x.shape) * 1.0
        self.n, self.r = np.empty_like(x), np.empty_like(x)
        self.mean, self.var, self.counts, self.counted = [], [], [], counted
        self.factor, self.offset = np.ones_like(x), np.zeros_like(x)
        self.groups = [slice(*group) for group in groups]
        for group in self.groups:
            part, valid = x[group], counted[group]
            count = valid.sum(other)
            mean = (part * valid).sum(other) / count
            var = (np.square(part - wide(mean)) * valid).sum(other) / count
            r = 1 / np.sqrt(wide(var) + norm.eps)
            self.n[group] = np.where(on, (part - wide(mean)) * r, part)
            self.r[group] = np.where(on, r, 1)
            if isinstance(norm, nn.BatchRenorm):
                sigma = np.sqrt(wide(norm.running_var) + norm.eps)
                factor = np.clip(1 / r / sigma, 1 / norm.r_max, norm.r_max)
                offset = np.clip(
                    (wide(mean) - wide(norm.running_mean)) / sigma, -norm.d_max, norm.d_max
                )
                self.factor[group] = np.where(on, factor, 1)
                self.offset[group] = np.where(on, offset, 0)
            self.mean.append(mean)
            self.var.append(var)
            self.counts.append(count)
        self.on, self.weight, self.other = on, weight, other
        z = weight * (self.n * self.factor + self.offset) + bias
        z = z if residual is None else z + reference.wide(residual)
        self.y, self.derivative = reference.activate(z, norm.activation, norm.negative_slope)

    def backward(self, grad_y):
        """Gradients of x, weight, bias, residual."""
        g = reference.wide(grad_y) * self.derivative
        grad_x = np.empty_like(g)
        for group, count in zip(self.groups, self.counts, strict=True):
            n, on = self.n[group], self.on
            sums = [s.sum(self.other, keepdims=True) for s in (g[group], g[group] * n)]
            m = count.reshape(sums[0].shape)
            through = self.counted[group] * on * (sums[0] + n * sums[1]) / m
            grad_x[group] = self.weight * self.factor[group] * self.r[group] * (g[group] - through)
        grad_weight = (g * (self.n * self.factor + self.offset)).sum(self.other)
        return grad_x, grad_weight, g.sum(self.other), g


class Whole(Module):
    """A layer with all its arguments, as a function of x and, as a parameter, the residual."""

    def __init__(self, norm, mask=None, residual=None):
        super().__init__()
        self.norm, self.mask = norm, mask
        self.residual = None if residual is None else Parameter(residual)

    def forward(self, x):
        if self.residual is None:
            return self.norm.forward(x, mask=self.mask, update_stats=False)
        y, backward_both = self.norm.forward(
            x, self.residual.data, mask=self.mask, update_stats=False
        )

        def backward(grad_y):
            grad_x, grad_residual = backward_both(grad_y)
            self.residual.accumulate(grad_residual)
            return grad_x

        return y, backward


def case(chosen, shape, axis, dtype=np.float64):
    """(layer, x, mask, residual, groups)."""
    x = data(shape, axis, dtype)
    mask = positions(shape, axis) if "mask" in chosen else None
    residual = data(shape, axis, dtype, seed=8) if "epilogue" in chosen else None
    middle = len(x) // 2
    groups = [(0, middle), (middle, None)] if "ghost_batch_size" in chosen else [(0, None)]
    return layer_of(chosen, axis, dtype), x, mask, residual, groups


def name(value):
    return "+".join(sorted(value)) or "plain" if isinstance(value, frozenset) else None


each_combination = pytest.mark.parametrize("chosen", COMBINATIONS, ids=name)
each_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES)


# -- values and gradients --------------------------------------------------------------
@each_combination
@each_shape
def test_gradients_are_those_of_differences(chosen, shape, axis):
    norm, x, mask, residual, _ = case(chosen, shape, axis)
    if "renorm" in chosen:
        # No gradient goes through R and d: at their limits there is none to go.
        norm.running_mean += 100
        norm.running_var *= 100
    gradcheck(Whole(norm, mask, residual), x, checked=15)


@each_combination
@each_shape
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)
def test_values_and_gradients_are_those_of_the_formulas(chosen, shape, axis, dtype):
    check_formulas(*case(chosen, shape, axis, dtype))


@settings(max_examples=60, deadline=None)
@given(
    drawn=shapes(),
    dtype=st.sampled_from([np.float32, *HALF_DTYPES]),
    chosen=st.sampled_from(COMBINATIONS),
    seed=st.integers(0, 99),
)
@example(((3, 65, 1), -1), np.float16, frozenset(), 37)  # the sum of gradients of weight cancels
def test_any_shape(drawn, dtype, chosen, seed):
    shape, axis = drawn
    chosen -= {"ghost_batch_size"}
    mask = None
    if "mask" in chosen:
        one = [1 if a == axis % len(shape) else size for a, size in enumerate(shape)]
        mask = np.random.default_rng(seed).random(one) < 0.7
        mask[0], mask[-1] = True, True
        assume(mask.sum() > 1)
    residual = data(shape, axis, dtype, seed=8) if "epilogue" in chosen else None
    norm = layer_of(chosen, axis, dtype, shape[axis])
    # Channels may have two values that nearly agree: what is left of large terms has their errors.
    check_formulas(norm, data(shape, axis, dtype, seed), mask, residual, [(0, None)], True)


def check_formulas(norm, x, mask, residual, groups, cancelling=False):
    expected = Expected(norm, x, mask, residual, groups)
    y, backward = norm.forward(x, residual, mask=mask)
    grad_y = data(x.shape, norm.channel_axis, x.dtype, seed=4)
    grads = backward(grad_y)
    grads = grads if residual is not None else (grads,)
    results = [y, grads[0], norm.weight.grad, norm.bias.grad, *grads[1:]]
    kinds = [x.dtype, x.dtype, norm.weight.data.dtype, norm.weight.data.dtype, x.dtype]
    every_wanted = [expected.y, *expected.backward(grad_y)]
    units = [1] * len(every_wanted)
    if cancelling:
        # A gradient's natural size is that of weight r grad_y: the terms it is a difference of.
        terms = expected.weight * expected.factor * expected.r
        units[1] = np.maximum(1, abs(terms) * abs(reference.wide(grad_y)).max())
    for result, dtype, wanted, unit in zip(results, kinds, every_wanted, units, strict=False):
        assert result.dtype == dtype
        scale = unit + abs(wanted).max()
        assert (abs(reference.wide(result) - wanted) <= TOLERANCE[dtype] * scale).all()


@each_combination
def test_running_statistics_see_one_group_after_the_other(chosen):
    norm, x, mask, residual, groups = case(chosen, (7, CHANNELS, 3, 4), 1)
    norm.momentum = 0.3
    on = norm.channel_mask if norm.channel_mask is not None else np.ones(CHANNELS, bool)
    expected = Expected(norm, x, mask, residual, groups)
    mean, var = norm.running_mean.copy(), norm.running_var.copy()
    for new_mean, new_var, count in zip(expected.mean, expected.var, expected.counts, strict=True):
        mean[on] = (0.7 * mean + 0.3 * new_mean)[on]
        if "renorm" in chosen:
            sigma = 0.7 * np.sqrt(var + norm.eps) + 0.3 * np.sqrt(new_var + norm.eps)
            var[on] = (sigma**2 - norm.eps)[on]
        else:
            var[on] = (0.7 * var + 0.3 * new_var * count / (count - 1))[on]
    norm.forward(x, residual, mask=mask)
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(norm.running_var, var, rtol=1e-12)
    assert norm.num_batches_tracked == len(groups)


@pytest.mark.parametrize("chosen", [c for c in COMBINATIONS if "epilogue" not in c], ids=name)
@pytest.mark.parametrize("offset", [0, 1e4])
def test_float32_far_from_zero(chosen, offset):
    """DESIGN: |y - y64| <= 5e-6 (1 + |y|) at |mean| / sigma up to 1e4."""
    shape = (8, CHANNELS, 9, 11)
    noise = np.random.default_rng(0).normal(size=shape)
    norm, _, mask, _, groups = case(chosen, shape, 1, np.float32)
    if offset and norm.channel_mask is not None:
        noise -= offset * ~MASK[:, None, None]  # y = weight x + bias has the digits of x
    x = (noise + offset).astype(np.float32)
    norm.running_mean[...] = offset + 0.01
    expected = Expected(norm, x, mask, None, groups)
    y, backward = norm.forward(x, mask=mask)
    assert (abs(y - expected.y) / (1 + abs(expected.y))).max() < 5e-6
    grad_y = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    grads = backward(grad_y), norm.weight.grad, norm.bias.grad
    for result, wanted in zip(grads, expected.backward(grad_y), strict=False):
        assert abs(result - wanted).max() <= 5e-6 * (1 + abs(wanted).max())


@each_combination
def test_evaluation(chosen):
    """Running statistics for everything that is normalized, whatever the training does."""
    norm, x, mask, residual, _ = case(chosen, (7, CHANNELS, 3, 4), 1)
    on = np.ones(CHANNELS, bool) if norm.channel_mask is None else norm.channel_mask
    expected = reference.BatchNorm(
        x,
        norm.weight.data,
        norm.bias.data,
        activation=norm.activation,
        negative_slope=norm.negative_slope,
        mean=np.where(on, norm.running_mean, 0),
        var=np.where(on, norm.running_var, 1 - norm.eps),
        residual=residual,
    )
    np.testing.assert_allclose(norm(x, residual), expected.y, rtol=1e-10, atol=1e-10)
    norm.eval()
    np.testing.assert_array_equal(norm.forward(x, residual, mask=mask)[0], norm(x, residual))
    gradcheck(Whole(norm, mask, residual), x, checked=15)


def test_a_channel_that_is_masked_is_scaled_only():
    norm, x = layer_of({"channel_mask"}, dtype=np.float32), data((6, CHANNELS, 3))
    y, _ = norm.forward(x)
    shape = (-1, 1)
    affine = x * norm.weight.data.reshape(shape) + norm.bias.data.reshape(shape)
    np.testing.assert_array_equal(y[:, ~MASK], affine[:, ~MASK])
    np.testing.assert_array_equal(norm(x)[:, ~MASK], affine[:, ~MASK])


def test_without_a_channel_to_normalize_one_value_is_enough():
    norm = nn.BatchNorm(3, channel_mask=[False] * 3)
    x = data((1, 3))
    y, backward = norm.forward(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(backward(x), x)
    np.testing.assert_array_equal(norm.weight.grad, x[0] ** 2)
    assert norm.num_batches_tracked == 0


def test_padding_does_not_count():
    """The statistics of the valid values are those of an array that has no others."""
    norm, x = nn.BatchNorm(CHANNELS), data((6, CHANNELS, 8))
    lengths = np.array([8, 3, 1, 5, 8, 2])
    mask = np.arange(8) < lengths[:, None]
    x[~np.broadcast_to(mask[:, None], x.shape)] = 1e30
    y, _ = norm.forward(x, mask=mask)
    valid = np.ascontiguousarray(np.moveaxis(x, 1, -1)[mask])
    other = nn.BatchNorm(CHANNELS)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1)[mask], other.forward(valid)[0], atol=1e-6)
    for key in ("running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(norm, key), getattr(other, key))
    same = nn.BatchNorm(CHANNELS)
    np.testing.assert_array_equal(same.forward(x, mask=mask[:, None])[0], y)


def test_a_mask_of_everything_is_none():
    x = data((6, CHANNELS, 8), dtype=np.float64)
    results = []
    for mask in (None, np.ones((6, 8), bool)):
        norm = layer_of(set())
        y, backward = norm.forward(x, mask=mask)
        results.append([y, backward(np.cos(x)), norm.weight.grad, norm.running_var])
    for without, everything in zip(*results, strict=True):
        np.testing.assert_allclose(everything, without, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, CHANNELS, 8), (0, CHANNELS, 8), (6, CHANNELS, 0)])
@each_combination
def test_a_mask_without_a_valid_value_changes_no_statistics(chosen, shape):
    norm, x = layer_of(chosen - {"mask"}), data((6, CHANNELS, 8), dtype=np.float64)
    x = x[: shape[0], :, : shape[2]]
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    y, backward = norm.forward(x, mask=np.zeros((len(x), x.shape[2]), bool))
    grad_x = backward(np.ones_like(x))
    on = np.ones(CHANNELS, bool) if norm.channel_mask is None else norm.channel_mask
    assert np.isfinite(y).all()
    assert (grad_x[:, on] == 0).all()
    assert (norm.weight.grad[on] == 0).all()
    assert all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())
    if x.size:
        gradcheck(Whole(norm, np.zeros((len(x), x.shape[2]), bool)), x, checked=10)


@each_combination
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(chosen, bad):
    norm, x, mask, residual, _ = case(chosen, (7, CHANNELS, 3, 4), 1, np.float32)
    x[0, 2, 0, 0] = bad
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="not finite in 1 of 5 channels, the first is 2"):
        y, backward = norm.forward(x, residual, mask=mask)
    grads = backward(np.ones_like(x))
    for values in (y, grads if residual is None else grads[0]):
        finite = np.isfinite(values).all((0, 2, 3))
        assert not finite[2]
        assert finite[[0, 1, 3, 4]].all()
    if "ghost_batch_size" not in chosen:
        assert all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())
    assert np.isfinite(norm.running_mean).all()
    assert np.isfinite(norm.running_var).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_matter_in_a_channel_that_is_masked(bad):
    norm, x = layer_of({"channel_mask"}), data((7, CHANNELS, 3), dtype=np.float64)
    x[0, 1, 0] = bad
    y, backward = norm.forward(x)
    assert norm.num_batches_tracked == 1
    assert (~np.isfinite(y)).sum() == 1
    assert np.isfinite(np.delete(backward(np.ones_like(x)), 1, axis=1)).all()


@each_combination
def test_inputs_need_not_be_contiguous(chosen):
    norm, x, mask, residual, _ = case(chosen, (7, CHANNELS, 3, 4), 1)
    spread = np.repeat(x, 2, axis=-1)[..., ::2]
    assert not spread.flags.c_contiguous
    y, backward = norm.forward(x, residual, mask=mask)
    again, backward_again = norm.forward(spread, residual, mask=mask, update_stats=False)
    if "renorm" not in chosen:  # R and d have moved
        np.testing.assert_array_equal(again, y)
        grad = np.repeat(y, 2, axis=-1)[..., ::2]
        np.testing.assert_array_equal(backward_again(grad), backward(y))


@each_combination
def test_same_bits_for_any_number_of_threads(chosen, restore_threads):
    results = []
    for threads in (1, 3):
        bnext.set_num_threads(threads)
        norm, x, mask, residual, _ = case(chosen, (40, CHANNELS, 20, 11), 1, np.float32)
        y, backward = norm.forward(x, residual, mask=mask)
        grads = backward(np.cos(x))
        results.append([y, *(grads if residual is not None else [grads]), norm.weight.grad])
        results[-1] += norm.state_dict().values()
    for one, many in zip(*results, strict=True):
        np.testing.assert_array_equal(one, many)


# -- fused arguments -------------------------------------------------------------------
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("options", [{}, {"channel_mask": MASK}, {"ghost_batch_size": 3}], ids=str)
def test_dropout_residual_and_activation(training, frozen, activation, with_residual, options):
    """Gradients with the mask that is drawn, and the values without one."""
    generator = bnext.Generator(3)
    start = generator.state
    norm = nn.BatchNorm(
        CHANNELS,
        activation=activation,
        dropout=0.4,
        generator=generator,
        dtype=np.float64,
        **options,
    )
    norm.running_mean[...] = 0.1
    norm.running_var[...] = 2
    norm.train(training)
    if frozen:
        norm.freeze(affine=False)
    x = data((6, CHANNELS, 7), dtype=np.float64)
    residual = data((6, CHANNELS, 7), dtype=np.float64, seed=9) if with_residual else None

    def rewind():
        generator.state = start

    gradcheck(Whole(norm, None, residual), x, before=rewind, checked=25)
    rewind()
    y = norm.forward(x, residual, update_stats=False)[0]
    norm.dropout = 0.0
    dry = norm.forward(x, residual, update_stats=False)[0]
    if training:
        kept = y != 0
        assert 0.3 < kept[dry != 0].mean() < 0.9
        np.testing.assert_allclose(y[kept], dry[kept] / 0.6, rtol=1e-12)
    else:
        np.testing.assert_array_equal(y, dry)
        np.testing.assert_array_equal(norm(x, residual), dry)


def test_the_fused_layer_is_the_fused_function():
    x, residual = data((6, 3, 5)), data((6, 3, 5), seed=3)
    generator = bnext.Generator(8)
    norm = nn.BatchNorm2d(3, activation="relu", dropout=0.3, generator=bnext.Generator(8))
    y, backward = norm.forward(x[..., None], residual[..., None])
    expected, saved = bnext.functional.batch_norm_forward(
        x,
        np.ones(3, "f"),
        np.zeros(3, "f"),
        residual=residual,
        activation="relu",
        dropout=0.3,
        generator=generator,
    )
    grads = bnext.functional.batch_norm_backward(np.sin(x), saved)
    np.testing.assert_array_equal(y[..., 0], expected)
    grad_x, grad_residual = backward(np.sin(x)[..., None])
    np.testing.assert_array_equal(grad_x[..., 0], grads.x)
    np.testing.assert_array_equal(grad_residual[..., 0], grads.residual)


# -- ghost batches ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("samples", "size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 5]), (7, 4, [7]), (3, 4, [3]), (5, 1, [1] * 5), (0, 4, [0])],
)
def test_groups_have_the_size_or_more(samples, size, sizes):
    norm, x = nn.BatchNorm(3, ghost_batch_size=size), data((samples or 1, 3, 6))[:samples]
    edges = np.cumsum([0, *sizes])
    y = norm.forward(x)[0]
    for start, stop in itertools.pairwise(edges):
        alone = nn.BatchNorm(3).forward(x[start:stop])[0]
        np.testing.assert_array_equal(y[start:stop], alone)
    assert norm.num_batches_tracked == (len(sizes) if samples else 0)
    np.testing.assert_array_equal(norm.eval().forward(x)[0], norm(x))


def test_ghost_batches_without_statistics_are_for_training_only():
    norm = nn.BatchNorm(3, ghost_batch_size=3, track_running_stats=False)
    x = data((6, 3, 5))
    whole = nn.BatchNorm(3).forward(x)[0]
    np.testing.assert_array_equal(norm(x), whole)
    assert not np.array_equal(norm.forward(x)[0], whole)


# -- renormalization -------------------------------------------------------------------
def test_renormalization_within_its_limits_is_evaluation():
    norm, x = (
        nn.BatchRenorm(CHANNELS, r_max=1e6, d_max=1e6, dtype=np.float64),
        data((4, CHANNELS, 3), dtype=np.float64),
    )
    norm.running_mean[...] = np.arange(CHANNELS)
    norm.running_var[...] = 1 + np.arange(CHANNELS)
    expected = norm(x)
    np.testing.assert_allclose(norm.forward(x)[0], expected, rtol=1e-12)


def test_renormalization_that_may_change_nothing_is_batch_normalization():
    x = data((4, CHANNELS, 3))
    norm = nn.BatchRenorm(CHANNELS, r_max=1, d_max=0)
    y, backward = norm.forward(x)
    plain, plain_backward = nn.BatchNorm(CHANNELS).forward(x)
    np.testing.assert_array_equal(y, plain)
    np.testing.assert_array_equal(backward(np.cos(x)), plain_backward(np.cos(x)))


def test_limits_may_change_and_are_checked():
    norm, x = nn.BatchRenorm(CHANNELS, r_max=1, d_max=0), data((4, CHANNELS, 3))
    before = norm.forward(x, update_stats=False)[0]
    norm.r_max, norm.d_max = 3.0, 5.0
    assert not np.array_equal(norm.forward(x, update_stats=False)[0], before)
    norm.r_max = 0.5
    with pytest.raises(ValueError, match=r"BatchRenorm: r_max: expected 1 or more, got 0\.5"):
        norm.forward(x)
    for bad in ({"r_max": 0.9}, {"d_max": -1}, {"d_max": np.nan}, {"track_running_stats": False}):
        with pytest.raises(ValueError, match=f"BatchRenorm: {next(iter(bad))}: expected"):
            nn.BatchRenorm(3, **bad)
    with pytest.raises(TypeError, match="BatchRenorm: r_max: expected a number, got str"):
        nn.BatchRenorm(3, r_max="3")


def test_renormalization_agrees_with_autograd_that_stops_at_r_and_d():
    torch = pytest.importorskip("torch", reason="the comparison is with PyTorch's autograd")
    norm, x = layer_of({"renorm"}), data((6, CHANNELS, 4), dtype=np.float64)
    norm.r_max, norm.d_max = 1.5, 0.5
    mean, var = (torch.from_numpy(a.copy()) for a in (norm.running_mean, norm.running_var))
    weight, bias = (torch.tensor(p.data, requires_grad=True) for p in norm.parameters())
    tensor = torch.tensor(x, requires_grad=True)
    sigma = torch.sqrt(var + norm.eps)
    mean_b = tensor.mean((0, 2))
    sigma_b = torch.sqrt(tensor.var((0, 2), unbiased=False) + norm.eps)
    r = (sigma_b / sigma).clamp(1 / 1.5, 1.5).detach()
    d = ((mean_b - mean) / sigma).clamp(-0.5, 0.5).detach()
    n = (tensor - mean_b[:, None]) / sigma_b[:, None] * r[:, None] + d[:, None]
    expected = n * weight[:, None] + bias[:, None]
    grad_y = data(x.shape, dtype=np.float64, seed=6)
    expected.backward(torch.from_numpy(grad_y))
    y, backward = norm.forward(x)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(backward(grad_y), tensor.grad.numpy(), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(norm.weight.grad, weight.grad.numpy(), rtol=1e-10)
    np.testing.assert_allclose(norm.bias.grad, bias.grad.numpy(), rtol=1e-10)


# -- frozen, not updated, banks --------------------------------------------------------
def model_of(**options):
    bnext.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3, **options), nn.Linear(3, 2))


def train_step(model, optimizer, x):
    y, backward = model.forward(x)
    optimizer.zero_grad()
    backward(y)
    optimizer.step()


@pytest.mark.parametrize(("stats", "affine"), [*itertools.product([True, False], repeat=2)])
def test_what_is_frozen_survives_train(stats, affine):
    model, x = model_of(), data((8, 4))
    norm = model[1].freeze(stats=stats, affine=affine)
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    model.eval().train()
    optimizer = optim.AdamW(model.named_parameters(), 0.1, weight_decay=0.5)
    for _ in range(3):
        train_step(model, optimizer, x)
    same = {key: np.array_equal(value, before[key]) for key, value in norm.state_dict().items()}
    assert same == {
        "weight": affine,
        "bias": affine,
        "running_mean": stats,
        "running_var": stats,
        "num_batches_tracked": stats,
    }
    (mode,) = model.modes()
    assert mode.name == "1"
    assert (mode.statistics, mode.updates) == (("running", False) if stats else ("batch", True))
    assert mode.trains != affine
    hidden = model[0](x)
    np.testing.assert_array_equal(
        np.array_equal(norm.forward(hidden, update_stats=False)[0], norm(hidden)), stats
    )
    norm.unfreeze()
    train_step(model, optimizer, x)
    assert not any(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())


def test_one_value_is_enough_for_frozen_statistics():
    norm, x = nn.BatchNorm(3), data((1, 3))
    with pytest.raises(ValueError, match=r"1 value per channel .* freeze\(affine=False\)"):
        norm.forward(x)
    norm.freeze(affine=False).forward(x)
    with pytest.raises(ValueError, match="freeze: stats: expected False without running"):
        nn.BatchNorm(3, track_running_stats=False).freeze()


def test_statistics_that_are_not_updated():
    model, x = model_of(), data((8, 4))
    norm = model[1]
    before = {key: value.copy() for key, value in norm.state_dict().items()}

    def unchanged():
        return all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())

    with nn.stats_updates(model, False):
        first, _ = model.forward(x)
        assert unchanged()
        assert not model.modes()[0].updates
        norm.forward(model[0](x), update_stats=True)
        assert not unchanged()
        norm.load_state_dict(before)
    norm.forward(model[0](x), update_stats=False)
    assert unchanged()
    np.testing.assert_array_equal(model.forward(x)[0], first)
    assert not unchanged()
    with pytest.raises(ZeroDivisionError), nn.stats_updates(model, False):
        raise ZeroDivisionError
    assert norm.update_stats


def test_cumulative_average_of_ghost_batches_is_their_mean():
    norm, x = nn.BatchNorm(3, momentum=None, ghost_batch_size=2), data((8, 3, 5))
    norm.forward(x[:4])
    norm.forward(x[4:])
    variances = [x[i : i + 2].var((0, 2), ddof=1) for i in range(0, 8, 2)]
    np.testing.assert_allclose(norm.running_mean, x.mean((0, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, np.mean(variances, axis=0), rtol=1e-5)


def test_no_attribute_can_be_a_bank():
    for kind in (nn.BatchNorm, nn.BatchRenorm):
        for name_ in (*vars(kind(3)), "running_mean"):
            if not name_.startswith("__"):
                with pytest.raises(ValueError, match="banks: expected different identifiers"):
                    kind(3, banks=[name_])


@pytest.mark.parametrize("kind", [nn.BatchNorm, nn.BatchRenorm])
def test_banks_keep_their_own_statistics(kind):
    domains = {"real": data((6, 3, 5)), "fake": data((6, 3, 5), seed=1, offset=20.0)}
    norm = kind(3, banks=domains)
    alone = {}
    for name_, x in domains.items():
        alone[name_] = kind(3)
        for _ in range(3):
            alone[name_].forward(x)
            norm.bank(name_).forward(x)
    for name_, x in domains.items():
        np.testing.assert_array_equal(norm.bank(name_)(x), alone[name_](x))
    keys = {f"{bank}.{key}" for bank in domains for key in alone["real"]._buffers}
    assert set(norm.state_dict()) == {"weight", "bias"} | keys
    other = kind(3, banks=domains)
    other.load_state_dict(norm.state_dict())
    np.testing.assert_array_equal(other.bank("fake")(x), norm.bank("fake")(x))
    other.reset_running_stats()
    assert (other.real.running_var == 1).all()
    assert (other.fake.running_mean == 0).all()


def test_a_copy_has_banks_of_its_own():
    norm = nn.BatchNorm(3, banks=("real", "fake")).bank("fake")
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        other.forward(X)
        assert other.fake.num_batches_tracked == 1
        np.testing.assert_array_equal(other.running_mean, other.fake.running_mean)
        assert norm.fake.num_batches_tracked == 0


def test_statistics_that_are_set_are_those_of_the_bank_in_use():
    norm = nn.BatchNorm(3, banks=("real", "fake")).bank("fake")
    norm.running_mean = mean = np.full(3, 2.0, np.float32)
    assert norm.state_dict()["fake.running_mean"] is mean
    assert (norm.bank("real").running_mean == 0).all()
    assert norm.bank("fake").running_mean is mean


def test_banks_of_a_model():
    model = model_of(banks=("real", "fake"))
    with nn.use_bank(model, "fake"):
        assert model.modes()[0].bank == "fake"
        model.forward(data((8, 4)))
    assert model[1].current_bank == "real"
    assert model[1].fake.num_batches_tracked == 1
    assert model[1].real.num_batches_tracked == 0
    message = "BatchNorm '1': bank: expected one of real, fake, got 'sketch'"
    with pytest.raises(ValueError, match=message):
        model[1].bank("sketch")
    with pytest.raises(ValueError, match=message), nn.use_bank(model, "sketch"):
        pass
    with pytest.raises(ValueError, match="use_bank: model: expected BatchNorm layers with banks"):
        nn.use_bank(model_of(), "real").__enter__()
    with pytest.raises(ValueError, match=r"bank: expected one of \(none\), got 'real'"):
        nn.BatchNorm(3).bank("real")


# -- wrong calls -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.5}, ValueError, r"dropout: expected a number in \[0, 1\], got 1.5"),
        ({"dropout": np.nan}, ValueError, "dropout: expected a number"),
        ({"dropout": "half"}, TypeError, "dropout: expected a number, got str"),
        ({"channel_mask": [1, 0, 1]}, TypeError, "channel_mask: expected dtype bool, got int"),
        ({"channel_mask": [True]}, ValueError, r"channel_mask: expected shape \(3,\), got \(1,\)"),
        ({"ghost_batch_size": 0}, ValueError, "ghost_batch_size: expected 1 or more, got 0"),
        ({"ghost_batch_size": 2.5}, TypeError, "ghost_batch_size: expected an integer, got 2.5"),
        ({"banks": "real"}, TypeError, "banks: expected names, got 'real'"),
        ({"banks": ["a", "a"]}, ValueError, "banks: expected different identifiers .*, got 'a'"),
        ({"banks": ["a.b"]}, ValueError, "banks: expected different identifiers .*, got 'a.b'"),
        ({"banks": ["weight"]}, ValueError, "banks: .*, got 'weight'"),
        ({"banks": ["eps"]}, ValueError, "banks: .*, got 'eps'"),
        ({"banks": ["running_var"]}, ValueError, "banks: .*, got 'running_var'"),
        ({"banks": [3]}, ValueError, "banks: expected different identifiers .*, got 3"),
        (
            {"banks": ["a"], "track_running_stats": False},
            ValueError,
            "banks: expected none without track_running_stats",
        ),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"BatchNorm: {message}"):
        nn.BatchNorm(3, **options)


X = data((4, 3, 5))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"residual": X[:, :, :4]}, ValueError, r"residual: expected shape \(4, 3, 5\), got"),
        (X, {"residual": X.astype(float)}, TypeError, "residual: expected dtype float32"),
        (X, {"mask": np.ones((4, 5))}, TypeError, "mask: expected dtype bool, got float64"),
        (
            X,
            {"mask": np.ones((4, 3, 5), bool)},
            ValueError,
            r"mask: expected shape \(4, 1, 5\) or \(4, 5\), got \(4, 3, 5\)",
        ),
        (X, {"mask": np.ones(4, bool)}, ValueError, r"mask: expected shape .*, got \(4,\)"),
        (X, {"mask": np.eye(4, 5) * np.eye(4)[:, :1] > 0}, ValueError, "1 valid value per channel"),
        (X[0, 0], {}, ValueError, "x: expected 2 or more dimensions"),
        (X.astype(int), {"mask": np.ones((4, 5), bool)}, TypeError, "x: expected dtype .*int64"),
        (X.astype(int), {"mask": np.zeros((4, 5), bool)}, TypeError, "x: expected dtype .*int64"),
        (np.ma.masked_array(X, X > 0), {}, TypeError, "without masked values"),
        (
            np.ma.masked_array(X, X > 0),
            {"mask": np.ones((4, 5), bool)},
            TypeError,
            "without masked values",
        ),
    ],
)
@pytest.mark.parametrize(
    "chosen",
    [{}, {"channel_mask": [True, False, True]}, {"ghost_batch_size": 2}],
    ids=str,
)
@pytest.mark.parametrize("kind", [nn.BatchNorm, nn.BatchRenorm])
def test_wrong_inputs_change_nothing(kind, chosen, x, options, error, message):
    norm = kind(3, **chosen)
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    with pytest.raises(error, match=message):
        norm.forward(x, **options)
    assert all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 2}, {"channel_mask": [True] * 3}])
def test_wrong_gradients(options):
    _, backward = nn.BatchNorm(3, **options).forward(X)
    with pytest.raises(ValueError, match="batch_norm_backward: grad_y: expected shape"):
        backward(np.concatenate([X, X]))


def test_one_value_in_one_group_changes_nothing():
    norm = nn.BatchNorm(3, ghost_batch_size=1)
    with pytest.raises(ValueError, match=r"BatchNorm: 1 value per channel \(shape \(1, 3\)\)"):
        norm.forward(X[:, :, 0])
    assert norm.num_batches_tracked == 0


# -- display ---------------------------------------------------------------------------
def test_repr():
    norm = nn.BatchNorm(3, dropout=0.2, ghost_batch_size=8, channel_mask=[True, False, True])
    assert repr(norm.freeze(stats=False)) == (
        "BatchNorm(3, eps=1e-05, momentum=0.1, channel_mask=1 off, dropout=0.2, "
        "ghost_batch_size=8, frozen_affine=True)"
    )
    assert repr(nn.BatchRenorm(3)).endswith("momentum=0.1, r_max=3.0, d_max=5.0)")


def test_modes():
    model = nn.Sequential(
        nn.BatchNorm(3, ghost_batch_size=4, dropout=0.1), nn.BatchNorm(3, track_running_stats=False)
    )
    first, second = model.modes()
    assert (first.statistics, first.updates, first.dropout) == ("ghost batch", True, 0.1)
    assert (second.statistics, second.updates) == ("batch", False)
    first, second = model.eval().modes()
    assert (first.statistics, first.updates, first.dropout) == ("running", False, 0.0)
    assert second.statistics == "batch"
    assert str(model.modes()).splitlines()[1].split() == [
        *("0", "BatchNorm", "no", "running", "-", "no", "yes", "0")
    ]
