"""bnext.reestimate: pooled statistics, and nothing else changed."""

import numpy as np
import pytest

import bnext
from bnext import nn
from bnext.data import batches
from cases import data


def deep():
    bnext.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, activation="relu"),
        nn.Dropout(0.5),
        nn.Residual(nn.Sequential(nn.BatchNorm2d(3, dropout=0.3), nn.Conv2d(3, 3, 1))),
        nn.BatchNorm2d(3),
    )


X = data((12, 2, 6, 5), offset=30.0)
PIECES = [X[:3], X[3:10], X[10:]]


def state(model):
    return {key: value.copy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("axis", [1, -1])
def test_pooled_is_exact(offset, axis):
    """As if all samples had been one batch, however they are batched."""
    x = (data((12, 3, 6, 3), axis, np.float64, offset=1.0) + offset).astype(np.float32)
    norm = nn.BatchNorm(3, channel_axis=axis)
    (row,) = bnext.reestimate(norm, [x[:2], x[2:3], x[:0], x[3:]])
    values = np.moveaxis(x, axis, -1).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(norm.running_mean, values.mean(0), rtol=2e-7)
    np.testing.assert_allclose(norm.running_var, values.var(0, ddof=1), rtol=1e-6)
    assert norm.num_batches_tracked == 3
    assert row.values == len(values)
    assert row.mean_before == 0
    assert row.var_before == 1
    assert row.mean_after == pytest.approx(norm.running_mean.mean())
    shift = abs(norm.running_mean) / np.sqrt(norm.running_var + norm.eps)
    assert row.mean_shift == pytest.approx(shift.max(), rel=1e-5)
    ratio = (1 + norm.eps) / (norm.running_var + norm.eps)
    assert row.var_ratio == pytest.approx(ratio[abs(np.log(ratio)).argmax()], rel=1e-5)


def test_layers_see_what_normalized_batches_make():
    """By hand: each layer normalizes by its batch; dropout is off."""
    model = deep()
    table = bnext.reestimate(model, PIECES)
    assert [row.name for row in table] == ["1", "3.body.0", "4"]
    conv, first, _, residual, last = model
    second, conv2 = residual.body

    def normalized(x, norm):
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        return np.maximum((x - mean) / np.sqrt(var + norm.eps), 0 if norm is first else -np.inf)

    inputs = {first: [], second: [], last: []}
    for x in PIECES:
        inputs[first].append(conv(x))
        x = normalized(inputs[first][-1], first)
        inputs[second].append(x)
        x = conv2(normalized(x, second).astype(np.float32)) + x
        inputs[last].append(x)
    for norm, parts in inputs.items():
        whole = np.concatenate(parts).astype(np.float64)
        np.testing.assert_allclose(norm.running_mean, whole.mean((0, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(norm.running_var, whole.var((0, 2, 3), ddof=1), rtol=1e-5)


def test_nothing_else_changes():
    model = deep()
    model[1].freeze(stats=False)
    model[3].eval()
    before = state(model)
    modes = [module.training for module in model.modules()]
    offset = bnext.random.default_generator.state
    with nn.stats_updates(model, False):
        bnext.reestimate(model, ((x, None) for x in PIECES))
    changed = {key for key, value in state(model).items() if not np.array_equal(value, before[key])}
    assert all(key.split(".")[-1].startswith(("running", "num_batches")) for key in changed)
    assert len(changed) == 9
    assert [module.training for module in model.modules()] == modes
    assert bnext.random.default_generator.state == offset
    assert all(parameter.grad is None for parameter in model.parameters())
    after = state(model)
    model.train().forward(X[:5])
    assert not np.array_equal(model[1].running_mean, after["1.running_mean"])


def test_frozen_statistics_stay():
    model = deep()
    model[1].freeze()
    # It normalizes as in evaluation: without dropout too.
    model[1].dropout, model[1].generator = 0.5, bnext.Generator(1)
    before = state(model[1])
    table = bnext.reestimate(model, PIECES)
    assert [row.name for row in table] == ["3.body.0", "4"]
    assert model[1].generator.state["offset"] == 0
    assert all(np.array_equal(value, before[key]) for key, value in model[1].state_dict().items())


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm(2, ghost_batch_size=2),
        nn.BatchNorm(2, momentum=None, banks=("a", "b")),
        nn.BatchNorm(2, momentum=0.0),
        nn.BatchNorm(2, channel_mask=[True, False]),
        nn.BatchRenorm(2),
    ],
    ids=repr,
)
def test_variants(norm):
    norm.running_mean[...], norm.running_var[...] = np.inf, np.nan  # what was there is not used
    bnext.reestimate(norm, PIECES)
    mean, var = X.astype(float).mean((0, 2, 3)), X.astype(float).var((0, 2, 3), ddof=1)
    if isinstance(norm, nn.BatchRenorm):
        var = X.astype(float).var((0, 2, 3))
    on = slice(None) if norm.channel_mask is None else norm.channel_mask
    np.testing.assert_allclose(norm.running_mean[on], mean[on], rtol=1e-6)
    np.testing.assert_allclose(norm.running_var[on], var[on], rtol=1e-6)
    if norm.channel_mask is not None:
        assert np.isinf(norm.running_mean[1])
    if norm.banks:
        assert (norm.b.running_var == 1).all()


def test_evaluation_agrees_with_training_on_the_same_data():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3))
    x = data((64, 4))
    bnext.reestimate(model, [x])
    np.testing.assert_allclose(model(x), model.forward(x)[0], rtol=0.01)


def test_batches_of_data_are_a_loader():
    norm = nn.BatchNorm(2)
    (row,) = bnext.reestimate(norm, batches(X, np.arange(12), 5, shuffle=True))
    assert row.values == 12 * 30


def test_a_layer_that_nothing_reaches():
    model = nn.Residual(nn.BatchNorm(2))
    model.unused = nn.BatchNorm(3)
    first, second = bnext.reestimate(model, PIECES)
    assert (first.values, second.values) == (12 * 30, 0)
    assert second.mean_shift == 0
    assert second.var_ratio == 1
    assert model.unused.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("model", "loader", "error", "message"),
    [
        (nn.Linear(2, 2), PIECES, ValueError, "model: expected BatchNorm layers .*, got none"),
        (nn.BatchNorm(2).freeze(), PIECES, ValueError, "that are not frozen, got none"),
        (nn.BatchNorm(2, channel_mask=[False] * 2), PIECES, ValueError, "got none"),
        (nn.BatchNorm(2), [], ValueError, "loader: expected one batch or more, got none"),
        (nn.BatchNorm(2), X, TypeError, r"iterable of batches, such as \[x\], got nda"),
        (
            nn.BatchNorm(2),
            [*PIECES, np.full_like(X, np.nan)],
            ValueError,
            "BatchNorm: statistics are not finite in 2 of 2 channels, the first is 0",
        ),
        (nn.BatchNorm(2), [X, X[:1, :, :1, :1]], ValueError, "1 value per channel"),
        (nn.BatchNorm(2), [X, X[:, :1]], ValueError, "expected 2 channels"),
    ],
    ids=repr,
)
def test_errors_change_nothing(model, loader, error, message):
    model.eval()
    before = state(model)
    with pytest.raises(error, match=message):
        bnext.reestimate(model, loader)
    assert all(np.array_equal(value, before[key]) for key, value in state(model).items())
    assert not model.training
    if isinstance(model, nn.BatchNorm):
        assert model._observer is None
