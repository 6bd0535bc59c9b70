"""Whole channels and samples, blocks, alpha and Gaussian dropout; masks to look at; MC dropout."""

import math
import os
import re

import ml_dtypes
import numpy as np
import pytest

import bnext
import reference
from bnext import _core, nn
from bnext import functional as F
from cases import DTYPES, HALF_DTYPES, dtype_name, parameter_dtype
from gradcheck import gradcheck

F32, F64 = np.float32, np.float64


def normal(shape, dtype=F32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def scaled(x, kept, factor):
    """x times `factor`, in float32 at least, where it is kept, 0 elsewhere; rounded once."""
    computed = x.astype(parameter_dtype(x.dtype))
    return np.where(kept, computed * computed.dtype.type(factor), 0).astype(x.dtype)


def near(actual, expected, units):
    """Within `units` roundings of float32 or float64, and one of what is stored."""
    dtype = actual.dtype
    eps = units * np.finfo(parameter_dtype(dtype)).eps
    if dtype in HALF_DTYPES:
        eps += float(ml_dtypes.finfo(dtype).eps) / 2
    error = abs(reference.wide(actual) - expected)
    assert (error <= eps * (4 + abs(expected))).all()


def within_binomial(successes, count, p, chance=1e-9):
    """Whether neither tail of the exact binomial distribution is below `chance`."""

    def log_mass(k):
        choose = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        return choose + k * math.log(p) + (count - k) * math.log1p(-p)

    below = math.fsum(math.exp(log_mass(k)) for k in range(successes + 1))
    above = math.fsum(math.exp(log_mass(k)) for k in range(successes, count + 1))
    return below > chance and above > chance


# -- masks that are broadcast ----------------------------------------------------------------------

# Runs, units, repeats and samples of every size against the kernels' batches of 256 and 512, and
# with and without each of the four.
MASK_SHAPES = [
    ((3, 5, 7, 7), (3, 5, 1, 1)),
    ((3, 5, 300), (3, 5, 1)),
    ((4, 6, 6, 3), (4, 1, 1, 3)),
    ((12, 9, 10, 130), (12, 1, 1, 130)),
    ((2, 40, 50, 3), (2, 1, 1, 3)),
    ((3, 30, 700), (3, 1, 700)),
    ((700, 3), (700, 1)),
    ((3, 40001), (3, 1)),
    ((3000, 2, 2), (3000, 2, 1)),
    ((9, 5, 4, 3), (1, 5, 4, 3)),
    ((9, 50, 14, 13), (1, 50, 1, 1)),
    ((4, 1000, 2), (1, 1000, 1)),
    ((5, 7, 3, 6), (5, 1, 3, 1)),
    ((5, 7, 1, 6), (5, 1, 1, 1)),
    ((4, 5), (1, 1)),
    ((1, 1, 5), (1, 1, 5)),
    ((1, 1), (1, 1)),
    ((7,), (1,)),
    ((), ()),
]
mask_shapes = pytest.mark.parametrize(("shape", "mask_shape"), MASK_SHAPES, ids=str)


@mask_shapes
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)
def test_broadcast_mask(backend, shape, mask_shape, dtype):
    x = normal(shape, dtype)
    for p in (0.3, 1 / 3, 1, 0):
        y, saved = F.dropout_forward(x, p, mask_shape=mask_shape, generator=bnext.Generator(3))
        bits = reference.dropout_bits(math.prod(mask_shape), 3, 0).reshape(mask_shape)
        kept = bits >= np.uint64(round(p * 2**32))
        assert saved.mask_shape == mask_shape
        assert np.array_equal(F.dropout_mask(saved.seed, saved.offset, mask_shape, p), kept)
        expected = scaled(x, kept, 0 if p == 1 else 1 / (1 - p))
        assert np.array_equal(y, expected)
        assert np.array_equal(F.dropout_backward(x, saved), expected)

        y, saved = F.alpha_dropout_forward(
            x, p, mask_shape=mask_shape, generator=bnext.Generator(3)
        )
        kept = np.broadcast_to(kept, shape)
        expected = reference.alpha_dropout(x, kept, p)
        near(y, expected, 4)
        # Linear: what forward does to differences, backward does to gradients.
        shift = reference.alpha_dropout(np.zeros_like(x), kept, p)
        near(F.dropout_backward(x, saved), expected - shift, 4)


def test_broadcast_mask_does_not_depend_on_threads(restore_threads):
    cases = [((60, 33, 14, 13), (60, 33, 1, 1)), ((60, 13, 14, 33), (60, 1, 1, 33))]
    for shape, mask_shape in cases:
        x, results = normal(shape), []
        for threads in (1, 2, 3, 8):
            bnext.set_num_threads(threads)
            y, _ = F.dropout_forward(x, mask_shape=mask_shape, generator=bnext.Generator(1))
            results.append(y.tobytes())
        assert len(set(results)) == 1


