"""Layers against finite differences, PyTorch, loops over windows, and wrong inputs."""

import os
import threading

import numpy as np
import pytest

import bnext
import reference
from bnext import _core, nn
from bnext import functional as F
from bnext.nn import _blas
from cases import DTYPES, HALF_DTYPES, TOLERANCE, dtype_name
from gradcheck import gradcheck

F32, F64 = np.float32, np.float64
EPS32 = np.finfo(F32).eps


def normal(*shape, seed=0, dtype=F64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def distinct(*shape):
    """No two elements closer than 0.01 and none closer than that to 0: away from kinks."""
    size = int(np.prod(shape))
    values = 0.01 * (np.arange(size) - size // 2 + 0.5)
    return np.random.default_rng(0).permutation(values).reshape(shape)


def windows(size, kernel, stride, padding, dilation):
    """(position, tap, input index) of every window along one axis, without the padding."""
    positions = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    for p in range(positions):
        for i in range(kernel):
            index = p * stride - padding + i * dilation
            if 0 <= index < size:
                yield p, i, index


def conv_reference(layer, x, weight, bias):
    """The defining sum, in float64."""
    n, _, *size = x.shape
    shape = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(
            size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True
        )
    ]
    y = np.zeros((n, layer.out_channels, *shape))
    if bias is not None:
        y += bias[:, np.newaxis, np.newaxis]
    inputs, outputs = weight.shape[1], layer.out_channels // layer.groups
    axes = [
        list(windows(*arguments))
        for arguments in zip(
            size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True
        )
    ]
    for g in range(layer.groups):
        ins, outs = (slice(g * c, (g + 1) * c) for c in (inputs, outputs))
        for p, i, h in axes[0]:
            for q, j, w in axes[1]:
                y[:, outs, p, q] += x[:, ins, h, w] @ weight[outs, :, i, j].T
    return y


# Each way to convolve: Winograd's (3x3, stride 1, enough channels), 1x1, and windows.
CONVS = {
    "plain": ((2, 3, 6, 7), dict(out_channels=4, kernel_size=3)),
    "padding": ((2, 3, 5, 5), dict(out_channels=4, kernel_size=3, padding=1)),
    "stride": ((2, 3, 8, 7), dict(out_channels=4, kernel_size=3, stride=2, padding=1)),
    "stride beyond the kernel": ((2, 2, 9, 9), dict(out_channels=2, kernel_size=2, stride=3)),
    "dilation": ((2, 2, 9, 8), dict(out_channels=3, kernel_size=3, dilation=2, padding=2)),
    "rectangle": (
        (2, 2, 6, 9),
        dict(out_channels=3, kernel_size=(2, 5), stride=(1, 2), padding=(0, 2), dilation=(3, 1)),
    ),
    "groups": ((2, 4, 5, 5), dict(out_channels=6, kernel_size=3, padding=1, groups=2)),
    "depthwise": ((2, 3, 5, 5), dict(out_channels=3, kernel_size=3, padding=1, groups=3)),
    "no bias": ((2, 2, 5, 5), dict(out_channels=3, kernel_size=3, bias=False)),
    "1x1": ((3, 4, 3, 5), dict(out_channels=2, kernel_size=1)),
    "1x1 groups": ((2, 4, 3, 3), dict(out_channels=6, kernel_size=1, groups=2)),
    "1x1 stride": ((2, 3, 5, 6), dict(out_channels=4, kernel_size=1, stride=2)),
    "1x1 padding": ((2, 3, 3, 3), dict(out_channels=2, kernel_size=1, padding=1)),
    "only padding": ((1, 2, 1, 1), dict(out_channels=2, kernel_size=3, padding=2, stride=2)),
    "batch of 1": ((1, 2, 4, 4), dict(out_channels=2, kernel_size=3)),
    "1 pixel": ((3, 2, 1, 1), dict(out_channels=4, kernel_size=1)),
    "empty batch": ((0, 2, 4, 4), dict(out_channels=3, kernel_size=3)),
    "winograd": ((2, 8, 6, 4), dict(out_channels=5, kernel_size=3, padding=1)),
    "winograd odd": ((3, 9, 7, 5), dict(out_channels=8, kernel_size=3, padding=1)),
    "winograd no padding": ((2, 8, 5, 8), dict(out_channels=3, kernel_size=3)),
    "winograd padding": ((2, 8, 3, 4), dict(out_channels=3, kernel_size=3, padding=(3, 2))),
    "winograd groups": ((2, 16, 4, 5), dict(out_channels=4, kernel_size=3, groups=2, padding=1)),
    "winograd 1 pixel": ((2, 8, 1, 1), dict(out_channels=2, kernel_size=3, padding=1)),
    "winograd 1 position": ((2, 8, 3, 3), dict(out_channels=2, kernel_size=3, bias=False)),
    "winograd empty batch": ((0, 8, 4, 4), dict(out_channels=3, kernel_size=3, padding=1)),
}


def conv(case, dtype=F64):
    shape, arguments = CONVS[case]
    bnext.manual_seed(1)
    return nn.Conv2d(shape[1], **arguments, dtype=dtype), normal(*shape, dtype=dtype)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
}


