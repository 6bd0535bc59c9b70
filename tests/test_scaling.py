"""Scaled gradients: the pairs, the formulas, the three regimes, steps in other coordinates."""

import doctest
import warnings

import numpy as np
import pytest

import bnext
from bnext import models, nn, optim, scaling
from bnext.losses import softmax_cross_entropy
from bnext.nn import input_statistics
from bnext.scaling import BNP, BatchNormScaling, GradientScaling

F32, F64 = np.float32, np.float64


def linear(inputs, outputs, bias=False):
    return nn.Linear(inputs, outputs, bias, dtype=F64)


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, bias=False, dtype=F64, **options)


def norm(channels, **options):
    return nn.BatchNorm(channels, dtype=F64, **options)


def step(model, optimizer, x, labels):
    """One step on the cross-entropy; the loss before it."""
    optimizer.zero_grad()
    logits, backward = model.forward(x)
    loss, loss_backward = softmax_cross_entropy(logits, labels)
    backward(loss_backward())
    optimizer.step()
    return loss


def weights(model):
    return {name: parameter.data.copy() for name, parameter in model.named_parameters()}


def batch(n=12, *shape, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(1, 2, (n, *shape)), rng.integers(0, classes, n)


# Which pairs there are


def residual(**options):
    return nn.Residual(
        nn.Sequential(norm(4), conv(4, 4, padding=1), norm(4), conv(4, 4)), **options
    )


def shared():
    layer = linear(4, 4)
    return nn.Sequential(layer, norm(4), layer, norm(4), linear(4, 4), norm(4))


def shared_norm():
    layer = norm(4, affine=False)
    return nn.Sequential(linear(4, 4), layer, linear(4, 4), layer, linear(4, 4), norm(4))


class Unknown(nn.Module):
    """What its forward does with the layers is not known."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(4, 4), norm(4)
        self.inner = nn.Sequential(conv(4, 4), norm(4))


PAIRS = [
    (lambda: nn.Sequential(linear(3, 4), norm(4)), ["0 -> 1"]),
    (lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)), ["0 -> 1"]),
    (lambda: nn.Sequential(linear(3, 4), norm(4, channel_axis=-1)), ["0 -> 1"]),
    # Nested sequences are one.
    (
        lambda: nn.Sequential(nn.Sequential(conv(3, 4)), nn.Sequential(norm(4), nn.ReLU())),
        ["0.0 -> 1.0"],
    ),
    # The output of the first goes past the norm as well, that of the last is added to.
    (
        lambda: nn.Sequential({"a": conv(4, 4), "block": residual(), "b": norm(4)}),
        ["block.body.1 -> block.body.2"],
    ),
    (
        lambda: nn.Sequential(residual(shortcut=nn.Sequential(conv(4, 4), norm(4)))),
        ["0.body.1 -> 0.body.2", "0.shortcut.0 -> 0.shortcut.1"],
    ),
    (shared, ["4 -> 5"]),
    (shared_norm, ["4 -> 5"]),
    (Unknown, ["inner.0 -> inner.1"]),
    (lambda: models.build("mlp", (5,), 3, depth=2), ["linear1 -> norm1", "linear2 -> norm2"]),
    (
        lambda: models.build("cnn", (1, 8, 8), 3, depth=1, dropout=0.1),
        ["conv1a -> norm1a", "conv1b -> norm1b"],
    ),
    (
        lambda: models.build("resnet", (1, 8, 8), 3),
        [f"stage{i}_block1.body.conv1 -> stage{i}_block1.body.norm2" for i in (1, 2, 3)],
    ),
]
NO_PAIRS = [
    lambda: linear(3, 4),
    lambda: nn.Sequential(norm(4), linear(4, 4)),
    lambda: nn.Sequential(linear(4, 4), nn.ReLU(), norm(4)),
    lambda: nn.Sequential(linear(4, 4), nn.Dropout(0.1), norm(4)),
    lambda: nn.Sequential(linear(3, 4), norm(4, track_running_stats=False)),
    lambda: nn.Sequential(conv(3, 4), norm(4, channel_axis=-1)),
    lambda: nn.Sequential(linear(4, 8), norm(4)),  # (N, 4, 8): not the rows of the weight
    lambda: nn.Sequential(residual(), norm(4))[0].body[0],
    lambda: models.build("mlp", (5,), 3, norm="none"),
    lambda: models.build("mlp", (5,), 3, norm_position="after"),
]


@pytest.mark.parametrize(("model", "pairs"), PAIRS)
def test_pairs(model, pairs):
    found = BatchNormScaling(model())
    assert [f"{first} -> {second}" for first, second in found.pairs] == pairs
    assert repr(found).splitlines()[1:] == [f"  {pair}" for pair in pairs]
    assert set(found.scales()) == set(found.pairs)


@pytest.mark.parametrize("model", NO_PAIRS)
def test_no_pairs(model):
    with pytest.raises(ValueError, match=r"^BatchNormScaling: model: .* BatchNorm .*, found none$"):
        BatchNormScaling(model())


def test_pairs_of_bnp():
    model = nn.Sequential(
        nn.InputStatistics(3),
        nn.Conv2d(3, 4, 1),
        nn.InputStatistics(4),
        nn.Conv2d(4, 4, 1, bias=False),  # nothing to take the mean from
        nn.InputStatistics(4),
        nn.GlobalAvgPool2d(),
        nn.InputStatistics(4),
        nn.Linear(4, 2),
    )
    assert BNP(model).pairs == (("0", "1"), ("6", "7"))
    for bad in (model[1], nn.Sequential(nn.InputStatistics(3, channel_axis=-1), model[1])):
        with pytest.raises(ValueError, match=r"^BNP: model: .* InputStatistics .*, found none$"):
            BNP(bad)


# The formula


def expected_scales(norm, alpha, ref, clip, divide):
    var = np.asarray(norm.running_var, F64) + norm.eps
    ref = np.prod(var) ** (1 / len(var)) if ref == "geometric_mean" else ref
    s = (var / ref) ** alpha
    if clip is not None:
        s = np.minimum(np.maximum(s, clip[0]), clip[1])
    return s / np.maximum(abs(norm.weight.data), 0.1) if divide else s


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("clip", [None, (0.1, 10), (0.5, 2)])
@pytest.mark.parametrize("ref", ["geometric_mean", 1, 0.25])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize(
    "layer",
    [
        lambda dtype: nn.Linear(3, 4, dtype=dtype),
        lambda dtype: nn.Conv2d(2, 4, 3, groups=2, dtype=dtype),
    ],
)
def test_the_formula(layer, alpha, ref, clip, divide, dtype):
    layer, after = layer(dtype), nn.BatchNorm(4, dtype=dtype)
    after.running_var[...] = [1e-3, 0.3, 5, 400]
    after.weight.data[...] = [1, -0.5, 0.01, 3]
    model = nn.Sequential(layer, after)
    scaled = BatchNormScaling(model, alpha, ref=ref, clip=clip, divide_by_weight=divide)
    s = expected_scales(after, alpha, ref, clip, divide)
    np.testing.assert_allclose(scaled.scales()["0", "1"], s, rtol=1e-12)

    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.accumulate(rng.normal(size=parameter.data.shape).astype(dtype))
    before = weights(model)
    grads = {name: p.grad.copy() for name, p in model.named_parameters()}
    optim.SGD(model.named_parameters(), lr=0.5, scaling=scaled).step()
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.grad, grads[name], err_msg="step changed it")
        rows = s.reshape(-1, *[1] * (parameter.data.ndim - 1)) if name == "0.weight" else 1
        np.testing.assert_allclose(
            parameter.data,
            before[name] - 0.5 * rows * grads[name],
            rtol=10 * np.finfo(dtype).eps,
            atol=10 * np.finfo(dtype).eps,
        )


def test_channels_without_variance():
    after = norm(3, eps=0)
    after.running_var[...] = [0, 1, 4]
    model = nn.Sequential(linear(2, 3), after)
    for alpha, expected in ((1, [0.1, 0.5, 2]), (0, [1, 1, 1])):
        np.testing.assert_allclose(BatchNormScaling(model, alpha).scales()["0", "1"], expected)
    after.running_var[...] = 0
    np.testing.assert_array_equal(BatchNormScaling(model, 1).scales()["0", "1"], [0.1] * 3)


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.1, 1.0, None])
def test_the_initial_variance_is_taken_out(momentum):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # momentum 1 looks like Keras's
        after = norm(4, eps=0, momentum=momentum)
    model = nn.Sequential(linear(3, 4), after)
    scaled = BatchNormScaling(model, 1, ref=1, clip=None)
    np.testing.assert_array_equal(scaled.scales()["0", "1"], 1)
    x = batch(20, 3)[0]
    own = (x @ model[0].weight.data.T).var(axis=0, ddof=1)
    for _ in range(5):
        model.forward(x)
        # The batch is always the same, and so is its variance.
        expected = np.ones(4) if momentum == 0 else own
        np.testing.assert_allclose(scaled.scales()["0", "1"], expected, rtol=1e-12)


def test_variances_from_elsewhere_are_taken_as_they_are():
    """As those of an imported model, with which a training begins."""
    after = norm(4, eps=0)
    after.running_var[...] = 9
    model = nn.Sequential(linear(3, 4), after)
    scaled = BatchNormScaling(model, 1, ref=1, clip=None)
    model.forward(batch(20, 3)[0])
    np.testing.assert_array_equal(scaled.scales()["0", "1"], after.running_var)


def test_a_variance_lost_in_rounding_gives_no_nan():
    after = nn.BatchNorm(2, eps=0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), after)
    model[0].weight.data *= 1e-12
    scaled = BatchNormScaling(model, 0.5)
    for _ in range(3):
        model.forward(batch(8, 2)[0].astype(F32))
        assert np.isfinite(scaled.scales()["0", "1"]).all()


def test_alpha_0_is_the_plain_step():
    def trained(scale):
        bnext.manual_seed(0)
        model = models.build("cnn", (1, 4, 4), 3, depth=1, width=4)
        model.train()
        chosen = BatchNormScaling(model, 0) if scale else None
        optimizer = optim.SGD(model.named_parameters(), 0.1, momentum=0.9, scaling=chosen)
        x, labels = batch(8, 1, 4, 4)
        for _ in range(3):
            step(model, optimizer, x.astype(F32), labels)
        return weights(model)

    np.testing.assert_equal(trained(True), trained(False))


# The three regimes

X, LABELS = batch(128, 10)
NOISY = (
    X @ np.random.default_rng(1).normal(size=(10, 3))
    + np.random.default_rng(2).normal(0, 4, (128, 3))
).argmax(axis=1)


def final_loss(alpha, init, *, lr=0.3, eps=0.0, ref=1.0, clip=None, momentum=0.1, **options):
    """After 300 full-batch steps of an MLP whose normalized weights begin `init` times as large."""
    bnext.manual_seed(0)
    settings = dict(eps=eps, momentum=momentum, activation="relu")
    model = nn.Sequential(
        linear(10, 16), norm(16, **settings), linear(16, 16), norm(16, **settings), linear(16, 3)
    )
    model[0].weight.data *= init
    model[2].weight.data *= init
    chosen = BatchNormScaling(model, alpha, ref=ref, clip=clip)
    optimizer = optim.SGD(model.named_parameters(), lr, scaling=chosen, **options)
    for _ in range(300):
        loss = step(model, optimizer, X, NOISY)
    return loss


def spread(alpha, **options):
    losses = [final_loss(alpha, init, **options) for init in (0.1, 1, 10)]
    return max(losses) - min(losses)


def test_three_regimes():
    """literature: alpha 0 depends on the scale of the initial weights, 1/2 less, 1 not at all."""
    plain, half, full = (spread(alpha) for alpha in (0, 0.5, 1))
    assert full < 1e-10
    assert 0.01 < half < 0.6 * plain
    assert plain > 0.1


@pytest.mark.parametrize(
    "options",
    [dict(momentum=None), dict(weight_decay=1e-3), dict(momentum=0.3)],
    ids=lambda options: "-".join(options),
)
def test_equivariance_holds_with_other_averages_and_decay(options):
    assert spread(1, **options) < 1e-10


@pytest.mark.parametrize(
    "options", [dict(eps=1e-3), dict(clip=(0.1, 10)), dict(ref="geometric_mean")]
)
def test_what_breaks_equivariance(options):
    """eps, clipping and a ref that follows the variance, as the documentation says."""
    assert spread(1, **options) > 1e-4


def test_a_step_is_equivariant():
    """With alpha 1 and ref 1 the step of k w is k times that of w."""

    def moved(k):
        bnext.manual_seed(0)
        model = nn.Sequential(conv(2, 4), norm(4, eps=0), nn.Flatten(), linear(16, 3))
        model[0].weight.data *= k
        before = weights(model)
        chosen = BatchNormScaling(model, 1, ref=1, clip=None)
        optimizer = optim.SGD(model.named_parameters(), 0.1, momentum=0.9, scaling=chosen)
        for _ in range(2):
            step(model, optimizer, *batch(6, 2, 4, 4))
        return {name: value - before[name] for name, value in weights(model).items()}

    one, ten = moved(1), moved(10)
    assert np.abs(one["0.weight"]).max() > 1e-4
    for name, change in one.items():
        k = 10 if name == "0.weight" else 1
        np.testing.assert_allclose(ten[name], k * change, rtol=1e-9, atol=1e-12)


# BNP


def standardize(layer, other, mean, std):
    """Make `other` the same function of (x - mean) / std as `layer` is of x."""
    weight = layer.weight.data
    other.weight.data[...] = weight * std.reshape(1, -1, *[1] * (weight.ndim - 2))
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
    other.bias.data[...] = layer.bias.data + taps @ mean


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(5, 3, dtype=F64), (5,)),
        (lambda: nn.Conv2d(5, 3, 2, dtype=F64), (5, 2, 2)),
    ],
)
def test_bnp_is_descent_in_normalized_coordinates(build, shape):
    """Twenty steps on raw inputs end where twenty plain steps on standardized inputs end."""
    rng = np.random.default_rng(4)
    broadcast = (-1, *[1] * (len(shape) - 1))
    x, labels = batch(30, *shape)
    x = x * rng.uniform(0.01, 100, 5).reshape(broadcast) + rng.normal(0, 50, 5).reshape(broadcast)
    axes = (0, *range(2, x.ndim))
    mean, std = x.mean(axis=axes), x.std(axis=axes)
    n = (x - mean.reshape(broadcast)) / std.reshape(broadcast)

    bnext.manual_seed(0)
    raw, normalized = build(), build()
    standardize(raw, normalized, mean, std)
    plain = nn.Sequential(normalized, nn.Flatten())
    model = nn.Sequential(nn.InputStatistics(5), raw, nn.Flatten())
    ours = optim.SGD(model.named_parameters(), 0.5, scaling=BNP(model, eps=0))
    theirs = optim.SGD(plain.named_parameters(), 0.5)
    for _ in range(20):
        loss = step(model, ours, x, labels)
        np.testing.assert_allclose(loss, step(plain, theirs, n, labels), rtol=1e-8)
    np.testing.assert_allclose(model(x), plain(n), rtol=1e-7, atol=1e-9)


def test_bnp_of_groups_is_bnp_of_each():
    rng = np.random.default_rng(0)
    both = nn.Conv2d(4, 6, 3, groups=2, dtype=F64)
    halves = [nn.Conv2d(2, 3, 3, dtype=F64) for _ in range(2)]
    mean, var = rng.normal(size=4), rng.uniform(0.1, 3, 4)
    grad_w, grad_b = rng.normal(size=(6, 2, 3, 3)), rng.normal(size=6)

    def gradients(layer, inputs, outputs):
        model = nn.Sequential(nn.InputStatistics(layer.in_channels), layer)
        model[0].running_mean[...], model[0].running_var[...] = mean[inputs], var[inputs]
        layer.weight.accumulate(grad_w[outputs])
        layer.bias.accumulate(grad_b[outputs])
        changed = BNP(model, eps=0).gradients()
        return changed[layer.weight], changed[layer.bias]

    whole = gradients(both, slice(None), slice(None))
    for g, layer in enumerate(halves):
        outputs = slice(3 * g, 3 * g + 3)
        half = gradients(layer, slice(2 * g, 2 * g + 2), outputs)
        for ours, theirs in zip(whole, half, strict=True):
            np.testing.assert_allclose(ours[outputs], theirs, rtol=1e-13)
        w, m = grad_w[outputs], mean[2 * g : 2 * g + 2].reshape(1, 2, 1, 1)
        expected = (w - grad_b[outputs].reshape(3, 1, 1, 1) * m) / var[2 * g : 2 * g + 2].reshape(
            1, 2, 1, 1
        )
        np.testing.assert_allclose(half[0], expected, rtol=1e-13)
        np.testing.assert_allclose(
            half[1], grad_b[outputs] - (expected * m).sum(axis=(1, 2, 3)), rtol=1e-12
        )


def test_bnp_of_constant_inputs():
    layer = linear(2, 3, bias=True)
    model = nn.Sequential(nn.InputStatistics(2), layer)
    x = np.array([[5.0, 1], [5, 3]])
    model.forward(x)[1](np.ones((2, 3)))
    changed = BNP(model, eps=0).gradients()
    np.testing.assert_array_equal(changed[layer.weight][:, 0], 0)
    assert all(np.isfinite(grad).all() for grad in changed.values())
    model[0].running_var[...] = 0
    assert BNP(model).gradients() == {}


def test_bnp_learns_from_single_samples():
    """Badly scaled inputs, one sample at a time: no rate is right for all of the plain weights."""
    rng = np.random.default_rng(0)
    n = rng.normal(size=(400, 3))
    labels = (n[:, 0] + n[:, 1] + n[:, 2] > 0).astype(int)
    x = n * [0.1, 10, 1] + [1, -20, 0]

    def accuracy(chosen, lr):
        bnext.manual_seed(0)
        model = nn.Sequential(nn.InputStatistics(3, momentum=0.01), linear(3, 2, bias=True))
        options = dict(scaling=BNP(model, eps=1e-4)) if chosen else {}
        optimizer = optim.SGD(model.named_parameters(), lr, **options)
        for sample in x[:50]:
            model.forward(sample[np.newaxis])  # statistics to begin with
        for sample, label in zip(x, labels, strict=True):
            step(model, optimizer, sample[np.newaxis], [label])
        return np.mean(model(x).argmax(axis=1) == labels)

    assert accuracy(True, 0.1) > 0.95
    assert max(accuracy(False, lr) for lr in (0.003, 0.03, 0.3)) < 0.85


# State


def build_state(kind, **options):
    bnext.manual_seed(0)
    if kind is BatchNormScaling:
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm(6), nn.Linear(6, 3))
    else:
        model = nn.Sequential(nn.InputStatistics(4), nn.Linear(4, 3))
    chosen = kind(model, **options)
    return model, chosen, optim.SGD(model.named_parameters(), 0.1, momentum=0.9, scaling=chosen)


OPTIONS = [
    (BatchNormScaling, dict(alpha=0.8, ref=0.5, clip=None, divide_by_weight=True)),
    (BatchNormScaling, dict(alpha=1, clip=(0.2, 3))),
    (BNP, dict(eps=0.2)),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_options_and_statistics_survive(kind, options):
    """Whatever the options of the optimizer that takes the state over, bit for bit."""
    x, labels = batch(16, 4)
    x = x.astype(F32)
    model, chosen, optimizer = build_state(kind, **options)
    for _ in range(3):
        step(model, optimizer, x, labels)
    state = {key: np.copy(value) for key, value in optimizer.state_dict().items()}
    values = {key: value.copy() for key, value in model.state_dict().items()}

    resumed, other, resumed_optimizer = build_state(kind)
    resumed.load_state_dict(values)
    resumed_optimizer.load_state_dict(state)
    assert repr(other) == repr(chosen)
    # An optimizer that is made when the statistics are there already knows no less.
    late = kind(resumed)
    late_optimizer = optim.SGD(resumed.named_parameters(), 0.1, momentum=0.9, scaling=late)
    late_optimizer.load_state_dict(state)
    np.testing.assert_equal(late_optimizer.state_dict(), optimizer.state_dict())
    for _ in range(3):
        step(model, optimizer, x, labels)
        step(resumed, resumed_optimizer, x, labels)
    np.testing.assert_equal(weights(resumed), weights(model))


def moving_average(values, initial, momentum):
    for value in values:
        initial = (1 - momentum) * initial + momentum * value
    return initial


@pytest.mark.parametrize("case", ["plain", "ghost batches", "renormalized", "banks"])
def test_the_initial_variance_has_no_say(case):
    """s is as if the average had begun with the first batch, or the first of its groups."""
    options = {"ghost batches": {"ghost_batch_size": 5}, "banks": {"banks": ("a", "b")}}
    options = options.get(case, {})
    kind = nn.BatchRenorm if case == "renormalized" else nn.BatchNorm
    layer = kind(4, dtype=F64, **options)
    model = nn.Sequential(linear(3, 4), layer)
    scaling = BatchNormScaling(model, alpha=1, ref=1, clip=None)
    assert scaling.pairs == (("0", "1"),)
    xs = [batch(20, 3)[0] * (1 + k) for k in range(3)]
    variances = []
    for x in xs:
        model.forward(x)
        hidden = model[0](x)
        for part in np.split(hidden, 4) if case == "ghost batches" else [hidden]:
            variances.append(part.var(0, ddof=0 if case == "renormalized" else 1) + layer.eps)
    assert layer.num_batches_tracked == len(variances)
    power = 0.5 if case == "renormalized" else 1  # what is averaged
    average = moving_average([var**power for var in variances], 0.0, layer.momentum)
    expected = (average / (1 - 0.9 ** len(variances))) ** (1 / power)
    np.testing.assert_allclose(scaling.scales()["0", "1"], expected, rtol=1e-9)
    if case == "banks":
        layer.bank("b")
        np.testing.assert_allclose(scaling.scales()["0", "1"], 1 + layer.eps)
        layer.bank("a")

    # Re-estimated statistics are what they are.
    bnext.reestimate(model, xs)
    np.testing.assert_allclose(scaling.scales()["0", "1"], layer.running_var + layer.eps)
    model.forward(xs[0])
    np.testing.assert_allclose(scaling.scales()["0", "1"], layer.running_var + layer.eps)
    # A resumed run knows it from the optimizer's state.
    state = scaling.state_dict()
    keys = [key for key in state if key.startswith("fresh")]
    assert keys == (["fresh.0.a", "fresh.0.b"] if case == "banks" else ["fresh.0"])
    resumed = nn.Sequential(linear(3, 4), kind(4, dtype=F64, **options))
    resumed.load_state_dict(model.state_dict())
    other = BatchNormScaling(resumed)
    other.load_state_dict(state)
    np.testing.assert_equal(other.scales(), scaling.scales())
    layer.reset_running_stats()
    assert scaling.state_dict()[keys[0]]


@pytest.mark.parametrize("divide", [True, False])
def test_channels_that_are_not_normalized_are_not_scaled(divide):
    mask = np.array([True, False, True, True])
    model = nn.Sequential(linear(3, 4), nn.BatchNorm(4, channel_mask=mask, dtype=F64))
    other = nn.Sequential(linear(3, 3), nn.BatchNorm(3, dtype=F64))
    model[1].running_var[...] = [4, 1e6, 9, 16]
    model[1].weight.data[...] = 0.5
    other[1].running_var[...], other[1].weight.data[...] = [4, 9, 16], 0.5
    scale, expected = (
        BatchNormScaling(m, divide_by_weight=divide).scales()["0", "1"] for m in (model, other)
    )
    assert scale[1] == 1
    np.testing.assert_array_equal(scale[mask], expected)


def test_the_norm_of_a_residual_block_is_that_of_its_body():
    body = nn.Sequential(linear(4, 4), nn.BatchNorm(4), nn.ReLU(), linear(4, 4))
    block = nn.Residual(body, linear(4, 4), norm=nn.BatchNorm(4))
    scaling = BatchNormScaling(nn.Sequential(linear(4, 4), block, nn.BatchNorm(4)))
    assert scaling.pairs == (("1.body.0", "1.body.1"), ("1.body.3", "1.norm"))


def test_where_the_variance_came_from_survives():
    model = nn.Sequential(linear(3, 4), norm(4))
    model[1].running_var[...] = 9
    imported = BatchNormScaling(model)
    model.forward(batch(20, 3)[0])
    resumed = BatchNormScaling(model)
    np.testing.assert_array_equal(
        BatchNormScaling(nn.Sequential(linear(3, 4), norm(4))).state_dict()["fresh.0"], True
    )
    assert not imported.state_dict()["fresh.0"]
    resumed.load_state_dict(imported.state_dict())
    np.testing.assert_equal(resumed.scales(), imported.scales())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (BatchNormScaling, {"scaling.alpha": 2.0}, "BatchNormScaling: alpha: .*, got 2"),
        (BatchNormScaling, {"scaling.ref": "mean"}, "BatchNormScaling: ref: .*, got 'mean'"),
        (BatchNormScaling, {"scaling.clip": [3, 2]}, r"BatchNormScaling: clip: .*, got \[3, 2\]"),
        (BatchNormScaling, {"scaling.clip": 1}, r"SGD.*'scaling\.clip': expected shape \(2,\)"),
        (BatchNormScaling, {"lr": -1}, "SGD: lr"),
        (BNP, {"scaling.eps": -1}, "BNP: eps: .*, got -1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(kind, change, message):
    _, _, optimizer = build_state(kind)
    before = {key: np.copy(value) for key, value in optimizer.state_dict().items()}
    state = {**before, "lr": 0.5, **change}
    if kind is BatchNormScaling and "scaling.alpha" not in change:
        state["scaling.alpha"] = 0.9
    with pytest.raises(ValueError, match=f"^{message}"):
        optimizer.load_state_dict(state)
    np.testing.assert_equal(optimizer.state_dict(), before)


def test_the_state_of_another_scaling_is_refused():
    plain = optim.SGD(build_state(BNP)[0].named_parameters(), 0.1, momentum=0.9)
    bnp = build_state(BNP)[2]
    for one, other in ((plain, bnp), (bnp, plain)):
        with pytest.raises(ValueError, match=r"(missing|unexpected) key 'scaling\.eps'"):
            one.load_state_dict(other.state_dict())


# Bad arguments

MODEL = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3))
OBSERVED = nn.Sequential(nn.InputStatistics(2), nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BatchNormScaling(MODEL, -0.1), ValueError, r"alpha: .* \[0, 1\], got -0\.1"),
        (lambda: BatchNormScaling(MODEL, 1.1), ValueError, r"alpha: .*, got 1\.1"),
        (lambda: BatchNormScaling(MODEL, np.nan), ValueError, "alpha: .*, got nan"),
        (lambda: BatchNormScaling(MODEL, "1"), TypeError, "alpha: expected a number, got str"),
        (lambda: BatchNormScaling(MODEL, ref=0), ValueError, 'ref: expected "geometric_mean" or'),
        (lambda: BatchNormScaling(MODEL, ref=np.inf), ValueError, "ref: .*, got inf"),
        (lambda: BatchNormScaling(MODEL, ref="mean"), ValueError, "ref: .*, got 'mean'"),
        (lambda: BatchNormScaling(MODEL, ref=None), TypeError, "ref: expected a number, got None"),
        (lambda: BatchNormScaling(MODEL, clip=(2, 1)), ValueError, r"clip: .*, got \(2, 1\)"),
        (lambda: BatchNormScaling(MODEL, clip=(-1, 1)), ValueError, r"clip: .*, got \(-1, 1\)"),
        (lambda: BatchNormScaling(MODEL, clip=(0, 0)), ValueError, r"clip: .*, got \(0, 0\)"),
        (lambda: BatchNormScaling(MODEL, clip=(0, np.nan)), ValueError, "clip: .*, got"),
        (lambda: BatchNormScaling(MODEL, clip=10), ValueError, "clip: expected two .*, got 10"),
        (lambda: BNP(OBSERVED, eps=-1), ValueError, "BNP: eps: .* >= 0, got -1"),
        (lambda: BNP(OBSERVED, eps=np.inf), ValueError, "BNP: eps: .*, got inf"),
        (
            lambda: optim.SGD(OBSERVED.parameters(), 1, scaling=BatchNormScaling(MODEL)),
            ValueError,
            "SGD: scaling: expected the model that the parameters belong to, got another",
        ),
        (
            lambda: optim.Adam(MODEL.parameters(), scaling=MODEL),
            TypeError,
            "Adam: scaling: expected a GradientScaling, .*, got Sequential",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message) as info:
        call()
    assert type(info.value) is error


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_every_optimizer_has_the_option(kind):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm(6), nn.Linear(6, 3))
    optimizer = kind(model.named_parameters(), lr=0.01, scaling=BatchNormScaling(model, 0.25))
    assert optimizer.state_dict()["scaling.alpha"] == 0.25
    x, labels = batch(16, 4)
    losses = [step(model, optimizer, x.astype(F32), labels) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_scaling_of_ones_own():
    class Half(GradientScaling):
        def parameters(self):
            return [weight]

        def gradients(self):
            return {weight: weight.grad / 2}

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            assert state == {}

    weight = nn.Parameter(np.array([1.0]))
    weight.accumulate(np.array([1.0]))
    optimizer = optim.SGD([weight], 0.5, scaling=Half())
    optimizer.step()
    assert weight.data == 0.75
    optimizer.load_state_dict(optimizer.state_dict())
    assert repr(Half()) == "Half()"


# The layer that BNP learns from


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((4, 3), 1), ((1, 3), 1), ((2, 3, 5, 7), 1), ((2, 5, 3), -1)]
)
def test_average_over_all_batches(shape, channel_axis, dtype):
    """Equal batches and no momentum: mean and variance of all values at once."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e3, 3, shape).astype(dtype) for _ in range(7)]
    layer = nn.InputStatistics(3, None, channel_axis=channel_axis)
    for x in batches:
        y, backward = layer.forward(x)
        assert y is x
        assert backward(x) is x
    values = np.moveaxis(np.concatenate(batches).astype(F64), channel_axis, 0).reshape(3, -1)
    np.testing.assert_allclose(layer.running_mean, values.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, values.var(axis=1), rtol=1e-9)
    assert layer.num_batches_tracked == 7


def test_moving_average():
    """Weights of the batches: 1/t until momentum is more, then exponential."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(t, 1, (5, 1)) for t in range(6)]
    layer = nn.InputStatistics(1, 0.4)
    share = np.zeros(0)
    for t, x in enumerate(batches, 1):
        layer.forward(x)
        a = max(0.4, 1 / t)
        share = np.append(share * (1 - a), a)
    values = np.concatenate(batches, axis=1)
    mean = (values * share / 5).sum()
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    variance = ((values - mean) ** 2 * share / 5).sum()
    np.testing.assert_allclose(layer.running_var, variance, rtol=1e-12)


def test_when_statistics_stay():
    layer = nn.InputStatistics(2)
    x = np.ones((3, 2))
    layer(x)
    layer.eval()
    layer.forward(x)
    layer.train()
    layer.forward(x[:0])
    with pytest.warns(RuntimeWarning, match=r"^InputStatistics: step 1: .* not finite"):
        layer.forward(x * [1, np.nan])
    np.testing.assert_array_equal(layer.running_mean, 0)
    np.testing.assert_array_equal(layer.running_var, 1)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.InputStatistics(0), ValueError, "num_features: expected 1 or more, got 0"),
        (lambda: nn.InputStatistics(2, 0), ValueError, r"momentum: .* \(0, 1\], got 0"),
        (lambda: nn.InputStatistics(2, 1.5), ValueError, r"momentum: .*, got 1\.5"),
        (lambda: nn.InputStatistics(2, "a"), TypeError, "momentum: expected a number, got str"),
        (lambda: nn.InputStatistics(2, channel_axis=2), ValueError, "channel_axis: .*, got 2"),
        (
            lambda: nn.InputStatistics(2)(np.ones((4, 3))),
            ValueError,
            r"x: expected 2 channels on axis 1, got shape \(4, 3\)",
        ),
        (lambda: nn.InputStatistics(2)(np.ones(2)), ValueError, r"x: .*, got shape \(2,\)"),
        (
            lambda: nn.InputStatistics(2)(np.ones((4, 2), int)),
            TypeError,
            "x: expected float32, float64",
        ),
    ],
)
def test_bad_calls_of_the_layer(call, error, message):
    with pytest.raises(error, match="^InputStatistics: " + message) as info:
        call()
    assert type(info.value) is error


@pytest.mark.parametrize("module", [scaling, input_statistics, optim])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert result.failed == 0
