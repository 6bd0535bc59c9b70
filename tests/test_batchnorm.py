"""The BatchNorm layer: modes, running statistics, gradients, state."""

import warnings

import numpy as np
import pytest

import bnext
import reference
from bnext import functional as F
from bnext import nn
from cases import data
from gradcheck import gradcheck


def trained(**options):
    norm = nn.BatchNorm(3, **options)
    x = data((6, 3, 4, 4))
    norm.forward(x)
    return norm, x


def test_running_statistics_use_the_unbiased_variance():
    norm, x = trained(momentum=0.25)
    batch = reference.BatchNorm(x)
    count = x.size // 3
    np.testing.assert_allclose(norm.running_mean, 0.25 * batch.mean, rtol=1e-6)
    np.testing.assert_allclose(
        norm.running_var, 0.75 + 0.25 * batch.var * count / (count - 1), rtol=1e-6
    )
    assert norm.num_batches_tracked == 1


def test_cumulative_average():
    norm = nn.BatchNorm(3, momentum=None)
    batches = [data((6, 3, 4, 4), seed=seed) for seed in range(5)]
    for x in batches:
        norm.forward(x)
    means = np.mean([reference.BatchNorm(x).mean for x in batches], axis=0)
    np.testing.assert_allclose(norm.running_mean, means, rtol=1e-5)


def test_evaluation_uses_running_statistics_whatever_the_mode():
    norm, x = trained()
    expected = reference.BatchNorm(x, mean=norm.running_mean, var=norm.running_var).y
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    for mode in (norm.train, norm.eval):
        mode()
        np.testing.assert_allclose(norm(x), expected, atol=1e-5)
    np.testing.assert_allclose(norm.eval().forward(x)[0], expected, atol=1e-5)
    assert all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())


def test_without_running_statistics_evaluation_uses_the_batch():
    norm = nn.BatchNorm(3, track_running_stats=False)
    x = data((6, 3, 4, 4))
    assert set(norm.state_dict()) == {"weight", "bias"}
    np.testing.assert_allclose(norm(x), reference.BatchNorm(x).y, atol=1e-5)
    np.testing.assert_allclose(norm.eval().forward(x)[0], reference.BatchNorm(x).y, atol=1e-5)
    for run in (norm, norm.forward, norm.train().forward):
        with pytest.raises(ValueError, match=r"1 value per channel .* without running statistics"):
            run(x[:1, :, :1, :1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((4, 3, 3, 2), 1), ((4, 3, 2, 3), -1)])
def test_gradients(training, affine, activation, shape, axis):
    norm = nn.BatchNorm(
        3, affine=affine, activation=activation, channel_axis=axis, dtype=np.float64
    )
    rng = np.random.default_rng(0)
    for parameter in norm.parameters():
        parameter.data[...] = rng.normal(size=3)
    norm.running_mean[...] = rng.normal(size=3)
    norm.train(training)
    gradcheck(norm, data(shape, axis, np.float64))


def test_gradients_accumulate():
    norm, x = trained()
    _, backward = norm.forward(x)
    backward(x)
    once = norm.weight.grad.copy()
    backward(x)
    np.testing.assert_allclose(norm.weight.grad, 2 * once)
    norm.zero_grad()
    assert norm.weight.grad is None


def test_one_layer_used_twice_keeps_both_closures():
    norm = nn.BatchNorm(3)
    x, z = data((6, 3, 4)), data((5, 3, 7), seed=4)
    _, first = norm.forward(x)
    _, second = norm.forward(z)
    _, saved = F.batch_norm_forward(x, norm.weight.data, norm.bias.data)
    np.testing.assert_array_equal(first(np.cos(x)), F.batch_norm_backward(np.cos(x), saved).x)
    assert second(z).shape == z.shape


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_batch_leaves_running_statistics(bad):
    norm, x = trained()
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    x = x.copy()
    x[2, 1, 0, 0] = bad
    message = r"BatchNorm: step 2: .*not finite in 1 of 3 channels, the first is 1"
    with pytest.warns(RuntimeWarning, match=message):
        norm.forward(x)
    assert all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())


def test_empty_batch_changes_nothing():
    norm, x = trained()
    before = {key: value.copy() for key, value in norm.state_dict().items()}
    y, backward = norm.forward(x[:0])
    assert y.shape == backward(y).shape == x[:0].shape
    assert norm(x[:0]).shape == x[:0].shape
    assert (norm.weight.grad == 0).all()
    assert all(np.array_equal(value, before[key]) for key, value in norm.state_dict().items())


def test_keras_momentum_is_hinted_at():
    with pytest.warns(UserWarning, match=r"momentum 0.99 is 0.01 here"):
        nn.BatchNorm(3, momentum=0.99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.BatchNorm(3, momentum=0.1)


def test_weight_decay_spares_the_parameters():
    assert not any(parameter.decay for parameter in nn.BatchNorm(3).parameters())


def test_reset_and_state_round_trip():
    norm, x = trained(momentum=0.3)
    other = nn.BatchNorm(3)
    other.load_state_dict(norm.state_dict())
    np.testing.assert_array_equal(other(x), norm(x))
    norm.reset_running_stats()
    fresh = nn.BatchNorm(3).state_dict()
    assert all(np.array_equal(value, fresh[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (nn.BatchNorm1d, [(4, 3), (4, 3, 5)]),
        (nn.BatchNorm2d, [(4, 3, 5, 2)]),
        (nn.BatchNorm3d, [(4, 3, 2, 3, 2)]),
    ],
)
def test_names_for_each_rank(kind, shapes):
    for shape in shapes:
        x = data(shape)
        np.testing.assert_array_equal(kind(3).forward(x)[0], nn.BatchNorm(3).forward(x)[0])


def test_repr():
    assert repr(nn.BatchNorm(3)) == "BatchNorm(3, eps=1e-05, momentum=0.1)"
    assert "activation='relu'" in repr(nn.BatchNorm2d(3, activation="relu"))


def test_float64_layer_is_float64_throughout():
    norm = nn.BatchNorm(3, dtype=np.float64)
    y, backward = norm.forward(data((4, 3), dtype=np.float64))
    assert y.dtype == backward(y).dtype == norm.weight.grad.dtype == np.float64
    assert norm.running_mean.dtype == np.float64


def test_layer_forward_is_the_functional():
    bnext.manual_seed(0)
    norm, x = nn.BatchNorm(3, eps=0.1), data((4, 3, 5))
    expected, _ = F.batch_norm_forward(x, np.ones(3, "f"), np.zeros(3, "f"), eps=0.1)
    np.testing.assert_array_equal(norm.forward(x)[0], expected)