@pytest.mark.parametrize(
    "mask_shape", [(2, 3), (2, 3, 4, 4), (2, 1, 5), (1, 3, 1, 5, 1), (1, 3, 0, 5), ()]
)
@pytest.mark.parametrize("forward", [F.dropout_forward, F.alpha_dropout_forward])
def test_mask_shapes_that_do_not_fit(forward, mask_shape):
    generator = bnext.Generator(1)
    with pytest.raises(ValueError, match="dropout_forward: mask_shape: expected"):
        forward(normal((2, 3, 4, 5)), mask_shape=mask_shape, generator=generator)
    assert generator.state["offset"] == 0


def test_shared_axes_in_three_groups():
    x = normal((2, 3, 2, 3, 2, 3))
    with pytest.raises(ValueError, match=r"in at most two groups of neighbours, got \(1, 3, 1"):
        F.dropout_forward(x, mask_shape=(1, 3, 1, 3, 1, 3))
    with pytest.raises(TypeError, match="mask_shape: expected a tuple of integers, got 'no'"):
        F.dropout_forward(x, mask_shape="no")


# -- masks to look at ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 2**64 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 1])
def test_mask_is_the_definition(seed, offset, p):
    for size in (1, 31, 32, 33, 128, 10_000):
        kept = F.dropout_mask(seed, offset, (size,), p)
        bits = reference.dropout_bits(size, seed, offset)
        assert kept.dtype == bool
        assert np.array_equal(kept, bits >= np.uint64(round(p * 2**32)))


def test_mask_where_a_number_equals_the_threshold():
    bits = reference.dropout_bits(1 << 17, 7, 0)
    equal = int(bits[12345])
    for threshold in (equal, equal + 1):
        kept = F.dropout_mask(7, 0, bits.shape, threshold / 2**32)
        assert np.array_equal(kept, bits >= np.uint64(threshold))


def test_mask_of_a_part(restore_threads):
    whole = F.dropout_mask(3, 4, (100_000,), 0.4)
    for threads in (1, 3):
        bnext.set_num_threads(threads)
        for first in (0, 1, 127, 128, 50_001):
            for count in (0, 1, 130, 49_000):
                part = F.dropout_mask(3, 4, (count,), 0.4, first=first)
                assert np.array_equal(part, whole[first : first + count])


def test_mask_limits_and_alias():
    assert F.mask is F.dropout_mask
    assert F.mask(1, 0, (2, 3), 0).all()
    assert not F.mask(1, 0, (2, 3), 1).any()
    assert F.mask(1, 0, (2, 0, 3), 0.5).shape == (2, 0, 3)
    assert F.mask(1, 0, (), 0.5).shape == ()
    assert F.mask(1, 0, [4, 2], 0.5).shape == (4, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 0, (2,), 1.5), ValueError, r"dropout_mask: p: expected a probability in \[0, 1\]"),
        ((1, 0, (2,), "p"), TypeError, "dropout_mask: p: expected a number, got str"),
        ((1, 0, (-2,), 0.5), ValueError, r"shape: expected no negative extent, got \(-2,\)"),
        ((1, 0, 5, 0.5), TypeError, "shape: expected a tuple of integers, got 5"),
        ((1, 0, (1.5,), 0.5), TypeError, "shape: expected a tuple of integers"),
        ((-1, 0, (2,), 0.5), ValueError, r"dropout_mask: seed: expected 0 <= seed < 2\*\*64"),
        ((1, 2**64, (2,), 0.5), ValueError, "offset: expected 0 <= offset"),
        (("a", 0, (2,), 0.5), TypeError, "seed: expected an integer, got str"),
    ],
)
def test_bad_masks(arguments, error, message):
    with pytest.raises(error, match=message):
        F.dropout_mask(*arguments)


# -- what holds for every member -------------------------------------------------------------------

# name: forward, backward, its layer
MEMBERS = {
    "dropout": (F.dropout_forward, F.dropout_backward, nn.Dropout),
    "channel": (F.channel_dropout_forward, F.channel_dropout_backward, nn.Dropout2d),
    "drop path": (F.drop_path_forward, F.drop_path_backward, nn.DropPath),
    "alpha": (F.alpha_dropout_forward, F.alpha_dropout_backward, nn.AlphaDropout),
    "feature alpha": (
        F.feature_alpha_dropout_forward,
        F.feature_alpha_dropout_backward,
        nn.FeatureAlphaDropout,
    ),
    "gaussian": (F.gaussian_dropout_forward, F.gaussian_dropout_backward, nn.GaussianDropout),
    "drop block": (F.drop_block2d_forward, F.drop_block2d_backward, nn.DropBlock2d),
}
members = pytest.mark.parametrize(
    ("forward", "backward", "layer"), MEMBERS.values(), ids=list(MEMBERS)
)
SHAPE = (6, 9, 11, 13)


