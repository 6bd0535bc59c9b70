"""BatchNorm + residual + activation + dropout in one pass, against the reference of the whole."""

import itertools

import numpy as np
import pytest

import bnext
import reference
from bnext import _core
from bnext import functional as F
from cases import (
    ACTIVATIONS,
    DTYPES,
    HALF_DTYPES,
    TOLERANCE,
    data,
    dtype_name,
    name_of,
    parameters,
)

# Every way through the kernels: rows and columns, with ends of all kinds.
SHAPES = [
    ((7, 1, 5), 1),
    ((4, 3, 7, 7), 1),
    ((3, 5, 65), 1),
    ((3, 70, 14, 14), 1),
    ((2, 3, 1031), 1),
    ((1, 2, 16385), 1),
    ((33, 2051), 1),
    ((1031, 3), 1),
    ((5, 9, 11, 3), -1),
    ((257, 5, 48), -1),
    ((9, 31, 67), -1),
    ((1, 70, 6, 6), 1),
]
shapes = pytest.mark.parametrize("case", SHAPES, ids=name_of)
# Everything that can be combined for the small ones of each kind, and the ends for the others.
COMBINATIONS = [
    (case, *combination)
    for case in SHAPES
    for combination in (
        itertools.product(ACTIVATIONS, [False, True], [0, 0.3])
        if case in (((4, 3, 7, 7), 1), ((3, 5, 65), 1), ((5, 9, 11, 3), -1), ((9, 31, 67), -1))
        else itertools.product([None, "relu", "silu"], [True], [0.3])
    )
]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def close(actual, expected, unit=1.0):
    error = np.abs(reference.wide(actual) - expected) / (unit + np.abs(expected))
    assert error.max() <= TOLERANCE[actual.dtype]


def arrays(case, dtype=np.float32):
    shape, channel_axis = case
    rng = np.random.default_rng(3)
    x = data(shape, channel_axis, dtype)
    residual, grad_y = rng.normal(size=(2, *shape)).astype(dtype)
    return x, residual, grad_y, *parameters(shape[channel_axis], dtype)


@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("case", "activation", "has_residual", "dropout"),
    COMBINATIONS,
    ids=lambda value: name_of(value) if isinstance(value, tuple) else None,
)
def test_against_the_reference(backend, case, dtype, activation, has_residual, dropout):
    x, residual, grad_y, weight, bias = arrays(case, dtype)
    options = {
        "channel_axis": case[1],
        "activation": activation,
        "residual": residual if has_residual else None,
    }
    expected = reference.BatchNorm(x, weight, bias, **options, dropout=dropout, seed=11, offset=5)
    generator = bnext.Generator(11)
    generator.state = {"seed": 11, "offset": 5}
    y, saved = F.batch_norm_forward(
        x, weight, bias, **options, dropout=dropout, generator=generator
    )
    assert generator.state["offset"] == (6 if dropout else 5)
    close(y, expected.y)

    grads = F.batch_norm_backward(grad_y, saved)
    # Where z is within rounding of 0, either derivative is right; then the sums are others too.
    if activation is None or (np.abs(expected.z) > 1e-5).all():
        grad_x, grad_weight, grad_bias = expected.backward(grad_y)
        unit = np.maximum(1, np.abs(expected.scale * expected.r) * np.abs(grad_y).max()) * 2
        close(grads.x, grad_x, unit)
        close(grads.weight, grad_weight, np.sqrt(saved.count))
        close(grads.bias, grad_bias, np.sqrt(saved.count))
        if has_residual:
            close(grads.residual, expected.grad_residual(grad_y))
    assert (grads.residual is None) == (not has_residual)

    inference = reference.BatchNorm(x, weight, bias, mean=saved.mean, var=saved.var, **options)
    close(F.batch_norm_inference(x, saved.mean, saved.var, weight, bias, **options), inference.y)


@shapes
@activations
def test_dropout_is_that_of_dropout_forward(backend, case, activation):
    x, residual, _, weight, bias = arrays(case)
    options = {"channel_axis": case[1], "activation": activation, "residual": residual}
    plain, _ = F.batch_norm_forward(x, weight, bias, **options)
    expected, _ = F.dropout_forward(plain, 0.3, generator=bnext.Generator(1))
    y, _ = F.batch_norm_forward(
        x, weight, bias, **options, dropout=0.3, generator=bnext.Generator(1)
    )
    assert np.array_equal(y, expected)