def layers():
    """Every kind of layer with an input away from kinks."""
    bnext.manual_seed(0)
    return {
        "linear": (nn.Linear(5, 3, dtype=F64), normal(4, 5)),
        "linear, 3 axes": (nn.Linear(5, 3, bias=False, dtype=F64), normal(2, 3, 5)),
        # From -6.15 to 6.15, and no closer than 0.15 to 0, 3 or 6.
        **{name: (layer, 30 * distinct(6, 7)) for name, layer in ACTIVATIONS.items()},
        "max pool": (nn.MaxPool2d(2), distinct(2, 3, 6, 5)),
        "max pool, overlapping": (nn.MaxPool2d(3, 2, 1), distinct(2, 2, 7, 6)),
        "max pool, stride 3": (nn.MaxPool2d((2, 4), (3, 1), (1, 2)), distinct(2, 2, 7, 6)),
        "avg pool": (nn.AvgPool2d(2), normal(2, 3, 6, 5)),
        "avg pool, padding": (nn.AvgPool2d((3, 2), 2, 1), normal(2, 2, 7, 6)),
        "avg pool, without padding": (
            nn.AvgPool2d(3, (1, 2), 1, count_include_pad=False),
            normal(2, 2, 4, 5),
        ),
        "global avg pool": (nn.GlobalAvgPool2d(), normal(2, 3, 4, 5)),
        "flatten": (nn.Flatten(), normal(2, 3, 4)),
        "input statistics": (nn.InputStatistics(3), normal(2, 3, 4)),
        "sequential": (
            nn.Sequential(nn.Linear(4, 6, dtype=F64), nn.LeakyReLU(), nn.Linear(6, 2, dtype=F64)),
            normal(3, 4),
        ),
        "residual": (nn.Residual(nn.Linear(4, 4, dtype=F64)), normal(3, 4)),
        "residual, shortcut": (
            nn.Residual(nn.Conv2d(2, 3, 3, padding=1, dtype=F64), nn.Conv2d(2, 3, 1, dtype=F64)),
            normal(2, 2, 4, 4),
        ),
        "residual, norm": (residual_norm(None), normal(2, 2, 4, 4)),
        "residual, shortcut, norm": (
            residual_norm(nn.Conv2d(2, 2, 1, dtype=F64)),
            normal(2, 2, 4, 4),
        ),
    }


def residual_norm(shortcut):
    """With running statistics in training too, so that evaluation gives the same."""
    norm = nn.BatchNorm(2, activation="leaky_relu", negative_slope=0.2, dtype=F64)
    body = nn.Conv2d(2, 2, 3, padding=1, dtype=F64)
    return nn.Residual(body, shortcut, norm=norm.freeze(affine=False))


# -- gradients and values --------------------------------------------------------------
@pytest.mark.parametrize("case", CONVS)
def test_conv_gradients(case):
    gradcheck(*conv(case))


@pytest.mark.parametrize("case", layers())
def test_gradients(case):
    gradcheck(*layers()[case])


@pytest.mark.parametrize("case", CONVS)
def test_conv_is_the_defining_sum(case):
    layer, x = conv(case)
    bias = None if layer.bias is None else layer.bias.data
    expected = conv_reference(layer, x, layer.weight.data, bias)
    assert layer(x).shape == expected.shape
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(layer.forward(x)[0], layer(x))


@pytest.mark.parametrize("case", ["stride", "winograd odd", "1x1"])
def test_conv_in_float32(case):
    """The error is a few roundings of the sum of the terms' sizes."""
    layer, x = conv(case, F32)
    y = layer(x)
    assert y.dtype == F32
    weight, bias = (p.data.astype(F64) for p in (layer.weight, layer.bias))
    size = conv_reference(layer, abs(x), abs(weight), abs(bias))
    error = abs(y - conv_reference(layer, x, weight, bias))
    assert np.max(error / size) < 4 * EPS32