def shown(name, saved, p):
    """The mask or noise that the functions to look at them show, broadcast to SHAPE."""
    where = (saved.seed, saved.offset)
    return {
        "dropout": lambda: F.dropout_mask(*where, SHAPE, p),
        "channel": lambda: F.channel_dropout_mask(*where, SHAPE, p),
        "drop path": lambda: F.drop_path_mask(*where, SHAPE, p),
        "alpha": lambda: F.dropout_mask(*where, SHAPE, p),
        "feature alpha": lambda: F.channel_dropout_mask(*where, SHAPE, p),
        "gaussian": lambda: F.gaussian_dropout_noise(*where, SHAPE, p),
        "drop block": lambda: F.drop_block2d_mask(*where, SHAPE, p),
    }[name]()


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)
def test_masks_shown_are_those_used(name, dtype):
    forward, backward, _ = MEMBERS[name]
    x, p = normal(SHAPE, dtype), 0.4
    y, saved = forward(x, p, generator=bnext.Generator(7))
    grad_x = backward(x, saved)
    assert (y.dtype, grad_x.dtype) == (dtype, dtype)
    factors = shown(name, saved, p)
    if "alpha" in name:
        near(y, reference.alpha_dropout(x, np.broadcast_to(factors, SHAPE), p), 8)
        assert np.array_equal(grad_x != 0, np.broadcast_to(factors, SHAPE))
        return
    if name == "gaussian":
        expected = (x * factors).astype(dtype)
    else:
        ratio = factors.size / factors.sum() if name == "drop block" else 1 / (1 - p)
        expected = scaled(x, factors, ratio)
    assert np.array_equal(y, expected)
    assert np.array_equal(grad_x, expected)
    assert F64(factors).std() > 0


@members
def test_mask_depends_on_the_generator_alone(forward, backward, layer, restore_threads):
    x = normal((20, 9, 31, 37), F64)  # over 2^17 elements: three sequences of Gaussian noise
    generator = bnext.Generator(5)
    generator.state = {"seed": 2**64 - 1, "offset": 2**40}
    state, results, narrow = generator.state, [], []
    for threads in (1, 2, 3):
        bnext.set_num_threads(threads)
        generator.state = state
        y, saved = forward(x, 0.3, generator=generator)
        assert (saved.seed, saved.offset) == (state["seed"], state["offset"])
        assert generator.state == {**state, "offset": 2**40 + 1}
        results += [y.tobytes(), forward(x, 0.3, generator=generator)[0].tobytes()]
        narrow.append(backward(x.astype(F32), saved))
    assert results[:2] * 3 == results
    assert results[0] != results[1]
    # The same factors for another dtype.
    np.testing.assert_allclose(narrow[0], backward(x, saved), rtol=1e-6)
    bnext.manual_seed(state["seed"])
    bnext.random.default_generator.state = state
    assert forward(x, 0.3)[0].tobytes() == results[0]


@members
def test_limits_of_p(forward, backward, layer):
    generator = bnext.Generator(1)
    for value in (1.0, np.nan, np.inf):
        x = np.full((3, 4, 5, 5), value, F32)
        y, saved = forward(x, 0, generator=generator)
        assert y is not x
        assert np.array_equal(y, x, equal_nan=True)
        assert np.array_equal(backward(x, saved), x, equal_nan=True)
        assert generator.state["offset"] == 0
        if layer is not nn.GaussianDropout:
            y, saved = forward(x, 1, generator=bnext.Generator(1))
            assert (y == 0).all()
            assert (backward(x, saved) == 0).all()
    if layer is nn.GaussianDropout:
        calls = (
            lambda: forward(x, 1),
            lambda: layer(1),
            lambda: F.gaussian_dropout_noise(0, 0, (1,), 1),
        )
        for call in calls:
            with pytest.raises(ValueError, match=r"p: expected a .* in \[0, 1\), got 1"):
                call()


@members
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_is_left_of_what_is_dropped(forward, backward, layer, bad):
    x = np.ones((6, 5, 12, 12), F32)
    y, saved = forward(x, 0.5, generator=bnext.Generator(4))
    worse, _ = forward(np.full_like(x, bad), 0.5, generator=bnext.Generator(4))
    if layer is nn.GaussianDropout:
        assert not np.isfinite(worse).any()
        return
    dropped = y == y.min()
    assert 0 < dropped.sum() < y.size
    assert np.array_equal(worse[dropped], y[dropped])
    assert not np.isfinite(worse[~dropped]).any()
    assert (backward(np.full_like(x, bad), saved)[dropped] == 0).all()


@members
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (1, 1, 1, 1)], ids=str)
def test_small_and_empty(forward, backward, layer, shape):
    x = np.ones(shape, F32)
    for p in (0, 0.5):
        y, saved = forward(x, p)
        assert y.shape == backward(x, saved).shape == shape


@members
def test_layouts_are_values(forward, backward, layer):
    x = normal(SHAPE)
    y, saved = forward(x, 0.3, generator=bnext.Generator(2))
    g = backward(x, saved)
    for layout in (np.asfortranarray(x), x.astype(">f4"), np.repeat(x, 2, 3)[..., ::2], x.tolist()):
        exact = np.asarray(layout)
        other, again = forward(layout, 0.3, generator=bnext.Generator(2))
        assert np.allclose(other, y, rtol=1e-6, atol=1e-6)
        assert np.allclose(backward(layout, again), g, rtol=1e-6, atol=1e-6)
        assert other.flags.c_contiguous
        assert other.dtype == exact.dtype.newbyteorder("=")


