"""The models build with every option, train, and say what is wrong with an option."""

import itertools

import numpy as np
import pytest

import bnext
from bnext import models, nn
from bnext.losses import softmax_cross_entropy
from bnext.optim import SGD
from gradcheck import gradcheck

INPUTS = {"mlp": (6,), "cnn": (1, 6, 5), "resnet": (2, 5, 4)}
SMALL = dict(depth=1, width=4)


def build(name, **options):
    bnext.manual_seed(0)
    return models.build(name, INPUTS[name], 3, **{**SMALL, **options})


def batch(name, n=4, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(n, *INPUTS[name])).astype(dtype)


def randomize(model):
    """Weights of their own everywhere: the zeros that blocks begin with hide gradients."""
    rng = np.random.default_rng(1)
    for parameter in model.parameters():
        parameter.data[...] = rng.normal(0.3, 0.5, parameter.data.shape)


OPTIONS = [
    dict(norm=norm, norm_position=position, dropout=dropout, dropout_position=place)
    for norm, position, (dropout, place) in itertools.product(
        models.NORMS,
        models.NORM_POSITIONS,
        [(0.0, "head"), *((0.3, place) for place in models.DROPOUT_POSITIONS)],
    )
    if not (norm == "none" and place == "before-norm")
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
@pytest.mark.parametrize("name", models.names())
def test_every_combination(name, options):
    model = build(name, **options)
    x = batch(name)
    y, backward = model.forward(x)
    assert y.shape == (4, 3)
    assert y.dtype == np.float32
    assert backward(np.ones_like(y)).shape == x.shape
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model(x).shape == (4, 3)
    kinds = [type(module) for module in model.modules()]
    assert (nn.BatchNorm in kinds) == (options["norm"] == "batch")
    assert (nn.Dropout in kinds) == (options["dropout"] > 0)


@pytest.mark.parametrize("position", models.NORM_POSITIONS)
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("name", models.names())
def test_gradients(name, norm, position):
    model = build(name, norm=norm, norm_position=position, width=2, dtype=np.float64)
    randomize(model)
    gradcheck(model, batch(name, 3, np.float64), checked=30)


@pytest.mark.parametrize("place", models.DROPOUT_POSITIONS)
def test_gradients_with_dropout(place):
    model = build("resnet", dropout=0.3, dropout_position=place, width=2, dtype=np.float64)
    randomize(model)
    # A seed whose masks leave no value next to the corner of a ReLU.
    gradcheck(
        model, batch("resnet", 3, np.float64), before=lambda: bnext.manual_seed(1), checked=30
    )


def layer_kinds(model):
    """The layers of a plain model in order, an activation inside BatchNorm spelled out."""
    kinds = []
    for module in model.modules():
        if not list(module.children()):
            kinds.append(type(module).__name__)
            if getattr(module, "activation", None):
                kinds.append(module.activation)
    return kinds


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        (dict(), ["BatchNorm", "relu"]),
        (dict(norm_position="after"), ["ReLU", "BatchNorm"]),
        (dict(norm="none"), ["ReLU"]),
        (
            dict(dropout=0.1, dropout_position="after-activation"),
            ["BatchNorm", "relu", "Dropout"],
        ),
        (dict(dropout=0.1, dropout_position="before-norm"), ["Dropout", "BatchNorm", "relu"]),
        (
            dict(norm_position="after", dropout=0.1, dropout_position="after-activation"),
            ["ReLU", "Dropout", "BatchNorm"],
        ),
        (
            dict(norm_position="after", dropout=0.1, dropout_position="before-norm"),
            ["ReLU", "Dropout", "BatchNorm"],
        ),
        (dict(norm="none", dropout=0.1, dropout_position="after-activation"), ["ReLU", "Dropout"]),
    ],
)
def test_order_of_layers(options, hidden):
    assert layer_kinds(build("mlp", **options)) == ["Flatten", "Linear", *hidden, "Linear"]


def test_dropout_of_the_head():
    kinds = layer_kinds(build("mlp", dropout=0.1))
    assert kinds == ["Flatten", "Linear", "BatchNorm", "relu", "Dropout", "Linear"]


