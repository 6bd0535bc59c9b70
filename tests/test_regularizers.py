"""The penalty on squares and the limit for norms: values, gradients, units, bad arguments."""

import doctest

import numpy as np
import pytest

from bnext import nn, optim, regularizers
from bnext.nn.module import Parameter
from bnext.regularizers import l2_penalty, max_norm


def model(dtype=np.float64):
    return nn.Sequential(
        {
            "conv": nn.Conv2d(2, 3, (3, 2), groups=1, dtype=dtype),
            "norm": nn.BatchNorm(3, dtype=dtype),
            "linear": nn.Linear(4, 2, dtype=dtype),
        }
    )


def weights(layers):
    return {name: parameter.data.copy() for name, parameter in layers.named_parameters()}


# L2


@pytest.mark.parametrize("named", [True, False])
def test_l2_is_half_the_squares_of_the_weights(named):
    layers = model()
    parameters = layers.named_parameters() if named else layers.parameters()
    loss, backward = l2_penalty(parameters, 0.3)
    conv, linear = layers.state_dict()["conv.weight"], layers.state_dict()["linear.weight"]
    assert type(loss) is float
    np.testing.assert_allclose(loss, 0.15 * ((conv**2).sum() + (linear**2).sum()), rtol=1e-14)
    backward()
    backward(0.5)
    for name, parameter in layers.named_parameters():
        if name in ("conv.weight", "linear.weight"):
            np.testing.assert_allclose(parameter.grad, 0.45 * parameter.data, rtol=1e-14)
        else:
            assert parameter.grad is None


def test_l2_against_finite_differences():
    layers = model()
    l2_penalty(layers.parameters(), 0.7)[1]()
    for parameter in layers.parameters():
        flat = parameter.data.reshape(-1)
        numeric = np.zeros(flat.size)
        for i in range(flat.size):
            value, losses = flat[i], []
            for moved in (value + 1e-5, value - 1e-5):
                flat[i] = moved
                losses.append(l2_penalty(layers.parameters(), 0.7)[0])
            flat[i] = value
            numeric[i] = (losses[0] - losses[1]) / 2e-5
        grad = np.zeros(flat.size) if parameter.grad is None else parameter.grad.reshape(-1)
        np.testing.assert_allclose(grad, numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_l2_is_the_weight_decay_of_the_optimizer(kind):
    one, other = model(), model()
    other.load_state_dict(one.state_dict())
    penalized = kind(one.named_parameters(), lr=0.1)
    decayed = kind(other.named_parameters(), lr=0.1, weight_decay=0.2)
    for _ in range(3):
        for layers in (one, other):
            layers.zero_grad()
            for parameter in layers.parameters():
                parameter.accumulate(np.cos(parameter.data))
        l2_penalty(one.parameters(), 0.2)[1]()
        penalized.step()
        decayed.step()
    for name, value in weights(one).items():
        np.testing.assert_allclose(value, weights(other)[name], rtol=1e-12, err_msg=name)


def test_l2_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    layers = model()
    tensors = [torch.tensor(p.data, requires_grad=True) for p in layers.parameters() if p.decay]
    theirs = 0.1 / 2 * sum(tensor.square().sum() for tensor in tensors)
    theirs.backward()
    loss, backward = l2_penalty(layers.parameters(), 0.1)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-14)
    backward()
    ours = [parameter.grad for parameter in layers.parameters() if parameter.decay]
    for grad, tensor in zip(ours, tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-14)


def test_l2_of_huge_and_of_no_weights():
    weight = Parameter(np.full((2, 2), 1e30, np.float32))
    loss, backward = l2_penalty([weight], 1e-30)
    np.testing.assert_allclose(loss, 2e30, rtol=1e-6)
    backward()
    assert weight.grad.dtype == np.float32
    np.testing.assert_allclose(weight.grad, 1, rtol=1e-6)
    loss, backward = l2_penalty([], 1)
    assert loss == 0
    backward()


# Max-norm