@members
def test_out(forward, backward, layer):
    x = normal(SHAPE)
    expected, saved = forward(x, 0.3, generator=bnext.Generator(2))
    grad = backward(x, saved)
    out = np.empty_like(x)
    assert forward(x, 0.3, generator=bnext.Generator(2), out=out)[0] is out
    assert np.array_equal(out, expected)
    assert backward(x, saved, out=out) is out
    assert np.array_equal(out, grad)
    for p in (0.3, 0):
        here = x.copy()
        assert forward(here, p, generator=bnext.Generator(2), out=here)[0] is here
        assert np.array_equal(here, expected if p else x)
    here = x.copy()
    assert backward(here, saved, out=here) is here
    assert np.array_equal(here, grad)


def overlapping():
    memory = np.zeros(math.prod(SHAPE) + 1, F32)
    return memory[:-1].reshape(SHAPE), memory[1:].reshape(SHAPE)


BAD = [
    (dict(p=-0.1), ValueError, r"p: expected a probability in \[0, 1\], got -0.1"),
    (dict(p=1.1), ValueError, r"p: expected a probability in \[0, 1\], got 1.1"),
    (dict(p=np.nan), ValueError, "p: expected a probability .*got nan"),
    (dict(p="half"), TypeError, "p: expected a number, got str"),
    (dict(x=np.ones(SHAPE, int)), TypeError, "x: expected dtype .*, got int64"),
    (dict(x=np.ma.masked_array(np.ones(SHAPE), np.ones(SHAPE))), TypeError, "x: .* masked array"),
    (dict(generator=7), TypeError, "generator: expected a bnext.Generator, got int"),
    (dict(out=np.ones(SHAPE[::-1], F32)), ValueError, r"out: expected shape \(6, 9, 11, 13\), got"),
    (dict(out=np.ones(SHAPE, F64)), TypeError, "out: expected dtype float32 like the data"),
    (dict(out=[1.0]), TypeError, "out: expected a NumPy array, got list"),
    (dict(out=np.broadcast_to(F32(1), SHAPE)), ValueError, "out: expected a writable array"),
    (dict(zip(("x", "out"), overlapping(), strict=True)), ValueError, "out: overlaps x in part"),
]


@members
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_calls(forward, backward, layer, arguments, error, message):
    generator = bnext.Generator(1)
    arguments = {"x": np.ones(SHAPE, F32), "p": 0.5, "generator": generator, **arguments}
    with pytest.raises(error, match=r"^\w+_forward: " + message):
        forward(**arguments)
    assert generator.state["offset"] == 0


@members
def test_bad_backward_calls(forward, backward, layer):
    x = np.ones(SHAPE, F32)
    _, saved = forward(x, 0.5)
    bad = [
        ((x[1:], saved), {}, ValueError, r"grad_y: expected shape \(6, 9, 11, 13\), got \(5,"),
        ((x, None), {}, TypeError, "saved: expected what .*_forward returned, got NoneType"),
        ((x.astype(int), saved), {}, TypeError, "grad_y: expected dtype .*, got int64"),
        ((x, saved), {"out": np.ones((2, 2), F32)}, ValueError, "out: expected shape"),
    ]
    for arguments, options, error, message in bad:
        with pytest.raises(error, match=r"^\w+_backward: " + message):
            backward(*arguments, **options)


# -- layers ----------------------------------------------------------------------------------------

# layer of a kind, an input for it
LAYERS = {
    "Dropout": (nn.Dropout(0.4), (4, 6, 5, 5)),
    "Dropout1d": (nn.Dropout1d(0.4), (4, 6, 5)),
    "Dropout2d": (nn.Dropout2d(0.4), (4, 6, 5, 5)),
    "Dropout2d, last": (nn.Dropout2d(0.4, channel_axis=-1), (4, 5, 5, 6)),
    "Dropout3d": (nn.Dropout3d(0.4), (4, 6, 2, 3, 4)),
    "DropPath": (nn.DropPath(0.4), (8, 6)),
    "AlphaDropout": (nn.AlphaDropout(0.4), (4, 30)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.4), (4, 6, 5)),
    "GaussianDropout": (nn.GaussianDropout(0.4), (4, 30)),
    "DropBlock2d": (nn.DropBlock2d(0.4, 3), (4, 3, 8, 8)),
}
layers = pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=list(LAYERS))


@layers
def test_layer_gradient(layer, shape):
    bnext.manual_seed(9)
    state = bnext.random.default_generator.state

    def before():
        bnext.random.default_generator.state = state

    gradcheck(layer, normal(shape, F64), before=before)


@layers
def test_layer_in_evaluation_is_the_identity(layer, shape):
    x = normal(shape)
    state = bnext.random.default_generator.state
    assert layer(x) is x
    layer.eval()
    y, backward = layer.forward(x)
    assert y is x
    assert backward(x) is x
    layer.train()
    layer.p, p = 0.0, layer.p
    y, backward = layer.forward(x)
    layer.p = p
    assert y is x
    assert bnext.random.default_generator.state == state


