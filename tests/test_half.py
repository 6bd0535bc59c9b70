"""float16 and bfloat16: every value in and out, and what layers do with them."""

import copy
import itertools
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import bnext
import reference
from bnext import _dtypes, nn
from bnext import functional as F
from cases import ACTIVATIONS, DTYPES, HALF_DTYPES, TOLERANCE, data, dtype_name
from test_dropout_family import LAYERS as DROPOUT_LAYERS

halves = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)


@pytest.fixture(autouse=True)
def _quiet():
    """NumPy warns of the NaN and the overflow that are here on purpose."""
    with np.errstate(all="ignore"):
        yield


# -- conversions -----------------------------------------------------------------------
def every_value(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def rounded(values, dtype):
    """To nearest, ties to even: what NumPy and ml_dtypes do."""
    return values.astype(dtype)


def between(dtype):
    """float32: the middle of every two neighbours, and the numbers next to it on either side."""
    finite = np.unique(every_value(dtype)[np.isfinite(every_value(dtype))].astype(np.float32))
    middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    ends = np.float32([np.inf, np.finfo(np.float32).max, ml_dtypes.finfo(dtype).max])
    limit = finite[-1] + (finite[-1] - finite[-2]) / 2  # from here on it is infinity
    middle = np.concatenate([middle, ends, [limit, -limit], -ends])
    above, below = (np.nextafter(middle, np.float32(end)) for end in (np.inf, -np.inf))
    return np.concatenate([middle, above, below])


# Rows and columns with a rest: each loads and stores in its own way.
LAYOUTS = {"row": (1, 1, -1), "short rows": (2048, 1, 32), "columns": (2, -1), "column": (-1, 1)}


@halves
@pytest.mark.parametrize("layout", LAYOUTS)
# Exact, ties, subnormal results with ties, overflow.
@pytest.mark.parametrize("scale", [1, 1.5, 0.5, 2.0**-12, 2.0**-125, 3, -65504, 2.0**120])
def test_every_value_in_and_rounded_out(backend, dtype, layout, scale):
    x = every_value(dtype).reshape(LAYOUTS[layout])
    if layout == "columns":
        x = np.concatenate([x, x[:, :5]], axis=1)
    channels = x.shape[1]
    zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    y = F.batch_norm_inference(x, zeros, ones, ones * np.float32(scale), eps=0)
    expected = rounded(x.astype(np.float32) * np.float32(scale), dtype)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))
    if scale == 1:
        np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))
    elif scale == 1.5:
        assert (y.astype(np.float64) != x.astype(np.float64) * 1.5).mean() > 0.2


@halves
@pytest.mark.parametrize("shape", [(1, -1), (64, -1), (1, -1, 64)], ids=str)
def test_rounding_next_to_every_tie(backend, dtype, shape):
    """From the bias, which may be any float32."""
    bias = between(dtype)
    if len(shape) == 3 or shape[0] > 1:
        bias = bias[::16]
    x = np.zeros([len(bias) if size == -1 else size for size in shape], dtype)
    zeros, ones = np.zeros_like(bias), np.ones_like(bias)
    y = F.batch_norm_inference(x, zeros, ones, None, bias, eps=0)
    expected = rounded(bias, dtype).astype(np.float32)
    y = np.moveaxis(y.astype(np.float32), 1, -1)
    np.testing.assert_array_equal(y, np.broadcast_to(expected, y.shape))


@halves
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], ids=hex)
def test_every_nan_of_a_parameter_stays_one(backend, dtype, layout, bits):
    """Rounded as a number it would be infinite, or 0."""
    x = np.ones([33 if size == -1 else size for size in LAYOUTS[layout]], dtype)
    ones = np.ones(x.shape[1], np.float32)
    nan = np.full(x.shape[1], bits, np.uint32).view(np.float32)
    for parameters in ((nan, ones, ones), (ones, nan, ones), (ones, ones, nan)):
        y = F.batch_norm_inference(x, parameters[0], ones, *parameters[1:], eps=0)
        assert np.isnan(y.astype(np.float32)).all()
    _, saved = F.batch_norm_forward(x, nan)
    assert np.isnan(F.batch_norm_backward(x, saved).x.astype(np.float32)).all()


@halves
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_nan_of_the_data_stays_one(backend, dtype, activation):
    infinity = np.array(np.inf, dtype).view(np.uint16)
    nan = np.arange(infinity + 1, 0x8000, dtype=np.uint16)
    x = np.ones((2, 2, 2 * len(nan)), dtype)
    x[0, 1] = np.concatenate([nan, nan | 0x8000]).view(dtype)
    is_nan = np.isnan(x.astype(np.float32))
    numbers, zeros, ones = np.ones_like(x), np.zeros(2, np.float32), np.ones(2, np.float32)
    for values, residual in ((x, None), (numbers, x)):
        y = F.batch_norm_inference(values, zeros, ones, activation=activation, residual=residual)
        np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), is_nan)
    _, saved = F.batch_norm_forward(numbers, None, ones, activation=activation)
    grad_x = F.batch_norm_backward(x, saved).x.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(grad_x).any((0, 2)), [False, True])