@pytest.mark.parametrize("case", CONVS)
def test_conv_agrees_with_torch(case):
    torch = pytest.importorskip("torch", reason="the comparison is with PyTorch")
    layer, x = conv(case)
    _, arguments = CONVS[case]
    other = torch.nn.Conv2d(layer.in_channels, **arguments, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            getattr(other, name).copy_(torch.from_numpy(parameter.data))
    compare_with_torch(layer, other, x)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.MaxPool2d(2), "MaxPool2d"),
        (nn.MaxPool2d(3, 1, 1), "MaxPool2d"),
        (nn.MaxPool2d((1, 5), (2, 1), (0, 2)), "MaxPool2d"),
        (nn.AvgPool2d(3), "AvgPool2d"),
        (nn.AvgPool2d(3, 2, 1), "AvgPool2d"),
        (nn.AvgPool2d((4, 2), (3, 1), (2, 1), count_include_pad=False), "AvgPool2d"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 1, 5, 5), (0, 2, 6, 6)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_pooling_agrees_with_torch(layer, name, shape, dtype):
    torch = pytest.importorskip("torch", reason="the comparison is with PyTorch")
    arguments = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding)
    if name == "AvgPool2d":
        arguments["count_include_pad"] = layer.count_include_pad
    compare_with_torch(layer, getattr(torch.nn, name)(**arguments), distinct(*shape).astype(dtype))


def compare_with_torch(layer, other, x, single=1e-6):
    """`single` is the tolerance in float32."""
    import torch

    tensor = torch.from_numpy(x).requires_grad_()
    expected = other(tensor)
    y, backward = layer.forward(x)
    grad_y = normal(*y.shape, seed=3, dtype=x.dtype)
    expected.backward(torch.from_numpy(grad_y))
    grad_x = backward(grad_y)
    tolerance = 1e-12 if x.dtype == F64 else single
    close = dict(rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(y, expected.detach().numpy(), **close)
    np.testing.assert_allclose(grad_x, tensor.grad.numpy(), **close)
    for name, parameter in layer.named_parameters():
        np.testing.assert_allclose(parameter.grad, getattr(other, name).grad.numpy(), **close)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_linear_values(dtype):
    x = distinct(4, 5).astype(dtype)
    bnext.manual_seed(0)
    layer = nn.Linear(5, 3, dtype=dtype)
    expected = x @ layer.weight.data.T + layer.bias.data
    assert layer(x).dtype == dtype
    np.testing.assert_allclose(layer(x), expected, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("case", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5), (70001,)], ids=str)
def test_activations(backend, case, dtype, shape):
    """Value and gradient as the reference has them, half types rounded once."""
    layer = ACTIVATIONS[case]
    x, grad_y = normal(*shape, seed=5), normal(*shape, seed=6)
    x, grad_y = (np.asarray(a).astype(dtype) for a in (4 * x, grad_y))
    wide = reference.wide(x)
    value, derivative = reference.activate(wide, layer._function, layer.negative_slope)
    y, backward = layer.forward(x)
    grad_x = backward(grad_y)
    np.testing.assert_array_equal(layer(x), y)
    for result, expected in ((y, value), (grad_x, reference.wide(grad_y) * derivative)):
        assert result.shape == shape
        assert result.dtype == dtype
        error = abs(reference.wide(result) - expected) / (1 + abs(expected))
        assert error.max(initial=0) <= TOLERANCE[np.dtype(dtype)]