@layers
def test_layer_used_twice(layer, shape):
    x = normal(shape)
    (first, first_backward), (second, second_backward) = layer.forward(x), layer.forward(x)
    assert not np.array_equal(first, second)
    assert np.array_equal(first_backward(x), first_backward(x))
    assert not np.array_equal(first_backward(x), second_backward(x))


@layers
def test_layer_with_one_mask_for_all_samples(layer, shape):
    x = np.broadcast_to(normal(shape[1:]), shape)
    bnext.manual_seed(1)
    assert layer.consistent is False
    assert (layer.forward(x)[0] != layer.forward(x)[0][:1]).any()
    layer.consistent = True
    try:
        y, backward = layer.forward(x)
        bnext.manual_seed(1)
        alone, _ = layer.forward(x[:1])
        bnext.manual_seed(1)
        again, _ = layer.forward(x)
    finally:
        layer.consistent = False
    assert (y == y[:1]).all()
    assert (backward(x) == backward(x)[:1]).all()
    assert np.array_equal(again[:1], alone)


@pytest.mark.parametrize(
    ("layer", "shape", "expected", "advice"),
    [
        (nn.Dropout1d(), (8, 16), "(N, C, L)", ": use Dropout for (N, C), or x[None] for (C, L)"),
        (nn.Dropout1d(), (8, 16, 4, 4), "(N, C, L)", ": use Dropout2d for (N, C, H, W)"),
        (
            nn.Dropout2d(),
            (8, 16, 32),
            "(N, C, H, W)",
            ": use Dropout1d for (N, C, L), or x[None] for (C, H, W)",
        ),
        (
            nn.Dropout2d(channel_axis=-1),
            (8, 16, 32),
            "(N, H, W, C)",
            ": use Dropout1d for (N, L, C), or x[None] for (H, W, C)",
        ),
        (
            nn.Dropout3d(),
            (8, 16, 32, 5),
            "(N, C, D, H, W)",
            ": use Dropout2d for (N, C, H, W), or x[None] for (C, D, H, W)",
        ),
        (nn.Dropout2d(), (8,), "(N, C, H, W)", ""),
        (nn.DropBlock2d(), (8, 16, 32), "(N, C, H, W)", ""),
        (nn.DropPath(), (), "1 or more dimensions, (N, *)", ""),
        (nn.FeatureAlphaDropout(), (8,), "2 or more dimensions, (N, C, *) or (N, *, C)", ""),
    ],
    ids=str,
)
def test_ranks(layer, shape, expected, advice):
    nn.Sequential({"first": layer})
    message = f"expected {expected}, got shape {shape}{advice}"
    for run in (layer, layer.forward):
        with pytest.raises(ValueError, match=re.escape(message) + "$") as error:
            run(np.ones(shape, F32))
        assert str(error.value).startswith(f"{type(layer).__name__} 'first': ")


X = np.ones(SHAPE, F32)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Dropout3d(2), ValueError, r"Dropout3d: p: expected .* in \[0, 1\], got 2"),
        (lambda: nn.DropPath("a"), TypeError, "DropPath: p: expected a number, got str"),
        (lambda: nn.Dropout1d(channel_axis=2), ValueError, "channel_axis: expected 1 or -1, got 2"),
        (lambda: nn.GaussianDropout(1), ValueError, r"GaussianDropout: p: .* in \[0, 1\)"),
        (lambda: nn.DropBlock2d(block_size=0), ValueError, "DropBlock2d: block_size: expected 1"),
        (lambda: nn.DropBlock2d(block_size=2.5), TypeError, "block_size: .* integer, got 2.5"),
        (lambda: F.channel_dropout_forward(X[0, 0, 0]), ValueError, "x: expected 2 or more dim"),
        (
            lambda: F.channel_dropout_forward(X, channel_axis=0),
            ValueError,
            "channel_axis: expected 1 or -1, got 0",
        ),
        (lambda: F.drop_path_forward(F32(3)), ValueError, r"drop_path_forward: x: .*shape \(\)"),
        (lambda: F.drop_block2d_forward(X[0]), ValueError, r"x: expected \(N, C, H, W\), got"),
        (lambda: F.drop_block2d_forward(X, 0.1, 0), ValueError, "block_size: .* 1 or more, got 0"),
        (lambda: F.drop_block2d_forward(X, 0.1, "a"), TypeError, "block_size: .* integer, got 'a'"),
        (
            lambda: F.drop_block2d_forward(X, mask_shape=(6, 9, 1, 1)),
            ValueError,
            r"mask_shape: expected \(6, 9, 11, 13\) or \(1, 9, 11, 13\), got \(6, 9, 1, 1\)",
        ),
        (
            lambda: F.gaussian_dropout_forward(X, mask_shape=(6, 2, 1, 1)),
            ValueError,
            "mask_shape: expected the extents",
        ),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