def test_dropout_of_everything_and_of_nothing(backend):
    x, residual, grad_y, weight, bias = arrays(((4, 3, 7, 7), 1))
    y, saved = F.batch_norm_forward(x, weight, bias, residual=residual, dropout=1)
    grads = F.batch_norm_backward(grad_y, saved)
    for result in (y, grads.x, grads.weight, grads.bias, grads.residual):
        assert (result == 0).all()
    generator = bnext.Generator(1)
    y, _ = F.batch_norm_forward(x, weight, bias, dropout=0, generator=generator)
    assert generator.state["offset"] == 0
    assert np.array_equal(y, F.batch_norm_forward(x, weight, bias)[0])


@shapes
def test_same_bits_for_any_number_of_threads(case, restore_threads):
    x, residual, grad_y, weight, bias = arrays(case)
    x, residual, grad_y = (np.concatenate([a] * 4) for a in (x, residual, grad_y))

    def run(threads):
        bnext.set_num_threads(threads)
        y, saved = F.batch_norm_forward(
            x,
            weight,
            bias,
            channel_axis=case[1],
            residual=residual,
            activation="relu",
            dropout=0.4,
            generator=bnext.Generator(2),
        )
        grads = F.batch_norm_backward(grad_y, saved)
        return y, grads.x, grads.weight, grads.bias, grads.residual

    for one, many in zip(run(1), run(3), strict=True):
        assert np.array_equal(one, many)


def test_what_is_kept_for_backward():
    x, residual, _, weight, bias = arrays(((4, 16, 20, 20), 1))
    few = 16 * (2 * 4 + 3 * 8)  # weight and bias, statistics

    def nbytes(**options):
        return F.batch_norm_forward(x, weight, bias, **options)[1].nbytes

    assert nbytes() == x.nbytes + few
    assert nbytes(activation="relu", dropout=0.5) == x.nbytes + few
    assert nbytes(residual=residual) == x.nbytes + few
    assert nbytes(residual=residual, activation="relu") <= x.nbytes + few + x.size // 8 + 8
    assert nbytes(residual=residual, activation="leaky_relu", dropout=0.5) <= (
        x.nbytes + few + x.size // 8 + 8
    )


def test_gradient_that_only_passes_through_is_grad_y_itself():
    x, residual, grad_y, weight, bias = arrays(((4, 3, 7, 7), 1))
    _, saved = F.batch_norm_forward(x, weight, bias, residual=residual)
    assert F.batch_norm_backward(grad_y, saved).residual is grad_y
    with pytest.raises(ValueError, match="out: expected other memory than that of grad_y"):
        F.batch_norm_backward(grad_y, saved, out=grad_y)


def test_result_in_place_of_the_residual(backend):
    x, residual, grad_y, weight, bias = arrays(((3, 70, 14, 14), 1))
    options = {"activation": "relu"}
    expected, saved = F.batch_norm_forward(x, weight, bias, residual=residual, **options)
    grads = F.batch_norm_backward(grad_y, saved)
    target = residual.copy()
    y, saved = F.batch_norm_forward(x, weight, bias, residual=target, out=target, **options)
    assert y is target
    assert np.array_equal(y, expected)
    again = F.batch_norm_backward(grad_y, saved)
    assert np.array_equal(again.x, grads.x)
    assert np.array_equal(again.residual, grads.residual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": np.zeros((4, 3, 7, 8), "f")}, r"residual: expected shape \(4, 3, 7, 7\)"),
        ({"dropout": 1.5}, r"dropout: expected a probability in \[0, 1\], got 1.5"),
        ({"dropout": float("nan")}, "dropout: expected a probability"),
    ],
)
def test_wrong_values(options, message):
    x = arrays(((4, 3, 7, 7), 1))[0]
    generator = bnext.Generator(1)
    with pytest.raises(ValueError, match=f"batch_norm_forward: {message}"):
        F.batch_norm_forward(x, **options, generator=generator)
    assert generator.state["offset"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": np.zeros((4, 3, 7, 7))}, "residual: expected dtype float32"),
        ({"dropout": "half"}, "dropout: expected a number"),
        ({"dropout": 0.5, "generator": 3}, "generator: expected a bnext.Generator"),
    ],
)
def test_wrong_types(options, message):
    x = arrays(((4, 3, 7, 7), 1))[0]
    with pytest.raises(TypeError, match=f"batch_norm_forward: {message}"):
        F.batch_norm_forward(x, **options)