@halves
def test_dropout_copies_every_value(backend, dtype):
    x = every_value(dtype)
    y, saved = F.dropout_forward(x, 0)
    for result in (y, F.dropout_backward(x, saved)):
        np.testing.assert_array_equal(result.view(np.uint16), x.view(np.uint16))
    y, _ = F.dropout_forward(x, 0.25, generator=bnext.Generator(2))
    expected = rounded(reference.dropout(x.astype(np.float32), 0.25, 2, 0), dtype)
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))


# -- what goes with what ---------------------------------------------------------------
def test_the_list_of_dtypes_is_that_of_the_core():
    with pytest.raises(TypeError, match=f"expected dtype {_dtypes.NAMES}, got int64"):
        F.dropout_forward([1])
    for dtype in map(np.dtype, DTYPES + HALF_DTYPES):
        _, saved = F.batch_norm_forward(data((4, 3), dtype=dtype))
        assert saved.mean.dtype == _dtypes.parameter_dtype(dtype)
        assert _dtypes.is_half(dtype) == (dtype in HALF_DTYPES)


def test_importing_bnext_imports_no_dtypes():
    code = "import sys, bnext; print('ml_dtypes' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


OTHER = [
    (np.float64, np.float32),
    (np.float32, np.float64),
    *itertools.product(HALF_DTYPES, [np.float64]),
]


@pytest.mark.parametrize(("dtype", "parameters"), OTHER, ids=dtype_name)
@pytest.mark.parametrize("options", [{}, {"channel_mask": [True, False, True]}], ids=str)
def test_a_layer_of_another_dtype_is_refused(dtype, parameters, options):
    norm, x = nn.BatchNorm(3, dtype=parameters, **options), data((4, 3, 5), dtype=dtype)
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    for run in (norm, norm.forward):
        with pytest.raises(TypeError, match=r"BatchNorm: x: expected dtype .* like the layer"):
            run(x)
    assert all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())


@halves
@pytest.mark.parametrize("options", [{}, {"channel_mask": [True, False, True]}], ids=str)
def test_residual_and_gradient_of_another_dtype_are_refused(dtype, options):
    x = data((4, 3, 5), dtype=dtype)
    for other in (np.float32, *HALF_DTYPES):
        if other == dtype:
            continue
        with pytest.raises(TypeError, match=f"BatchNorm: residual: expected dtype {x.dtype}, got"):
            nn.BatchNorm(3, **options).forward(x, x.astype(other))
        _, backward = nn.BatchNorm(3, **options).forward(x)
        with pytest.raises(TypeError, match=f"grad_y: expected dtype {x.dtype} like the data, got"):
            backward(x.astype(other))


# -- layers ----------------------------------------------------------------------------
def layers():
    """Each with an input's shape and, if it has one, the generator that it draws from."""
    generator = bnext.Generator(4)
    drops = {"dropout": 0.3, "generator": generator}
    norms = {
        "plain": nn.BatchNorm(3),
        "evaluation": nn.BatchNorm(3, activation="silu").eval(),
        "frozen, dropout": nn.BatchNorm(3, activation="relu", **drops).freeze(affine=False),
        "channel mask, dropout": nn.BatchNorm(3, channel_mask=[True, False, True], **drops),
        "ghost batches": nn.BatchNorm(3, ghost_batch_size=3, **drops),
        "ghost batches, channel mask": nn.BatchNorm(
            3, ghost_batch_size=3, channel_mask=[True, False, True]
        ),
        "renormalized": nn.BatchRenorm(3, **drops),
        "banks": nn.BatchNorm(3, banks=("a", "b")).bank("b"),
        "own statistics": nn.BatchNorm(3, track_running_stats=False, affine=False),
        "input statistics": nn.InputStatistics(3),
        "residual": nn.Residual(nn.BatchNorm(3)),
        "residual, norm": nn.Residual(nn.ReLU(), norm=nn.BatchNorm(3, activation="gelu")),
    }
    all_layers = {name: (layer, (6, 3, 4, 5)) for name, layer in norms.items()}
    for name, (layer, shape) in copy.deepcopy(DROPOUT_LAYERS).items():
        layer.generator = generator
        all_layers[name] = layer, shape
    return generator, all_layers


GENERATOR, LAYERS = layers()


