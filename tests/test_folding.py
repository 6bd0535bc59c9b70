"""bnext.fold: the same results from fewer layers."""

import numpy as np
import pytest

import bnext
from bnext import models, nn
from bnext.nn.activation import activation_layer
from cases import data


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    for _, norm in nn.batchnorm.batch_norms(model):
        for parameter in norm.parameters():
            parameter.data[...] = rng.normal(1, 0.5, norm.num_features)
        if norm.track_running_stats:
            norm.running_mean[...] = rng.normal(size=norm.num_features)
            norm.running_var[...] = rng.uniform(0.2, 3, norm.num_features)
    return model.eval()


def sequence(*layers):
    return randomized(nn.Sequential(*layers))


IMAGES = data((3, 2, 7, 6))
ROWS = data((9, 4))

# What there is, its probe, and the names of the layers that the copy has.
MODELS = {
    "conv": (sequence(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), IMAGES, ["0"]),
    "conv without bias": (
        sequence(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm(3, activation="relu"), nn.Flatten()),
        IMAGES,
        ["0", "1", "2"],
    ),
    "groups": (sequence(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm(4)), IMAGES, ["0"]),
    "winograd": (
        sequence(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm(8)),
        IMAGES,
        ["0", "1"],
    ),
    "linear": (sequence(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), ROWS, ["0", "2"]),
    "linear, leaky": (
        sequence(nn.Linear(4, 5), nn.BatchNorm(5, activation="leaky_relu", negative_slope=0.3)),
        ROWS,
        ["0", "1"],
    ),
    "linear, 3 axes": (
        sequence(nn.Linear(4, 5), nn.BatchNorm(5, channel_axis=-1)),
        data((2, 3, 4)),
        ["0"],
    ),
    "not affine": (sequence(nn.Linear(4, 5), nn.BatchNorm(5, affine=False)), ROWS, ["0"]),
    "masked": (
        sequence(nn.Linear(4, 3), nn.BatchNorm(3, channel_mask=[True, False, True])),
        ROWS,
        ["0"],
    ),
    "renormalized": (sequence(nn.Linear(4, 5), nn.BatchRenorm(5)), ROWS, ["0"]),
    "banks": (sequence(nn.Linear(4, 5), nn.BatchNorm(5, banks=("a",))), ROWS, ["0"]),
    "two": (
        sequence(nn.Linear(4, 5), nn.BatchNorm(5), nn.Linear(5, 3), nn.BatchNorm(3), nn.ReLU()),
        ROWS,
        ["0", "2", "4"],
    ),
    "nested": (
        sequence(nn.Residual(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm(2))), nn.Dropout(0.5)),
        IMAGES,
        ["0", "0.body", "0.body.0", "1"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_results_are_the_same(case):
    model, probe, names = MODELS[case]
    before = {key: value.copy() for key, value in model.state_dict().items()}
    result = bnext.fold(model, probe)
    assert [name for name, _ in result.model.named_modules()] == ["", *names]
    assert len(result.folded) == len(list(nn.batchnorm.batch_norms(model)))
    assert result.kept == {}
    y, expected = result.model(probe), model(probe)
    assert result.error == abs(y - expected).max()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert all(np.array_equal(value, before[key]) for key, value in model.state_dict().items())
    np.testing.assert_array_equal(result.model.forward(probe)[0], y)


def test_by_hand():
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm(1, eps=0.0)
    conv.weight.data[...], conv.bias.data[...] = 3, 1
    norm.running_mean[...], norm.running_var[...] = 2, 4
    norm.weight.data[...], norm.bias.data[...] = 10, 7
    model = bnext.fold(nn.Sequential(conv, norm).eval(), np.ones((1, 1, 1, 1), "f")).model
    assert model[0].weight.data.item() == 15  # 3 * 10 / 2
    assert model[0].bias.data.item() == 2  # (1 - 2) * 10 / 2 + 7
    assert not model[0].bias.decay


@pytest.mark.parametrize("activation", bnext.functional.activations[1:])
def test_activations_become_layers(activation):
    norm = nn.BatchNorm(5, activation=activation, negative_slope=0.3)
    model = sequence(nn.Linear(4, 5), norm)
    result = bnext.fold(model, ROWS)
    assert type(result.model[1]) is type(activation_layer(activation))
    assert not any(module.training for module in result.model.modules())
    np.testing.assert_allclose(result.model(ROWS), model(ROWS), rtol=1e-5, atol=1e-5)


shared = nn.Linear(4, 4)


def tied(layer):
    layer.weight = shared.weight
    return layer


@pytest.mark.parametrize(
    ("model", "probe", "reason"),
    [
        (sequence(nn.BatchNorm(4), nn.Linear(4, 3)), ROWS, "no Conv2d or Linear directly before"),
        (sequence(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm(3)), ROWS, "no Conv2d or Linear"),
        (nn.BatchNorm(4).eval(), ROWS, "no Conv2d or Linear directly before it"),
        (
            sequence(nn.Linear(4, 3), nn.BatchNorm(3, track_running_stats=False)),
            ROWS,
            "no running statistics",
        ),
        (sequence(nn.Conv2d(2, 3, 3), nn.BatchNorm(4, channel_axis=-1)), IMAGES, "another axis"),
        (sequence(nn.Linear(4, 5), nn.BatchNorm(3)), data((2, 3, 4)), "another axis"),
        (sequence(nn.Linear(4, 3), nn.BatchNorm(3)), data((2, 3, 4)), "another axis"),
        (sequence(shared, nn.BatchNorm(4), nn.ReLU(), shared), ROWS, "Linear '3' is used in 2"),
        (
            sequence(tied(nn.Linear(4, 4)), nn.BatchNorm(4), tied(nn.Linear(4, 4))),
            ROWS,
            "the weight of Linear '0' is used in 2 places",
        ),
    ],
)
def test_what_cannot_be_folded_is_kept(model, probe, reason):
    result = bnext.fold(model, probe)
    assert result.folded == {}
    assert result.error == 0
    ((_, why),) = result.kept.items()
    assert reason in why


@pytest.mark.parametrize("name", models.names())
def test_models(name):
    shape = (64,) if name == "mlp" else (1, 8, 8)
    model = randomized(models.build(name, shape, 10, width=4))
    probe = data((5, *shape))
    result = bnext.fold(model, probe)
    assert len(result.folded) + len(result.kept) == len(list(nn.batchnorm.batch_norms(model)))
    assert result.folded
    assert result.error < 1e-4


def test_training_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3))
    with pytest.raises(ValueError, match=r"fold: model: expected evaluation mode, .*call eval\(\)"):
        bnext.fold(model, ROWS)
    model.eval()[1].train()
    with pytest.raises(ValueError, match="got BatchNorm '1' in training mode"):
        bnext.fold(model, ROWS)


def test_a_fold_that_gives_other_results_is_refused():
    class Reversed(nn.Sequential):
        def __call__(self, x):
            for layer in reversed(list(self)):
                x = layer(x)
            return x

    model = randomized(Reversed(nn.Linear(4, 4), nn.BatchNorm(4)))
    with pytest.raises(ValueError, match=r"fold: probe: expected results within .* folding 1"):
        bnext.fold(model, ROWS)