@pytest.mark.parametrize("case", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_activations_agree_with_torch(case, dtype):
    torch = pytest.importorskip("torch", reason="the comparison is with PyTorch")
    layer = ACTIVATIONS[case]
    arguments = {"leaky relu": {"negative_slope": 0.2}, "gelu": {"approximate": "tanh"}}
    other = getattr(torch.nn, type(layer).__name__)(**arguments.get(case, {}))
    x = np.linspace(-9, 9, 2001).astype(dtype)
    x = x[(x != 0) & (abs(x) != 3) & (x != 6)]
    compare_with_torch(layer, other, x, TOLERANCE[np.dtype(F32)])
    special = np.array([np.nan, np.inf, -np.inf, 0.0, 1e30, -1e30], dtype)
    theirs = other(torch.from_numpy(special)).numpy()
    np.testing.assert_allclose(layer(special), theirs, rtol=1e-6)


def test_every_activation_of_batch_norm_is_a_layer():
    for name in F.activations[1:]:
        layer = nn.activation.activation_layer(name, 0.3)
        assert layer._function == name
        assert layer.negative_slope == (0.3 if name == "leaky_relu" else 0.01)


def test_nan_and_infinity():
    x = np.array([[np.nan, -np.inf, np.inf, -1.0, 1.0]])
    np.testing.assert_array_equal(nn.ReLU()(x), [[np.nan, 0, np.inf, 0, 1]])
    np.testing.assert_array_equal(nn.LeakyReLU(0.5)(x), [[np.nan, -np.inf, np.inf, -0.5, 1]])
    # A gradient that is not finite stops where the activation is off.
    _, backward = nn.ReLU().forward(x)
    np.testing.assert_array_equal(
        backward(np.full_like(x, np.inf)), [[np.inf, 0, np.inf, 0, np.inf]]
    )


@pytest.mark.parametrize("width", [2, 3, 4, 40])
def test_max_pool_ties_nan_and_infinity(width):
    """Whatever the width of the plane: rows are taken several elements at a time."""

    def pool(*window):
        x = np.full((1, 1, 2, width), -5.0, F32)
        x[0, 0, :, :2] = np.reshape(window, (2, 2))
        y, backward = nn.MaxPool2d(2).forward(x)
        assert nn.MaxPool2d(2)(x).tobytes() == y.tobytes()
        grad = np.zeros_like(y)
        grad[..., 0] = 3
        return y[0, 0, 0, 0], backward(grad)[0, 0, :, :2].ravel().tolist()

    assert pool(1, 2, 2, 1) == (2, [0, 3, 0, 0])
    assert pool(-np.inf, -np.inf, -np.inf, -np.inf) == (-np.inf, [3, 0, 0, 0])
    assert pool(-np.inf, -1, -np.inf, -1) == (-1, [0, 3, 0, 0])
    value, grad = pool(1, np.inf, np.nan, np.nan)
    assert np.isnan(value)
    assert grad == [0, 0, 3, 0]


def test_max_pool_ignores_its_padding():
    y = nn.MaxPool2d(3, 1, 1)(np.full((1, 1, 2, 2), -1.0))
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), -1.0))


def test_avg_pool_counts_its_padding_or_not():
    x = np.ones((1, 1, 2, 2))
    assert nn.AvgPool2d(2, 2, 1)(x)[0, 0, 0, 0] == 0.25
    assert nn.AvgPool2d(2, 2, 1, count_include_pad=False)(x)[0, 0, 0, 0] == 1


# -- what every layer keeps to ---------------------------------------------------------
@pytest.mark.parametrize("case", layers())
def test_call_is_forward_without_backward(case):
    layer, x = layers()[case]
    np.testing.assert_array_equal(layer(x), layer.forward(x)[0])
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("case", [*layers(), *(case for case in CONVS if "empty" not in case)])
def test_inputs_need_not_be_contiguous(case):
    layer, x = conv(case) if case in CONVS else layers()[case]
    spread = np.repeat(x, 2, axis=-1)[..., ::2]
    assert not spread.flags.c_contiguous or spread.shape[-1] == 1
    y, backward = layer.forward(x)
    y_spread, backward_spread = layer.forward(spread)
    np.testing.assert_array_equal(y_spread, y)
    grad = np.repeat(y, 2, axis=-1)[..., ::2]
    np.testing.assert_array_equal(backward_spread(grad), backward(y))


@pytest.mark.parametrize("case", [*layers(), "winograd", "groups"])
def test_one_layer_used_twice(case):
    """Each backward belongs to its own forward, in any order."""
    layer, x = conv(case) if case in CONVS else layers()[case]
    other = distinct(*x.shape)[::-1].copy() + 0.003
    _, alone = layer.forward(x)
    y, first = layer.forward(x)
    _, second = layer.forward(other)
    grad = normal(*y.shape, seed=5)
    expected = alone(grad)
    np.testing.assert_array_equal(first(grad), expected)
    second(grad)
    np.testing.assert_array_equal(first(grad), expected)