@pytest.mark.parametrize("name", models.names())
def test_bias_only_where_normalization_does_not_cancel_it(name):
    def biases(**options):
        model = build(name, **options)
        hidden = [
            layer
            for path, layer in model.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not path.startswith("head")
        ]
        assert hidden
        return {layer.bias is not None for layer in hidden}

    assert biases() == {False}
    assert biases(norm_position="after") == {True}
    assert biases(norm="none") == {True}


@pytest.mark.parametrize(
    ("name", "layers"),
    [("mlp", (1, 2, 3)), ("cnn", (2, 4, 6)), ("resnet", (7, 13, 19))],
)
def test_depth_and_width(name, layers):
    """Hidden linear and 3x3 layers; without the 1x1 convolutions of shortcuts."""
    for depth, expected in zip((1, 2, 3), layers, strict=True):
        model = models.build(name, (1, 8, 8), 3, depth=depth, width=5)
        hidden = [
            layer
            for path, layer in model.named_modules()
            if (isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3))
            or (isinstance(layer, nn.Linear) and not path.startswith("head"))
        ]
        assert len(hidden) == expected
        assert hidden[0].weight.data.shape[0] == 5


def test_default_resnet():
    model = models.build("resnet", (1, 28, 28), 10)
    assert sum(parameter.data.size for parameter in model.parameters()) == 307_690
    assert model(np.zeros((2, 1, 28, 28), np.float32)).shape == (2, 10)


@pytest.mark.parametrize("norm", models.NORMS)
def test_residual_blocks_begin_as_the_identity(norm):
    model = build("resnet", norm=norm)
    blocks = [module for module in model.modules() if isinstance(module, nn.Residual)]
    assert len(blocks) == 3
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(blocks[0](x), x)


@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("name", models.names())
def test_training_fits_a_batch(name, norm):
    model = build(name, norm=norm, width=8)
    optimizer = SGD(model.named_parameters(), 0.1, momentum=0.9)
    x, labels = batch(name, 12), np.arange(12) % 3
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        logits, backward = model.forward(x)
        loss, loss_backward = softmax_cross_entropy(logits, labels)
        backward(loss_backward())
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize("name", models.names())
def test_weights_follow_from_the_seed(name):
    first, second = build(name).state_dict(), build(name).state_dict()
    assert first.keys() == second.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key])


@pytest.mark.parametrize("name", models.names())
def test_state_round_trip(name):
    first, second = build(name), build(name)
    randomize(first)
    first.forward(batch(name))
    x = batch(name, 2)
    assert not np.array_equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(first(x), second(x))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("vgg", (4,), 2), {}, "name: expected one of mlp, cnn, resnet, got 'vgg'"),
        (("mlp", (4,), 2), dict(norm="layer"), "norm: expected one of batch, none, got 'layer'"),
        (("mlp", (4,), 2), dict(norm_position="mid"), "norm_position: expected one of before, af"),
        (("mlp", (4,), 2), dict(dropout_position="x"), "dropout_position: expected one of head"),
        (("mlp", (4,), 2), dict(dropout=1.0), r"dropout: expected a number in \[0, 1\), got 1.0"),
        (("mlp", (4,), 2), dict(dropout=float("nan")), "dropout: expected a number"),
        (("mlp", (4,), 2), dict(depth=0), "depth: expected 1 or more, got 0"),
        (("mlp", (4,), 2), dict(width=-1), "width: expected 1 or more, got -1"),
        (("mlp", (4,), 0), {}, "num_classes: expected 1 or more, got 0"),
        (("mlp", (), 2), {}, r"input_shape: expected sizes of 1 or more, got \(\)"),
        (("mlp", (0,), 2), {}, r"input_shape: expected sizes of 1 or more, got \(0,\)"),
        (("cnn", (4,), 2), {}, r"input_shape: cnn expects images \(C, H, W\), got \(4,\)"),
        (
            ("cnn", (1, 8, 8), 2),
            dict(depth=4),
            "input_shape: cnn with 4 poolings expects images of 16x16",
        ),
        (("resnet", (1, 3, 8), 2), {}, "input_shape: resnet with 2 poolings expects images of 4x4"),
        (
            ("mlp", (4,), 2),
            dict(norm="none", dropout=0.5, dropout_position="before-norm"),
            'dropout_position: "before-norm" needs norm "batch"',
        ),
    ],
)
def test_wrong_options(arguments, options, message):
    with pytest.raises(ValueError, match=f"^models.build: {message}"):
        models.build(*arguments, **options)
