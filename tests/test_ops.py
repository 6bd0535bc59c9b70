"""Every operation on every backend against the NumPy reference, and against itself."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnext
import reference
from bnext import _core
from bnext import functional as F
from cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    HALF_DTYPES,
    SHAPES,
    TOLERANCE,
    data,
    dtype_name,
    name_of,
    parameter_dtype,
    parameters,
    shapes,
    using,
)

cases = pytest.mark.parametrize("case", SHAPES, ids=name_of)
dtypes = pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)


def assert_close(actual, expected, unit=1.0):
    """|actual - expected| <= tolerance (unit + |expected|), where unit is the natural size."""
    assert actual.dtype in TOLERANCE
    error = np.abs(reference.wide(actual) - expected) / (unit + np.abs(expected))
    assert actual.shape == expected.shape
    assert error.max(initial=0) <= TOLERANCE[actual.dtype]


def check_against_reference(x, weight, bias, options):
    expected = reference.BatchNorm(x, weight, bias, **options)
    # A mean is rounded to float64, here and there, which moves normalized values by 2 eps |mean| r
    # at most: it shows where the values are float64, too. In units of the tolerance:
    rounding = 2 * np.finfo(np.float64).eps * np.abs(expected._wide(expected.mean)) * expected.r
    ill = 1 + rounding / TOLERANCE[x.dtype]
    y, saved = F.batch_norm_forward(x, weight, bias, **options)
    assert_close(y, expected.y, ill)
    assert_close(saved.mean, expected.mean)
    assert_close(saved.var, expected.var)
    assert saved.count == x.size // max(1, saved.mean.size)

    # A gradient's natural size is that of weight r grad_y: the terms that it is a difference of.
    grad_y = np.random.default_rng(2).normal(size=x.shape).astype(x.dtype)
    grads = F.batch_norm_backward(grad_y, saved)
    # Where z is within rounding of 0, either derivative is right.
    away = np.abs(expected.z) > 1e-5
    if options["activation"] is None or away.all():
        grad_x, grad_weight, grad_bias = expected.backward(grad_y)
        unit = np.maximum(1, np.abs(expected.scale * expected.r) * np.abs(grad_y).max(initial=0))
        assert_close(grads.x, grad_x, unit * ill)
        size = np.sqrt(saved.count) * ill.max(initial=1)
        for actual, wanted, given_ in (
            (grads.weight, grad_weight, weight),
            (grads.bias, grad_bias, bias),
        ):
            assert (actual is None) == (given_ is None)
            if actual is not None:
                assert_close(actual, wanted, size)

    inference = reference.BatchNorm(x, weight, bias, mean=saved.mean, var=saved.var, **options)
    y = F.batch_norm_inference(x, saved.mean, saved.var, weight, bias, **options)
    assert_close(y, inference.y, ill)


# The others meet all kinds of kernels in test_fused.py.
@cases
@dtypes
@pytest.mark.parametrize("activation", [None, "relu"])
def test_boundary_shapes(backend, case, dtype, activation):
    shape, channel_axis = case
    weight, bias = parameters(shape[channel_axis], dtype)
    options = {"channel_axis": channel_axis, "activation": activation}
    check_against_reference(data(shape, channel_axis, dtype), weight, bias, options)


@given(
    case=shapes(),
    dtype=st.sampled_from(DTYPES + HALF_DTYPES),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    slope=st.sampled_from([0.01, 0.2, -0.5]),
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_generated_shapes(
    backend, case, dtype, has_weight, has_bias, activation, slope, eps, offset, seed
):
    shape, channel_axis = case
    weight, bias = parameters(shape[channel_axis], dtype)
    options = {
        "channel_axis": channel_axis,
        "activation": activation,
        "negative_slope": slope,
        "eps": eps,
    }
    check_against_reference(
        data(shape, channel_axis, dtype, seed, offset),
        weight if has_weight else None,
        bias if has_bias else None,
        options,
    )


def everything(case, dtype):
    """All outputs of all operations for one case, as bytes."""
    shape, channel_axis = case
    x = data(shape, channel_axis, dtype)
    weight, bias = parameters(shape[channel_axis], dtype)
    outputs = []
    for activation in ACTIVATIONS if x.size < 20_000 else [None, "relu", "gelu"]:
        options = {"channel_axis": channel_axis, "activation": activation}
        y, saved = F.batch_norm_forward(x, weight, bias, **options)
        grads = F.batch_norm_backward(np.cos(x), saved)
        z = F.batch_norm_inference(x, saved.mean, saved.var, weight, bias, **options)
        outputs += [y, saved.mean, saved.var, saved.inv_std, grads.x, grads.weight, grads.bias, z]
    generator = bnext.Generator(5)
    y, saved = F.dropout_forward(x, 0.3, generator=generator)
    outputs += [y, F.dropout_backward(y, saved)]
    return [output.tobytes() for output in outputs]


each_bits = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in SHAPES
        for dtype in (DTYPES + HALF_DTYPES if np.prod(case[0]) < 20_000 else DTYPES)
    ],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else dtype_name(value),
)


@each_bits
def test_same_bits_for_any_number_of_threads(backend, case, dtype, restore_threads):
    results = []
    for threads in (1, 2, 4):
        bnext.set_num_threads(threads)
        results.append(everything(case, dtype))
    assert results[0] == results[1] == results[2]


def test_same_bits_where_threads_take_large_channels_together(backend, restore_threads):
    x = data((40, 2, 128, 128), 1)  # 5 MB a channel, the gradient included
    grad_y, residual = np.cos(x), np.sin(x)
    weight, bias = parameters(2)
    results = []
    for threads in (1, 2, 4):
        bnext.set_num_threads(threads)
        y, saved = F.batch_norm_forward(x, weight, bias)
        grads = F.batch_norm_backward(grad_y, saved)
        outputs = [y, saved.mean, saved.var, grads.x, grads.weight, grads.bias]
        y, saved = F.batch_norm_forward(x, weight, bias, residual=residual, activation="relu")
        grads = F.batch_norm_backward(grad_y, saved)
        outputs += [y, grads.x, grads.residual]
        results.append([output.tobytes() for output in outputs])
    assert results[0] == results[1] == results[2]


@each_bits
def test_same_bits_on_every_backend(case, dtype):
    results = []
    for name in BACKENDS:
        with using(name):
            results.append(everything(case, dtype))
    assert all(result == results[0] for result in results)


# -- edge cases ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3, 9, 9), (50, 3), (3, 2, 20000)])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 6e4, 3e38])
def test_constant_channel_gives_variance_zero_and_bias(backend, dtype, shape, value):
    x = np.full(shape, min(value, float(ml_dtypes.finfo(dtype).max)), dtype)
    weight, bias = parameters(shape[1], dtype)
    y, saved = F.batch_norm_forward(x, weight, bias)
    assert (saved.var == 0).all()
    assert (saved.mean == x.reshape(-1)[0]).all()
    assert (y == bias.astype(dtype).reshape(-1, *[1] * (x.ndim - 2))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((4, 3, 5, 5), 1), ((4, 3, 9, 9), 1), ((4, 9, 3), -1), ((40, 3), 1)]
)
def test_non_finite_values_stay_in_their_channel(backend, shape, channel_axis, bad):
    x = data(shape, channel_axis)
    clean = np.moveaxis(x, channel_axis, 0)[[0, 2]]
    np.moveaxis(x, channel_axis, 0)[1].flat[3] = bad
    y, saved = F.batch_norm_forward(x, channel_axis=channel_axis)
    assert np.isfinite(saved.var[[0, 2]]).all()
    assert np.isnan(saved.var[1])
    rows = np.moveaxis(y, channel_axis, 0)
    assert np.isnan(rows[1]).all()
    fresh = np.ascontiguousarray(
        np.moveaxis(np.stack([clean[0], clean[0], clean[1]]), 0, channel_axis)
    )
    expected, _ = F.batch_norm_forward(fresh, channel_axis=channel_axis)
    assert np.array_equal(rows[[0, 2]], np.moveaxis(expected, channel_axis, 0)[[0, 2]])
    grads = F.batch_norm_backward(np.ones_like(x), saved)
    assert np.isfinite(np.moveaxis(grads.x, channel_axis, 0)[[0, 2]]).all()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activation_passes_nan_on(backend, activation):
    x = np.array([[np.nan, -1.0, 2.0]] * 2, np.float32)
    y = F.batch_norm_inference(x, np.zeros(3, "f"), np.ones(3, "f"), activation=activation)
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, 1:]).all()


@pytest.mark.parametrize("shape", [(40, 3), (4, 3, 7, 7), (4, 3, 9, 9)])
def test_relu_stops_any_gradient(backend, shape):
    """Also an infinite one: what ReLU clips is selected away, not multiplied by zero."""
    x = data(shape)
    y, saved = F.batch_norm_forward(x, activation="relu")
    grad_y = np.where(y == 0, np.float32(np.inf), np.float32(1))
    assert (y == 0).any()
    expected = F.batch_norm_backward(np.where(y == 0, np.float32(0), grad_y), saved)
    assert np.array_equal(F.batch_norm_backward(grad_y, saved).x, expected.x)


@dtypes
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (5, 3, 0, 2), (4, 0), (4, 0, 7)])
def test_empty(backend, dtype, shape):
    x = np.zeros(shape, dtype)
    weight = bias = np.ones(shape[1], parameter_dtype(dtype))
    y, saved = F.batch_norm_forward(x, weight, bias)
    assert y.shape == shape
    assert np.isnan(saved.mean).all()
    assert saved.count == 0 or shape[1] == 0
    grads = F.batch_norm_backward(np.zeros_like(x), saved)
    assert grads.x.shape == shape
    assert (grads.weight == 0).all()
    assert (grads.bias == 0).all()
    assert F.batch_norm_inference(x, weight, weight).shape == shape
    y, saved = F.dropout_forward(x)
    assert F.dropout_backward(y, saved).shape == shape


def test_zero_variance_and_zero_eps_follow_ieee(backend):
    x = np.array([[1.0, 2.0], [1.0, 4.0]], np.float32)
    y, _ = F.batch_norm_forward(x, eps=0)
    assert np.isnan(y[:, 0]).all()
    np.testing.assert_allclose(y[:, 1], [-1, 1], rtol=1e-6)


def test_values_near_the_end_of_float32(backend):
    x = (np.random.default_rng(0).choice([-1.0, 1.0], (64, 2, 100)) * 1e38).astype(np.float32)
    y, _ = F.batch_norm_forward(x)
    np.testing.assert_allclose(y, np.sign(x), atol=0.2)
    assert_close(y, reference.BatchNorm(x).y)


# -- arrays at the border --------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda a: a,
    "fortran": np.asfortranarray,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "misaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "list": lambda a: a.tolist(),
    "matrix subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
    "masked, nothing masked": np.ma.masked_array,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    dtype = np.float64  # what NumPy makes of a list
    x, g = data((6, 5, 3, 4), dtype=dtype), data((6, 5, 3, 4), dtype=dtype, seed=3)
    weight, bias = parameters(5, dtype)
    convert = LAYOUTS[layout]

    expected, saved = F.batch_norm_forward(x, weight, bias)
    expected_grads = F.batch_norm_backward(g, saved)
    y, saved = F.batch_norm_forward(convert(x), convert(weight), convert(bias))
    grads = F.batch_norm_backward(convert(g), saved)
    assert np.array_equal(y, expected)
    assert np.array_equal(grads.x, expected_grads.x)
    assert type(y) is np.ndarray

    mean, var = saved.mean, saved.var
    z = F.batch_norm_inference(convert(x), convert(mean), convert(var))
    assert np.array_equal(z, F.batch_norm_inference(x, mean, var))
    d, _ = F.dropout_forward(convert(x), generator=bnext.Generator(1))
    assert np.array_equal(d, F.dropout_forward(x, generator=bnext.Generator(1))[0])


def test_only_what_must_be_copied_is_copied():
    x = data((6, 5, 3, 4))
    before = _core.copy_count()
    F.batch_norm_forward(x)
    F.dropout_forward(LAYOUTS["read-only"](x))
    assert _core.copy_count() == before
    F.batch_norm_forward(x.transpose(3, 2, 1, 0))
    assert _core.copy_count() == before + 1


def test_broadcast_gradient():
    x = data((6, 5, 3, 4))
    _, saved = F.batch_norm_forward(x)
    grads = F.batch_norm_backward(np.broadcast_to(np.float32(2), x.shape), saved)
    expected = F.batch_norm_backward(np.full_like(x, 2), saved)
    assert np.array_equal(grads.x, expected.x)


@cases
def test_in_place_equals_out_of_place(backend, case):
    shape, channel_axis = case
    x, g = data(shape, channel_axis), data(shape, channel_axis, seed=3)
    weight, bias = parameters(shape[channel_axis])
    options = {"channel_axis": channel_axis, "activation": "relu"}
    y, saved = F.batch_norm_forward(x, weight, bias, **options)
    grads = F.batch_norm_backward(g, saved)
    z = F.batch_norm_inference(x, saved.mean, saved.var, weight, bias, **options)
    d, drawn = F.dropout_forward(x, generator=bnext.Generator(3))

    target = g.copy()
    assert F.batch_norm_backward(target, saved, out=target).x is target
    assert np.array_equal(target, grads.x)
    target = x.copy()
    _, borrowed = F.batch_norm_forward(target, weight, bias, **options)
    F.batch_norm_backward(g, borrowed, out=target)
    assert np.array_equal(target, grads.x)

    for operation, expected in (
        (lambda a: F.batch_norm_forward(a, weight, bias, out=a, **options)[0], y),
        (
            lambda a: F.batch_norm_inference(
                a, saved.mean, saved.var, weight, bias, out=a, **options
            ),
            z,
        ),
        (lambda a: F.dropout_forward(a, generator=bnext.Generator(3), out=a)[0], d),
    ):
        a = x.copy()
        assert operation(a) is a
        assert np.array_equal(a, expected)
    a = g.copy()
    assert F.dropout_backward(a, drawn, out=a) is a
    assert np.array_equal(a, F.dropout_backward(g, drawn))


def test_backward_after_in_place_forward_is_refused():
    x = data((4, 3))
    _, saved = F.batch_norm_forward(x, activation="relu", out=x)
    with pytest.raises(ValueError, match=r"batch_norm_backward: saved: x was overwritten"):
        F.batch_norm_backward(x, saved)


def test_weight_may_change_between_forward_and_backward():
    x, g = data((4, 3, 8)), data((4, 3, 8), seed=3)
    weight, bias = parameters(3)
    _, saved = F.batch_norm_forward(x, weight, bias, activation="relu")
    expected = F.batch_norm_backward(g, saved).x
    weight *= -1
    assert np.array_equal(F.batch_norm_backward(g, saved).x, expected)


def test_statistics_have_the_dtype_of_x_or_float32():
    for dtype in DTYPES + HALF_DTYPES:
        _, saved = F.batch_norm_forward(data((4, 3), dtype=dtype))
        expected = parameter_dtype(dtype)
        assert saved.mean.dtype == saved.var.dtype == saved.inv_std.dtype == expected
        np.testing.assert_allclose(saved.inv_std, 1 / np.sqrt(saved.var + 1e-5), rtol=1e-6)