def test_state_round_trip():
    def model():
        return nn.Sequential(
            {
                "conv": nn.Conv2d(1, 2, 3),
                "block": nn.Residual(nn.Sequential(nn.BatchNorm(2, activation="relu"))),
                "flat": nn.Flatten(),
                "linear": nn.Linear(8, 3),
            }
        )

    x = normal(2, 1, 4, 4, dtype=F32)
    first, second = model(), model()
    assert not np.array_equal(first(x), second(x))
    assert list(first.state_dict()) == [
        "conv.weight",
        "conv.bias",
        "block.body.0.weight",
        "block.body.0.bias",
        "linear.weight",
        "linear.bias",
        "block.body.0.running_mean",
        "block.body.0.running_var",
        "block.body.0.num_batches_tracked",
    ]
    second.load_state_dict({name: array.copy() for name, array in first.state_dict().items()})
    np.testing.assert_array_equal(first(x), second(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"1.bias": np.array(["a", "b"])}, ValueError, "'1.bias': expected dtype float32, got <U1"),
        ({"1.bias": np.ones(2, complex)}, ValueError, "'1.bias': expected dtype float32, got comp"),
        ({"2.num_batches_tracked": np.array(2.7)}, ValueError, "'2.num.*': expected dtype int64"),
        ([1], TypeError, "state: expected a mapping, got list"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm(2))
    before = {key: np.copy(array) for key, array in model.state_dict().items()}
    state = change
    if isinstance(change, dict):
        state = {key: np.zeros_like(array) for key, array in before.items()} | change
    with pytest.raises(error, match=f"^Sequential.load_state_dict: {message}"):
        model.load_state_dict(state)
    np.testing.assert_equal(model.state_dict(), before)


def test_names_of_layers():
    for name in ("", 0):
        with pytest.raises(TypeError, match=f"Sequential: expected names .*, got {name!r}"):
            nn.Sequential({name: nn.ReLU()})
    inner = nn.Sequential({"b": nn.Linear(2, 2)})
    model = nn.Sequential({"a.b": nn.Linear(2, 2), "a": inner})
    with pytest.raises(
        ValueError, match=r"state_dict: expected different names, got 'a\.b\.weight'"
    ):
        model.state_dict()


def test_initial_weights():
    """Uniform within 1 / sqrt(fan in), from the seed alone; biases are spared from decay."""
    bnext.manual_seed(3)
    conv_layer, linear = nn.Conv2d(8, 64, 3, groups=2), nn.Linear(50, 400)
    for layer, fan_in in ((conv_layer, 4 * 9), (linear, 50)):
        for parameter in layer.parameters():
            assert abs(parameter.data).max() <= 1 / np.sqrt(fan_in)
            assert parameter.data.dtype == F32
        # The variance of a uniform distribution on [-k, k] is k^2 / 3.
        assert layer.weight.data.var() == pytest.approx(1 / fan_in / 3, rel=0.1)
        assert layer.weight.decay
        assert not layer.bias.decay
    bnext.manual_seed(3)
    np.testing.assert_array_equal(nn.Conv2d(8, 64, 3, groups=2).weight.data, conv_layer.weight.data)
    bnext.manual_seed(4)
    assert not np.array_equal(nn.Conv2d(8, 64, 3, groups=2).weight.data, conv_layer.weight.data)


def test_residual_with_norm_is_the_sum_of_its_parts():
    bnext.manual_seed(0)
    body, norm = nn.Conv2d(2, 2, 1), nn.BatchNorm(2, activation="relu")
    x = normal(3, 2, 4, 4, dtype=F32)
    y, _ = nn.Residual(body, norm=norm).forward(x)
    expected = np.maximum(nn.BatchNorm(2).forward(body(x))[0] + x, 0)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    with pytest.raises(ValueError, match="'norm': residual: expected shape"):
        nn.Residual(nn.Conv2d(2, 2, 3), norm=norm).forward(x)


def test_sequential_is_a_list_of_layers():
    relu, flatten = nn.ReLU(), nn.Flatten()
    model = nn.Sequential(relu, flatten)
    assert len(model) == 2
    assert list(model) == [relu, flatten]
    assert model[-1] is flatten
    x = normal(2, 3)
    y, backward = nn.Sequential().forward(x)
    assert y is x
    assert backward(x) is x


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            nn.Conv2d(2, 4, 3, 2, padding=1, groups=2, bias=False),
            "Conv2d(2, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False)",
        ),
        (nn.Linear(2, 3), "Linear(2, 3)"),
        (nn.MaxPool2d(2), "MaxPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))"),
        (nn.LeakyReLU(), "LeakyReLU(negative_slope=0.01)"),
        (nn.GELU(), "GELU(approximate='tanh')"),
        (nn.Flatten(), "Flatten(start_dim=1, end_dim=-1)"),
        (nn.Sequential(nn.ReLU()), "Sequential(\n  (0): ReLU()\n)"),
    ],
)
def test_repr(layer, text):
    assert repr(layer) == text