@shapes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("affine", [False, True])
def test_in_place_backward_finds_x_in_the_result(backend, case, dtype, activation, affine):
    x, _, grad_y, weight, bias = arrays(case, dtype)
    weight = np.sign(weight) * (np.abs(weight) + dtype(0.5))  # n is as exact as |bias / weight|
    parameters = (weight, bias) if affine else (None, None)
    options = {"channel_axis": case[1], "activation": activation, "negative_slope": 0.2}
    expected = reference.BatchNorm(x, *parameters, **options)
    target = x.copy()
    y, saved = F.batch_norm_forward(target, *parameters, **options, out=target)
    assert y is target
    assert saved.nbytes <= x.nbytes + 8 * 5 * saved.mean.size  # that of y: x is gone
    close(y, expected.y)
    grads = F.batch_norm_backward(grad_y, saved)
    if activation is None or (np.abs(expected.z) > 1e-5).all():
        grad_x, grad_weight, grad_bias = expected.backward(grad_y)
        unit = np.maximum(1, np.abs(expected.scale * expected.r) * np.abs(grad_y).max()) * 8
        close(grads.x, grad_x, unit)
        if affine:
            close(grads.weight, grad_weight, 8 * np.sqrt(saved.count))
            close(grads.bias, grad_bias, np.sqrt(saved.count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "saved: x was overwritten"),
        ({"activation": "leaky_relu", "negative_slope": 0.0}, "saved: x was overwritten"),
        ({"dropout": 0.5}, "saved: x was overwritten"),
        ({"residual": True}, "saved: x was overwritten"),
        ({"weight": True}, "weight: expected no 0, got one in channel 1"),
    ],
)
def test_in_place_backward_where_x_is_lost(options, message):
    x, residual, grad_y, weight, bias = arrays(((4, 3, 7, 7), 1))
    if options.pop("residual", False):
        options["residual"] = residual
    if options.pop("weight", False):
        weight[1] = 0
    _, saved = F.batch_norm_forward(x, weight, bias, **options, out=x)
    with pytest.raises(ValueError, match=message):
        F.batch_norm_backward(grad_y, saved)


def test_constant_statistics_pass_on_no_gradient_of_theirs():
    """A NaN in x spoils the sums of its channel, and these do not matter then."""
    x, _, grad_y, weight, bias = arrays(((4, 3, 7, 7), 1))
    x[0, 1, 0, 0] = np.nan
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    _, saved = _core.batch_norm_inference_forward(x, mean, var, weight, bias)
    grad_x = F.batch_norm_backward(grad_y, saved).x
    expected = grad_y * (weight / np.sqrt(np.float32(1 + 1e-5))).reshape(3, 1, 1)
    finite = np.isfinite(x)
    assert np.allclose(grad_x[finite], expected[finite], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[3], SHAPES[8], SHAPES[6]], ids=name_of)
# The derivative of SiLU is NaN at infinity, PyTorch's too.
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "silu"])
def test_constant_statistics_give_infinite_values_a_gradient(backend, case, activation, dtype):
    """It does not depend on x, but for the derivative of the activation."""
    x, _, grad_y, weight, bias = arrays(case, dtype)
    channels = np.moveaxis(x, case[1], 0)
    channels[1].flat[[0, 5]] = np.inf, -np.inf
    mean, var = np.full_like(weight, 0.5), np.full_like(weight, 2)
    options = {"channel_axis": case[1], "activation": activation}
    _, saved = _core.batch_norm_inference_forward(x, mean, var, weight, bias, **options)
    grad_x = F.batch_norm_backward(grad_y, saved).x

    with np.errstate(invalid="ignore"):
        expected = reference.BatchNorm(x, weight, bias, mean=mean, var=var, **options)
        wanted = expected.backward(grad_y)[0]
    above, below = {
        None: (1, 1),
        "leaky_relu": (1, 0.01),
        "relu6": (0, 0),
    }.get(activation, (1, 0))
    if weight[1] < 0:
        above, below = below, above
    at = np.moveaxis(grad_y, case[1], 0)[1].flat[[0, 5]].astype(np.float64)
    factor = weight[1] / np.sqrt(2 + 1e-5)
    np.moveaxis(wanted, case[1], 0)[1].flat[[0, 5]] = factor * at * (above, below)
    settled = np.abs(expected.z) > 1e-5
    close(grad_x[settled], wanted[settled])