@halves
@pytest.mark.parametrize("case", LAYERS)
def test_layers_round_once(case, dtype):
    layer, shape = LAYERS[case]
    state = {key: value.copy() for key, value in layer.state_dict().items()}
    x, grad_y = data(shape, dtype=dtype), data(shape, dtype=dtype, seed=4)
    results = []
    for kind in (dtype, np.float32):
        layer.load_state_dict(state)
        layer.zero_grad()
        GENERATOR.state = {"seed": 4, "offset": 0}
        y, backward = layer.forward(x.astype(kind))
        grad_x = backward(grad_y.astype(kind))
        assert y.dtype == grad_x.dtype == layer(x.astype(kind)).dtype == kind
        owned = [*layer.state_dict().values(), *(p.grad for p in layer.parameters())]
        assert not any(array.dtype == dtype for array in owned)
        results.append((y, grad_x, layer(x.astype(kind)), owned))
    half, single = results
    # A block rounds the terms that it adds, and their sum.
    steps = 3 if "residual" in case else 1
    for result, wide in zip(half[:3], single[:3], strict=True):
        error = abs(reference.wide(result) - wide) / (1 + abs(wide.astype(np.float64)))
        assert error.max(initial=0) <= steps * TOLERANCE[result.dtype]
    for result, wide in zip(half[3], single[3], strict=True):
        np.testing.assert_allclose(result, wide, rtol=1e-5, atol=1e-5)


@halves
def test_models(dtype):
    """What works on whole models: re-estimation, folding, MC dropout."""
    model = nn.Sequential(nn.BatchNorm(3, activation="gelu"), nn.Dropout(0.3), nn.BatchNorm(3))
    x = data((8, 3, 5), dtype=dtype)
    bnext.reestimate(model, [x[:4], x[4:]])
    values = reference.wide(x)
    np.testing.assert_allclose(model[0].running_mean, values.mean((0, 2)).astype("f"), rtol=1e-6)
    mean, std = bnext.mc_dropout(model, x, 3)
    assert mean.dtype == std.dtype == dtype
    folded = bnext.fold(model.eval(), x)
    assert folded.error == 0
    assert set(folded.kept) == {"0", "2"}
    assert model(x).dtype == dtype


# -- sums ------------------------------------------------------------------------------
SUMMED = {
    "rows": ((8, 5, 40, 40), 1),
    "short rows": ((64, 5, 7, 7), 1),
    "channels-last": ((8, 40, 40, 5), -1),
    "(N, C)": ((4099, 5), 1),
}
# Of the standard deviation, and of the mean in units of it. Squares of 4e18 exceed float32 when a
# few are added, those of 1e-18 and 1e-22 are subnormal there.
MAGNITUDES = {
    np.dtype(np.float16): [(1, 0), (1, 1.5), (1, 30), (1, 1e3), (1e4, 0), (1e-6, 2)],
    np.dtype(ml_dtypes.bfloat16): [
        (1, 0), (1, 1.5), (1, 30), (4e18, 0), (4e18, 2), (1e-18, 0), (1e-18, 2), (1e-22, 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("layout", SUMMED)
@pytest.mark.parametrize(
    ("dtype", "size", "ratio"),
    [(dtype, *magnitude) for dtype, magnitudes in MAGNITUDES.items() for magnitude in magnitudes],
    ids=str,
)
def test_sums_of_halves_are_as_exact_as_those_of_float32(backend, dtype, size, ratio, layout):
    shape, channel_axis = SUMMED[layout]
    rng = np.random.default_rng(3)
    x = ((rng.normal(size=shape) + ratio) * size).astype(dtype)
    grad_y = (rng.normal(size=shape) + 0.5).astype(dtype)
    exact, g = x.astype(np.float64), grad_y.astype(np.float64)
    axes = tuple(axis for axis in range(x.ndim) if axis != channel_axis % x.ndim)
    mean, std = exact.mean(axes, keepdims=True), exact.std(axes, keepdims=True)
    normalized = (exact - mean) / std

    y, saved = F.batch_norm_forward(x, eps=0, channel_axis=channel_axis)
    ulp = np.spacing(np.abs(mean).ravel().astype(np.float32))
    assert (np.abs(saved.mean - mean.ravel()) <= 2 * ulp + 1e-10 * std.ravel()).all()
    representable = std.ravel() ** 2 > 2e-38
    np.testing.assert_allclose(saved.var, std.ravel() ** 2, rtol=2e-6 if representable.all() else 1)
    step = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(y.astype(np.float64), normalized, rtol=step, atol=step)

    ones = np.ones(len(saved.mean), np.float32)
    _, saved = F.batch_norm_forward(x, ones, ones, eps=0, channel_axis=channel_axis)
    grads = F.batch_norm_backward(grad_y, saved)
    for found, terms in [(grads.weight, g * normalized), (grads.bias, g)]:
        total = terms.sum(axes)
        bound = np.abs(np.spacing(found)) + 1e-7 * np.sqrt((terms**2).sum(axes))
        assert (np.abs(found - total) <= bound).all()