# -- wrong inputs ----------------------------------------------------------------------
X = np.zeros((2, 3, 5, 5), F32)


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (nn.Conv2d(3, 4, 3), X[0], ValueError, r"expected shape \(N, C, H, W\), got \(3, 5, 5\)"),
        (nn.Conv2d(4, 4, 3), X, ValueError, r"expected 4 channels \(axis 1\), got shape \(2, 3"),
        (nn.Conv2d(3, 4, 3), X.astype(F64), TypeError, "expected float32.*got float64"),
        (nn.Conv2d(3, 4, 3, dtype=F64), X, TypeError, "expected float64.*got float32"),
        (nn.Conv2d(3, 4, (2, 6)), X, ValueError, "at least 2 and 6 .*2x6, got 5x5"),
        (nn.Conv2d(3, 4, 3, dilation=3, padding=(1, 0)), X, ValueError, "at least 5 and 7"),
        (nn.Conv2d(3, 4, (1, 7), padding=(2, 0)), X, ValueError, "at least 0 and 7 .*1x7, got 5"),
        (nn.Linear(4, 2), X, ValueError, r"expected shape \(\*, 4\), got \(2, 3, 5, 5\)"),
        (nn.Linear(5, 2), X.astype(F64), TypeError, "expected float32.*got float64"),
        (nn.Linear(5, 2), F32(1), ValueError, r"expected shape \(\*, 5\), got \(\)"),
        (nn.ReLU(), X.astype(int), TypeError, "float64, float16 or bfloat16, got int64"),
        (nn.SiLU(), X.astype(np.complex64), TypeError, "got complex64"),
        (nn.Conv2d(3, 4, 3), X.astype(np.float16), TypeError, "expected float32.*got float16"),
        (nn.Linear(5, 2), X.astype(np.float16), TypeError, "expected float32.*got float16"),
        (nn.MaxPool2d(2), X[0], ValueError, r"expected shape \(N, C, H, W\)"),
        (nn.MaxPool2d(6), X, ValueError, "at least 6 and 6 .*got 5x5"),
        (nn.MaxPool2d(2), X.astype(np.uint8), TypeError, "got uint8"),
        (nn.AvgPool2d(2), X.astype(np.float16), TypeError, "float32 or float64, got float16"),
        (nn.AvgPool2d((7, 2), padding=(0, 1)), X, ValueError, "at least 7 and 0"),
        (nn.GlobalAvgPool2d(), X[:, :, :0], ValueError, r"got shape \(2, 3, 0, 5\)"),
        (nn.Flatten(1, 4), X, ValueError, r"expected axes 1 to 4, got shape \(2, 3, 5, 5\)"),
        (nn.Flatten(3, 2), X, ValueError, "expected axes 3 to 2"),
    ],
)
def test_wrong_inputs(layer, x, error, message):
    nn.Sequential({"first": layer})  # gives it a name
    for run in (layer, layer.forward):
        with pytest.raises(error, match=f"^{type(layer).__name__} 'first': x: .*{message}"):
            run(x)


def test_residual_of_two_shapes():
    block = nn.Residual(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"^Residual: .* got \(4, 2\) and \(4, 3\)"):
        block.forward(np.zeros((4, 3), F32))