def unit_norms(weight):
    return np.sqrt((weight.reshape(len(weight), -1).astype(np.float64) ** 2).sum(axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_units_are_shortened_and_others_keep_their_bits(dtype):
    layers = model(dtype)
    for name in ("conv", "linear"):
        weight = layers.state_dict()[f"{name}.weight"]
        weight[0] *= 2 / unit_norms(weight)[0]
        weight[1] *= 0.5 / unit_norms(weight)[1]
    before = weights(layers)
    max_norm(layers.parameters(), 1)
    after = weights(layers)
    for name, weight in after.items():
        if name not in ("conv.weight", "linear.weight"):
            np.testing.assert_array_equal(weight, before[name])
            continue
        norms = unit_norms(before[name])
        for unit, row in enumerate(weight):
            if norms[unit] > 1:
                np.testing.assert_allclose(
                    row, before[name][unit] / norms[unit], rtol=4 * np.finfo(dtype).eps
                )
            else:
                np.testing.assert_array_equal(row, before[name][unit])


def test_max_norm_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    rng = np.random.default_rng(0)
    for shape in ((7, 5), (4, 3, 2, 2)):
        weight = Parameter(rng.normal(size=shape))
        theirs = torch.renorm(torch.tensor(weight.data), 2, 0, 1.7).numpy()
        max_norm([("weight", weight)], 1.7)
        # torch.renorm adds 1e-7 to the norm.
        np.testing.assert_allclose(weight.data, theirs, rtol=2e-7)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_the_option_of_the_optimizers_is_max_norm_after_each_step(kind):
    one, other = model(), model()
    other.load_state_dict(one.state_dict())
    limited = kind(one.named_parameters(), lr=0.3, max_norm=0.9)
    plain = kind(other.named_parameters(), lr=0.3)
    longest = 0.0
    for _ in range(5):
        for layers in (one, other):
            layers.zero_grad()
            for parameter in layers.parameters():
                parameter.accumulate(-np.ones_like(parameter.data))
        limited.step()
        plain.step()
        longest = max(longest, *unit_norms(other.state_dict()["conv.weight"]))
        max_norm(other.parameters(), 0.9)
        np.testing.assert_equal(weights(one), weights(other))
    assert longest > 0.9, "the limit never mattered"


def test_rows_of_zeros_huge_rows_and_nan():
    weight = Parameter(np.array([[0, 0], [1e30, 0], [np.nan, 9], [3, 4]], np.float32))
    max_norm([weight], 1)
    np.testing.assert_allclose(weight.data[[0, 1, 3]], [[0, 0], [1, 0], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(weight.data[2], [np.nan, 9])
    max_norm([Parameter(np.zeros((0, 3))), Parameter(np.zeros(()))], 1)


def test_arrays_that_are_not_contiguous():
    base = np.arange(12.0).reshape(3, 4)
    weight = Parameter(base.T)
    expected = base.T / np.maximum(unit_norms(base.T), 1)[:, np.newaxis]
    max_norm([weight], 1)
    assert np.shares_memory(weight.data, base)
    np.testing.assert_allclose(weight.data, expected, rtol=1e-15)


def test_weights_whose_squares_overflow():
    weight = Parameter(np.array([[1e200, 1e200], [3e-1, 4e-1]]))
    max_norm([weight], 1)
    np.testing.assert_allclose(weight.data, [[0.5**0.5, 0.5**0.5], [0.3, 0.4]], rtol=1e-15)


W = Parameter(np.ones((2, 2)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: l2_penalty([W], -1), ValueError, "l2_penalty: strength: .* >= 0, got -1"),
        (lambda: l2_penalty([W], np.inf), ValueError, "l2_penalty: strength: .*, got inf"),
        (lambda: l2_penalty([W], "a"), TypeError, "l2_penalty: strength: .* a number, got str"),
        (lambda: l2_penalty([W.data], 1), TypeError, "l2_penalty: parameters: .*, got ndarray"),
        (lambda: max_norm([W], 0), ValueError, "max_norm: limit: .* > 0, got 0"),
        (lambda: max_norm([W], np.nan), ValueError, "max_norm: limit: .*, got nan"),
        (lambda: max_norm([W], None), TypeError, "max_norm: limit: .* a number, got NoneType"),
        (lambda: max_norm([("a", 1)], 1), TypeError, "max_norm: parameters: .*, got int"),
        (lambda: optim.SGD([W], 1, max_norm=0), ValueError, "SGD: max_norm: .* > 0, got 0"),
        (lambda: optim.AdamW([W], max_norm=-1), ValueError, "AdamW: max_norm: .*, got -1"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match="^" + message) as info:
        call()
    assert type(info.value) is error
    np.testing.assert_array_equal(W.data, 1)


def test_examples():
    result = doctest.testmod(regularizers)
    assert result.attempted >= 7
    assert result.failed == 0