@members
def test_p_may_be_an_array_of_one_number(forward, backward, layer):
    ys = [forward(X, p, generator=bnext.Generator(1))[0] for p in (0.5, np.array(0.5))]
    np.testing.assert_array_equal(*ys)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Dropout1d(0.1), "Dropout1d(p=0.1)"),
        (nn.Dropout3d(0.1, channel_axis=-1), "Dropout3d(p=0.1, channel_axis=-1)"),
        (nn.DropPath(0.2), "DropPath(p=0.2)"),
        (nn.DropBlock2d(), "DropBlock2d(p=0.1, block_size=7)"),
        (nn.FeatureAlphaDropout(), "FeatureAlphaDropout(p=0.5)"),
    ],
)
def test_repr(layer, text):
    assert repr(layer) == text


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5, 0.9])
def test_share_of_channels_and_samples(p):
    x = np.ones((500, 16, 2, 2), F32)
    y, _ = F.channel_dropout_forward(x, p, generator=bnext.Generator(11))
    assert within_binomial(int((y[:, :, 0, 0] == 0).sum()), 8000, p)
    y, _ = F.channel_dropout_forward(x, p, channel_axis=-1, generator=bnext.Generator(11))
    assert within_binomial(int((y[:, 0, 0] == 0).sum()), 1000, p)
    y, _ = F.drop_path_forward(np.ones((5000, 3), F32), p, generator=bnext.Generator(11))
    assert within_binomial(int((y[:, 0] == 0).sum()), 5000, p)
    assert not within_binomial(round(5000 * p / 2), 5000, p)  # the bound can fail


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8])
def test_alpha_keeps_mean_and_variance(p):
    x = normal((1000, 1000))
    y, _ = F.alpha_dropout_forward(x, p, generator=bnext.Generator(6))
    # Five standard errors; the fourth moment of y stays below 40.
    assert abs(y.mean(dtype=F64)) < 5e-3
    assert abs(y.var(dtype=F64) - 1) < 5 * math.sqrt(40 / x.size)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_gaussian_noise_is_normal(p):
    noise = F.gaussian_dropout_noise(3, 1, (1 << 20,), p).astype(F64)
    z = (noise - 1) / math.sqrt(p / (1 - p))
    root = math.sqrt(z.size)
    for moment, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**moment).mean() - value) < 5 * math.sqrt(variance) / root
    for distance in (1, 64, 128, 256):
        assert abs((z[distance:] * z[:-distance]).mean()) < 5 / math.sqrt(z.size - distance)


@pytest.mark.parametrize("seed", [0, 3, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 2**64 - 1])
def test_gaussian_noise_is_the_definition(seed, offset):
    noise = F.gaussian_dropout_noise(seed, offset, (60_001,), 0.5)
    # Where the radius is small, float32 leaves it a resolution of 2e-5.
    np.testing.assert_allclose(
        noise, reference.gaussian_noise(noise.size, 0.5, seed, offset), rtol=1e-6, atol=2e-5
    )


def test_gaussian_noise_of_a_part(restore_threads):
    whole = F.gaussian_dropout_noise(3, 1, (100_000,), 0.4)
    for threads in (1, 3):
        bnext.set_num_threads(threads)
        for first in (0, 1, 255, 256, 50_001):
            for count in (0, 1, 300, 49_000):
                part = F.gaussian_dropout_noise(3, 1, (count,), 0.4, first=first)
                assert np.array_equal(part, whole[first : first + count])
    assert F.gaussian_dropout_noise(3, 1, (), 0.5).shape == ()
    assert (F.gaussian_dropout_noise(3, 1, (2, 3), 0) == 1).all()
    with pytest.raises(ValueError, match=r"gaussian_dropout_noise: shape: .* got \(-1,\)"):
        F.gaussian_dropout_noise(3, 1, (-1,), 0.5)


# -- DropBlock -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(3, 4, 9, 14), (2, 3, 1, 1), (2, 5, 3, 30), (30, 50, 7, 7)], ids=str
)
@pytest.mark.parametrize("block_size", [1, 2, 3, 7])
@pytest.mark.parametrize("p", [0, 0.1, 0.9, 1])
def test_blocks(shape, block_size, p):
    kept = F.drop_block2d_mask(4, 5, shape, p, block_size)
    assert np.array_equal(kept, reference.drop_block2d_kept(shape, p, block_size, 4, 5))
    x = normal(shape)
    generator = bnext.Generator(4)
    generator.state = {"seed": 4, "offset": 5}
    y, _ = F.drop_block2d_forward(x, p, block_size, generator=generator)
    ratio = kept.size / kept.sum() if kept.any() else 0
    assert np.array_equal(y, np.where(kept, x * F32(ratio), 0))


def test_share_that_blocks_drop():
    """A pixel is dropped unless none of the blocks that can cover it begins."""
    kept = F.drop_block2d_mask(1, 0, (64, 64, 56, 56), 0.1, 7)
    along_an_axis = np.convolve(np.ones(50), np.ones(7))
    rate = 0.1 * 56**2 / (7**2 * 50**2)
    share = 1 - ((1 - rate) ** np.outer(along_an_axis, along_an_axis)).mean()
    assert round(share, 4) == 0.0946
    assert 1 - kept.mean() == pytest.approx(share, abs=0.0005)
    # With blocks of one element it is plain dropout.
    kept = F.drop_block2d_mask(1, 0, (2, 3, 20, 20), 0.3, 1)
    assert np.array_equal(kept, F.dropout_mask(1, 0, (2, 3, 20, 20), 0.3))