@pytest.mark.parametrize("case", [*layers(), "winograd", "stride", "1x1"])
def test_wrong_gradients(case):
    layer, x = conv(case) if case in CONVS else layers()[case]
    y, backward = layer.forward(x)
    with pytest.raises(ValueError, match="grad_y: expected shape"):
        backward(y[:-1])
    if case != "sequential":
        with pytest.raises(TypeError, match=r"grad_y: expected .*float64.*, got float32"):
            backward(y.astype(F32))
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Conv2d(0, 1, 1), ValueError, "Conv2d: in_channels: expected 1 or more, got 0"),
        (lambda: nn.Conv2d(1, 1, 0), ValueError, "Conv2d: kernel_size: expected 1 or more, got 0"),
        (lambda: nn.Conv2d(1, 1, 1.5), TypeError, "kernel_size: expected an integer, got 1.5"),
        (lambda: nn.Conv2d(1, 1, (1, 2, 3)), ValueError, "kernel_size: expected an integer or two"),
        (lambda: nn.Conv2d(1, 1, 1, 0), ValueError, "stride: expected 1 or more, got 0"),
        (lambda: nn.Conv2d(1, 1, 1, 1, -1), ValueError, "padding: expected 0 or more, got -1"),
        (lambda: nn.Conv2d(1, 1, 1, dilation=0), ValueError, "dilation: expected 1 or more"),
        (lambda: nn.Conv2d(3, 4, 1, groups=2), ValueError, "in_channels: .*groups=2, got 3"),
        (lambda: nn.Conv2d(4, 3, 1, groups=2), ValueError, "out_channels: .*groups=2, got 3"),
        (lambda: nn.Conv2d(1, 1, 1, dtype="f2"), TypeError, "dtype: expected .* got float16"),
        (lambda: nn.Linear(1, 0), ValueError, "Linear: out_features: expected 1 or more, got 0"),
        (lambda: nn.Linear(1, 1, dtype=int), TypeError, "Linear: dtype: .* got int64"),
        (lambda: nn.GELU("none"), ValueError, 'GELU: approximate: expected "tanh", got .none'),
        (lambda: nn.LeakyReLU(np.inf), ValueError, "negative_slope: expected a finite number"),
        (
            lambda: nn.MaxPool2d(2, padding=2),
            ValueError,
            "MaxPool2d: padding: expected at most",
        ),
        (lambda: nn.AvgPool2d(2, 0), ValueError, "AvgPool2d: stride: expected 1 or more, got 0"),
        (lambda: nn.Residual(None), TypeError, "Residual: body: expected a Module, got NoneType"),
        (lambda: nn.Residual(nn.ReLU(), "x"), TypeError, "Residual: shortcut: expected a Module"),
        (
            lambda: nn.Residual(nn.ReLU(), norm=nn.ReLU()),
            TypeError,
            "Residual: norm: expected a BatchNorm, got ReLU",
        ),
        (lambda: nn.Flatten("a"), TypeError, "Flatten: start_dim: expected an integer, got 'a'"),
        (lambda: nn.Flatten(1, 2.5), TypeError, "Flatten: end_dim: expected an integer, got 2.5"),
        (lambda: nn.Sequential(nn.ReLU), TypeError, "Sequential: 0: expected a Module, got type"),
    ],
)
def test_wrong_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


Y, TILES = np.zeros((2, 3, 4, 4), F32), np.zeros(16 * 3 * 2 * 4, F32)
WINDOW = ((2, 2), (1, 1), (0, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.im2col(X, Y, *WINDOW, (1, 1)), "im2col: cols: expected 384 contiguous"),
        (lambda: _core.im2col(X[0], Y, *WINDOW, (1, 1)), "im2col: x: expected .N, C, H, W"),
        (lambda: _core.im2col(X[..., ::2], Y, *WINDOW, (1, 1)), "im2col: x: expected contiguous"),
        (lambda: _core.im2col(X, Y, *WINDOW, (1, 0)), "im2col: window: expected kernel"),
        (lambda: _core.col2im(Y, X, *WINDOW, (1, 1)), "col2im: cols: expected 384 contiguous"),
        (lambda: _core.max_pool(X, X, None, *WINDOW), "max_pool: y: expected 96 contiguous"),
        (lambda: _core.avg_pool(X[:, 1:], Y, *WINDOW, True), "avg_pool: x: expected a contiguous"),
        (
            lambda: _core.max_pool(X, Y, None, (2, 2), (1, 1), (2, 0)),
            "max_pool: padding: expected at most half",
        ),
        (
            lambda: _core.max_pool_backward(Y, np.full(Y.shape, 25, np.int32), X.copy(), *WINDOW),
            "max_pool_backward: index: expected positions in the plane",
        ),
        (lambda: _core.winograd_input(X, TILES, (1, 1)), "input: tiles: expected 864 contig"),
        (lambda: _core.winograd_input(X[:, :, :2].copy(), TILES, (0, 0)), "room for a 3x3 window"),
        (lambda: _core.winograd_output(TILES, X), "output: tiles: expected 864 contig"),
    ],
)
def test_the_core_checks_sizes_before_it_writes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- threads ---------------------------------------------------------------------------
THREADED = {
    "winograd": (lambda: nn.Conv2d(16, 16, 3, padding=1), (24, 16, 20, 20)),
    "windows": (lambda: nn.Conv2d(8, 32, 3, stride=2), (24, 8, 29, 29)),
    "1x1": (lambda: nn.Conv2d(32, 64, 1), (24, 32, 20, 20)),
    "groups": (lambda: nn.Conv2d(16, 16, 5, groups=4), (24, 16, 20, 20)),
    "linear": (lambda: nn.Linear(500, 300), (100, 500)),
    "residual": (lambda: nn.Residual(nn.ReLU()), (24, 16, 40, 40)),
    "max pool": (lambda: nn.MaxPool2d(2), (24, 16, 40, 40)),
    "avg pool": (lambda: nn.AvgPool2d(3, 2, 1), (24, 16, 40, 40)),
}