# -- after fork ------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@members
def test_after_fork(forward, backward, layer):
    x = normal((20, 9, 31, 37))
    y, _ = forward(x, 0.3, generator=bnext.Generator(1))
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(forward(x, 0.3, generator=bnext.Generator(1))[0], y) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("feature", [False, True])
def test_alpha_is_that_of_pytorch(p, feature):
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    x = normal((50, 8, 4, 4), F64)
    name = "feature_alpha_dropout" if feature else "alpha_dropout"
    tensor = torch.from_numpy(x).requires_grad_()
    theirs = getattr(torch.nn.functional, name)(tensor, p, training=True)
    theirs.sum().backward()
    kept = tensor.grad.numpy() != 0
    np.testing.assert_allclose(
        theirs.detach().numpy(), reference.alpha_dropout(x, kept, p).astype(F64), atol=1e-12
    )
    forward = getattr(F, f"{name}_forward")
    y, saved = forward(x, p, generator=bnext.Generator(1))
    mask = F.channel_dropout_mask if feature else F.dropout_mask
    ours = np.broadcast_to(mask(saved.seed, saved.offset, x.shape, p), x.shape)
    np.testing.assert_allclose(y, reference.alpha_dropout(x, ours, p).astype(F64), atol=1e-12)
    grad = F.dropout_backward(np.ones_like(x), saved)
    assert grad.max() == pytest.approx(float(tensor.grad.max()), rel=1e-14)
    ones = torch.ones(3, 2, dtype=torch.float64)
    assert (getattr(torch.nn.functional, name)(ones, 1.0, training=True) == 0).all()


@pytest.mark.parametrize("block_size", [1, 3, 5])
def test_blocks_are_those_of_torchvision(block_size):
    """torchvision's ops.drop_block2d, step by step, from the same places where blocks begin."""
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    n, c, h, w = shape = (4, 3, 12, 9)
    p, half = 0.2, block_size // 2
    rows, columns = h - block_size + 1, w - block_size + 1
    gamma = (p * h * w) / ((block_size**2) * (rows * columns))
    noise = torch.from_numpy(~F.dropout_mask(4, 0, (n, c, rows, columns), gamma)).double()
    noise = torch.nn.functional.pad(noise, [half] * 4, value=0)
    noise = 1 - torch.nn.functional.max_pool2d(
        noise, stride=(1, 1), kernel_size=(block_size, block_size), padding=half
    )
    x = normal(shape, F64)
    expected = torch.from_numpy(x) * noise * (noise.numel() / noise.sum())
    y, _ = F.drop_block2d_forward(x, p, block_size, generator=bnext.Generator(4))
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-14)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("Dropout1d", (40, 50, 3)), ("Dropout2d", (40, 50, 2, 2)), ("Dropout3d", (40, 50, 2, 2, 2))],
)
def test_channels_are_dropped_as_by_pytorch(kind, shape):
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    x = np.ones(shape, F32)
    theirs = getattr(torch.nn, kind)(0.3)(torch.from_numpy(x)).numpy()
    ours, _ = getattr(nn, kind)(0.3, generator=bnext.Generator(1)).forward(x)
    for y in (ours, theirs):
        first = y.reshape(*shape[:2], -1)[:, :, :1]
        assert (y.reshape(*shape[:2], -1) == first).all()
        assert within_binomial(int((first == 0).sum()), 2000, 0.3)
    np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-7)


# -- MC dropout ------------------------------------------------------------------------------------


def network():
    bnext.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm(8, activation="relu"),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(8 * 16, 6),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)),
    )
    for seed in range(3):  # running statistics that differ from those of a batch
        model.forward(2 + normal((16, 2, 4, 4), seed=seed))
    return model


def test_mc_dropout_is_mean_and_deviation_of_passes():
    model, x = network(), normal((5, 2, 4, 4))
    mean, std = bnext.mc_dropout(model, x, 7, generator=bnext.Generator(3))
    model.eval()
    generator = bnext.Generator(3)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.training, layer.generator = True, generator
    passes = np.stack([model.forward(x)[0] for _ in range(7)]).astype(F64)
    np.testing.assert_allclose(mean, passes.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, passes.std(0), rtol=1e-6)
    assert mean.dtype == std.dtype == F32
    assert (std > 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_mc_dropout_leaves_the_model_as_it_was(training):
    model, x = network(), normal((5, 2, 4, 4))
    own = bnext.Generator(4)
    model.train(training)
    model[1].training = not training
    model[2].generator = own
    state = {key: value.copy() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    expected = model(x)
    bnext.mc_dropout(model, x, 3, consistent=True, generator=bnext.Generator(1))
    with pytest.raises(ValueError, match="channels"):
        bnext.mc_dropout(model, x[:, :1], 3, consistent=True, generator=bnext.Generator(1))
    assert all(np.array_equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert np.array_equal(model(x), expected)
    assert (model[2].generator, model[2].consistent) == (own, False)
    assert own.state["offset"] == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mc_dropout_repeats_with_a_generator():
    model, x = network(), normal((5, 2, 4, 4))
    first = bnext.mc_dropout(model, x, 4, generator=bnext.Generator(1))
    again = bnext.mc_dropout(model, x, 4, generator=bnext.Generator(1))
    other = bnext.mc_dropout(model, x, 4, generator=bnext.Generator(2))
    assert np.array_equal(first.mean, again.mean)
    assert np.array_equal(first.std, again.std)
    assert not np.array_equal(first.mean, other.mean)
    bnext.manual_seed(1)
    assert np.array_equal(bnext.mc_dropout(model, x, 4).mean, first.mean)


def test_mc_dropout_consistent():
    model = network()
    x = np.repeat(normal((1, 2, 4, 4)), 5, 0)
    mean, std = bnext.mc_dropout(model, x, 4, generator=bnext.Generator(1))
    assert (mean != mean[:1]).any()
    mean, std = bnext.mc_dropout(model, x, 4, consistent=True, generator=bnext.Generator(1))
    # Products of matrices may round rows of a batch differently.
    np.testing.assert_allclose(mean, np.broadcast_to(mean[:1], mean.shape), rtol=1e-5)
    assert (std > 0).any()
    # Batches of another size get the same masks.
    alone, _ = bnext.mc_dropout(model, x[:1], 4, consistent=True, generator=bnext.Generator(1))
    np.testing.assert_allclose(alone, mean[:1], rtol=1e-5)


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
def test_mc_dropout_of_batch_norm(consistent, tracked):
    """Its dropout is on, and it still normalizes as in evaluation."""
    norm = nn.BatchNorm(
        3, activation="relu", dropout=0.4, track_running_stats=tracked, ghost_batch_size=2
    )
    model, x = nn.Sequential(nn.Linear(4, 3), norm, nn.Linear(3, 3)), normal((8, 4))
    model.forward(normal((8, 4), seed=2))
    before = {key: value.copy() for key, value in model.state_dict().items()}
    mean, std = bnext.mc_dropout(model, x, 6, consistent=consistent, generator=bnext.Generator(3))
    full, generator = norm(model[0](x)), bnext.Generator(3)
    shape = (1, 3) if consistent else (8, 3)
    passes = [
        model[2](F.dropout_forward(full, 0.4, mask_shape=shape, generator=generator)[0])
        for _ in range(6)
    ]
    np.testing.assert_allclose(mean, np.mean(passes, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, np.std(passes, 0), rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(value, before[key]) for key, value in model.state_dict().items())
    assert (norm.training, norm.consistent, norm.generator) == (True, False, None)
    np.testing.assert_array_equal(norm.eval().forward(model[0](x))[0], full)


def test_mc_dropout_approaches_evaluation():
    """Of a linear function of what is dropped, the mean is that of evaluation."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 2, dtype=F64))
    x = normal((3, 20), F64)
    count = 4000
    mean, std = bnext.mc_dropout(model, x, count, generator=bnext.Generator(1))
    assert (abs(mean - model(x)) < 5 * std / math.sqrt(count)).all()
    # Var of sum w x b / (1 - p) = p / (1 - p) sum (w x)^2.
    expected = np.sqrt(np.square(x) @ np.square(model[1].weight.data.T))
    np.testing.assert_allclose(std, expected, rtol=0.1)


def test_mc_dropout_options():
    model, x = network(), normal((5, 2, 4, 4))
    mean, std = bnext.mc_dropout(model, x, 1)
    assert (std == 0).all()

    def share(y):
        e = np.exp(y - y.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    mean, _ = bnext.mc_dropout(model, x, 4, transform=share)
    np.testing.assert_allclose(mean.sum(1), 1, rtol=1e-6)
    votes, _ = bnext.mc_dropout(model, x, 4, transform=lambda y: y.argmax(1) == 0)
    assert votes.dtype == F64
    assert set(votes * 4) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.ReLU(), np.ones(3)), ValueError, "model: expected a dropout layer .* found none"),
        ((nn.Dropout(0), np.ones(3)), ValueError, "model: expected a dropout layer with p > 0"),
        ((np.tanh, np.ones(3)), TypeError, "model: expected a Module, got ufunc"),
        ((nn.Dropout(), np.ones(3), 0), ValueError, "samples: expected 1 or more, got 0"),
        ((nn.Dropout(), np.ones(3), 1.5), TypeError, "samples: expected an integer, got 1.5"),
    ],
)
def test_bad_mc_dropout(arguments, error, message):
    with pytest.raises(error, match=f"^mc_dropout: {message}"):
        bnext.mc_dropout(*arguments)


def test_core_prepares_for_operations_in_python():
    x = normal((3, 4))
    same, y = _core.prepare("op", "x", x, None)
    assert same is x
    assert y.shape == x.shape
    with pytest.raises(TypeError, match=r"^op: grad_y: expected dtype"):
        _core.prepare("op", "grad_y", x.astype(int), None)