@pytest.mark.parametrize("case", THREADED)
def test_results_do_not_depend_on_threads(case, restore_threads, monkeypatch):
    build, shape = THREADED[case]
    bnext.manual_seed(0)
    layer, x = build(), normal(*shape, dtype=F32)
    pieces = []
    run = _blas.run
    monkeypatch.setattr(
        _blas, "run", lambda task, parts: (pieces.append(len(parts)), run(task, parts))
    )
    results = []
    for threads in (1, 2, 3, 8):
        bnext.set_num_threads(threads)
        layer.zero_grad()
        y, backward = layer.forward(x)
        grad_x = backward(normal(*y.shape, seed=1, dtype=F32))
        arrays = [y, grad_x, layer(x), *(parameter.grad for parameter in layer.parameters())]
        results.append([array.tobytes() for array in arrays])
    assert all(result == results[0] for result in results)
    # There was something to share.
    assert "pool" in case or min(pieces) > 1


def test_concurrent_calls():
    bnext.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    inputs = [normal(8, 16, 16, 16, seed=seed, dtype=F32) for seed in range(4)]
    expected = [layer(x) for x in inputs]
    wrong = []

    def work(x, y):
        for _ in range(10):
            if not np.array_equal(layer(x), y):
                wrong.append(x)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_convolution_after_fork():
    bnext.manual_seed(0)
    layer, x = nn.Conv2d(16, 16, 3, padding=1), normal(24, 16, 20, 20, dtype=F32)
    y = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(layer(x), y) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_run_shares_out_every_piece_and_passes_errors_on(restore_threads):
    parts = _blas.pieces(1000, 10**9)
    assert len(parts) > 1
    assert [i for part in parts for i in part] == list(range(1000))
    for threads in (1, 2):
        bnext.set_num_threads(threads)
        seen = []
        _blas.run(lambda i, part, _, seen=seen: seen.append((i, part)), parts)
        assert sorted(seen, key=lambda item: item[0]) == list(enumerate(parts))

        def fail(i, part, workspace):
            raise ZeroDivisionError(i)

        with pytest.raises(ZeroDivisionError):
            _blas.run(fail, parts)


def test_errstate_of_the_caller_holds_in_every_thread(restore_threads):
    bnext.set_num_threads(2)
    layer, x = nn.Linear(500, 300), np.full((100, 500), 3e38, F32)
    layer.weight.data[...] = 3e38
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isposinf(layer(x)).all()


def test_blas_gets_its_threads_back(monkeypatch):
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="limits the threads of BLAS")
    # Other tests may have loaded more BLAS libraries since it looked for them.
    monkeypatch.setattr(_blas._limit, "controller", None)

    def counts():
        infos = threadpoolctl.ThreadpoolController().select(user_api="blas").info()
        return [info["num_threads"] for info in infos]

    before = counts()
    with _blas.serial():
        assert all(count == 1 for count in counts())
        with _blas.serial():
            pass
        assert all(count == 1 for count in counts())
    assert counts() == before


def test_without_threadpoolctl(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(_blas._limit, "controller", None)
    layer, x = conv("winograd")
    expected = conv_reference(layer, x, layer.weight.data, layer.bias.data)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm(3),
        nn.SiLU(),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.InputStatistics(3),
        nn.Conv2d(3, 2, 3),
        nn.Linear(5, 2),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.GlobalAvgPool2d(),
        nn.Residual(nn.ReLU()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_byte_order_does_not_matter(layer):
    x = np.random.default_rng(0).normal(size=X.shape).astype(F32)
    y, backward = layer.forward(x)
    swapped, swapped_backward = layer.forward(x.astype(">f4"))
    assert swapped.dtype == np.float32
    np.testing.assert_array_equal(swapped, y)
    grad = np.ones_like(y)
    for call in (backward, swapped_backward):
        np.testing.assert_array_equal(call(grad.astype(">f4")), backward(grad))
