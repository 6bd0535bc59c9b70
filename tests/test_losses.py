"""The losses: value, gradient, logits of any size, and what they refuse."""

import doctest

import numpy as np
import pytest

from bnext import losses, optim
from bnext.losses import (
    UncertaintyWeighting,
    sigmoid_focal_loss,
    softmax_cross_entropy,
    softmax_focal_loss,
)
from bnext.nn import Module
from gradcheck import gradcheck
from reference import Wide

LARGEST = np.finfo(np.float32).max


def sample(n=7, classes=5, dtype=np.float64, scale=3):
    rng = np.random.default_rng(0)
    return rng.normal(scale=scale, size=(n, classes)).astype(dtype), rng.integers(0, classes, n)


def expected(logits, labels):
    """Loss and gradient, straight from the definition in extended precision."""
    z = logits.astype(Wide)
    z = z - z.max(axis=1, keepdims=True)
    exponentials = np.exp(z)
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    one_hot = np.eye(logits.shape[1], dtype=Wide)[labels]
    loss = np.log(exponentials.sum(axis=1)) - (z * one_hot).sum(axis=1)
    return loss.mean(), (p - one_hot) / len(labels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("n", "classes"), [(1, 1), (1, 2), (7, 5), (300, 1000)])
def test_equals_the_reference(n, classes, dtype):
    logits, labels = sample(n, classes, dtype)
    before = logits.copy()
    loss, backward = softmax_cross_entropy(logits, labels)
    expected_loss, expected_grad = expected(logits, labels)
    assert type(loss) is float
    np.testing.assert_allclose(loss, float(expected_loss), rtol=1e-13, atol=1e-15)
    grad = backward()
    assert grad.dtype == dtype
    assert grad.shape == logits.shape
    # The gradient is rounded once, to the dtype of the logits.
    info = np.finfo(dtype)
    rtol = max(0.51 * info.eps, 1e-13)
    np.testing.assert_allclose(
        grad.astype(Wide), expected_grad, rtol=rtol, atol=max(info.smallest_subnormal, 1e-15 / n)
    )
    np.testing.assert_array_equal(backward(), grad)
    np.testing.assert_array_equal(logits, before)


class _Loss(Module):
    """A loss as a layer, for `gradcheck`: its weighting of the output is `grad_loss`."""

    def __init__(self, function, *arguments, **options):
        super().__init__()
        self.call = lambda x: function(x, *arguments, **options)

    def forward(self, x):
        loss, backward = self.call(x)
        return np.asarray(loss), backward


WEIGHT = [0.5, 2.0, 0.0, 1.0, 3.0]
CROSS_ENTROPY = [
    dict(),
    dict(label_smoothing=0.1),
    dict(label_smoothing=1),
    dict(weight=WEIGHT),
    dict(weight=WEIGHT, label_smoothing=0.3),
    dict(ignore_index=-100),
    dict(ignore_index=1, weight=WEIGHT, label_smoothing=0.3),
]
FOCAL = [
    dict(gamma=gamma, alpha=alpha)
    for gamma in (0, 0.5, 1, 2, 5.5)
    for alpha in (None, 0.25, [0.5, 1.0, 0.0, 0.25, 0.75])
]
# Every loss with its options, and the labels or targets it takes for logits (7, 5).
LOSSES = [
    *((softmax_cross_entropy, options) for options in CROSS_ENTROPY),
    *((softmax_focal_loss, options) for options in [*FOCAL, dict(ignore_index=1)]),
    *((sigmoid_focal_loss, options) for options in FOCAL),
]
REDUCTIONS = ["mean", "sum", "none", "positives"]
every_loss = pytest.mark.parametrize(("loss", "options"), LOSSES)


def targets_for(loss, labels, classes=5):
    if loss is sigmoid_focal_loss:
        return np.random.default_rng(1).integers(0, 2, (len(labels), classes))
    return labels


def reductions(loss):
    return REDUCTIONS if loss is sigmoid_focal_loss else REDUCTIONS[:3]


@every_loss
def test_gradient_against_finite_differences(loss, options):
    logits, labels = sample()
    for reduction in reductions(loss):
        layer = _Loss(loss, targets_for(loss, labels), reduction=reduction, **options)
        gradcheck(layer, logits)


def definition(loss, logits, labels, options):
    """Single losses from their definition in extended precision, and the mean's denominator."""
    z = logits.astype(Wide)
    if loss is sigmoid_focal_loss:
        positive = labels == 1
        p = 1 / (1 + np.exp(np.where(positive, -z, z)))
        alpha = 1.0
        if options["alpha"] is not None:
            alpha = np.where(positive, options["alpha"], 1 - np.asarray(options["alpha"]))
        return -alpha * (1 - p) ** options["gamma"] * np.log(p), labels.size
    classes = z.shape[1]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    counted = labels != options.get("ignore_index")
    labels = np.where(counted, labels, 0)
    one_hot = np.eye(classes, dtype=Wide)[labels]
    if loss is softmax_focal_loss:
        mine = (p * one_hot).sum(axis=1)
        alpha = np.broadcast_to(1 if options.get("alpha") is None else options["alpha"], classes)
        single = -alpha[labels] * (1 - mine) ** options.get("gamma", 2) * np.log(mine)
        return single * counted, counted.sum()
    weight = np.asarray(options.get("weight", np.ones(classes)), Wide)
    smoothing = options.get("label_smoothing", 0)
    target = (1 - smoothing) * one_hot + Wide(smoothing) / classes
    return -(target * weight * np.log(p)).sum(axis=1) * counted, (weight[labels] * counted).sum()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@every_loss
def test_values_and_reductions(loss, options, dtype):
    logits, labels = sample(dtype=dtype)
    targets = targets_for(loss, labels)
    single, count = definition(loss, logits, targets, options)
    counts = {"mean": count, "sum": 1, "positives": targets.sum()}
    none, backward = loss(logits, targets, reduction="none", **options)
    np.testing.assert_allclose(none, single.astype(float), rtol=1e-12, atol=1e-15)
    assert none.dtype == np.float64
    grad = backward()
    assert (grad.dtype, grad.shape) == (dtype, logits.shape)
    eps = max(np.finfo(dtype).eps, 1e-12)
    for reduction in reductions(loss):
        if reduction == "none":
            continue
        value, reduced = loss(logits, targets, reduction=reduction, **options)
        assert type(value) is float
        np.testing.assert_allclose(value, float(single.sum() / counts[reduction]), rtol=1e-12)
        # The gradient of the parts is that of the sum; half the loss has half the gradient.
        expected = backward(np.full(none.shape, 0.5 / float(counts[reduction])))
        np.testing.assert_allclose(reduced(0.5), expected, rtol=2 * eps, atol=1e-7)
        with pytest.raises(ValueError, match="grad_loss: expected a number, got shape"):
            reduced(np.ones(none.shape))
    with pytest.raises(ValueError, match=r"grad_loss: expected a number or shape .*, got shape"):
        backward(np.ones(3))


def test_small_losses_keep_their_digits():
    loss, _ = softmax_cross_entropy(np.array([[30.0, 0.0], [0.0, 20.0]], np.float32), [0, 1])
    np.testing.assert_allclose(loss, (np.exp(-30) + np.exp(-20)) / 2, rtol=1e-6)
    for margin in (36.0, 100.0, 700.0):
        tiny = np.exp(-margin)
        for options in ({}, {"weight": [2.0, 1.0]}):
            loss, backward = softmax_cross_entropy(np.array([[margin, 0.0]]), [0], **options)
            np.testing.assert_allclose(loss, tiny, rtol=1e-14)
            np.testing.assert_allclose(backward(), [[-tiny, tiny]], rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e4, 1e30, LARGEST])
def test_huge_logits(size, dtype):
    logits = np.array([[size, 0, -size], [-size, size, size]], dtype)
    huge = float(logits.max())
    right, backward = softmax_cross_entropy(logits, [0, 1])
    np.testing.assert_allclose(right, np.log(2) / 2)
    np.testing.assert_array_equal(backward(), [[0, 0, 0], [0, -0.25, 0.25]])
    wrong, backward = softmax_cross_entropy(logits, [2, 0])
    np.testing.assert_allclose(wrong, 2 * huge, rtol=1e-4)
    np.testing.assert_array_equal(backward(), [[0.5, 0, -0.5], [-0.5, 0.25, 0.25]])


def test_the_loss_does_not_depend_on_a_constant_added():
    logits, labels = np.array([[1.0, 2.0, 4.0], [0.0, 0.5, -8.0]]), [2, 0]
    loss, backward = softmax_cross_entropy(logits, labels)
    shifted, shifted_backward = softmax_cross_entropy(logits + 2.0**40, labels)
    assert shifted == loss
    np.testing.assert_array_equal(shifted_backward(), backward())


def test_minus_infinity_is_probability_zero():
    logits = np.array([[0.0, -np.inf, 0.0]], np.float32)
    loss, backward = softmax_cross_entropy(logits, [2])
    np.testing.assert_allclose(loss, np.log(2))
    np.testing.assert_array_equal(backward(), np.array([[0.5, 0, -0.5]], np.float32))
    loss, backward = softmax_cross_entropy(logits, [1])
    assert loss == np.inf
    np.testing.assert_array_equal(backward(), np.array([[0.5, -1, 0.5]], np.float32))


@pytest.mark.parametrize("row", [[np.nan, 0], [np.inf, 0], [np.inf, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_stay_in_their_row(row):
    logits = np.array([row, [0, 0]], np.float32)
    loss, backward = softmax_cross_entropy(logits, [0, 0])
    assert np.isnan(loss)
    grad = backward()
    assert np.isnan(grad[0]).any()
    np.testing.assert_array_equal(grad[1], [-0.25, 0.25])


def test_logits_in_bfloat16():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(bfloat16)
    labels = np.array([0, 2, 1, 1, 0])
    for loss in (softmax_cross_entropy, softmax_focal_loss):
        value, backward = loss(logits, labels)
        expected, wide = loss(logits.astype(np.float32), labels)
        assert value == expected
        assert backward().dtype == bfloat16
        np.testing.assert_array_equal(backward(), wide().astype(bfloat16))


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_one_logit_without_axes(alpha):
    loss, backward = sigmoid_focal_loss(np.float32(2), 1, alpha=alpha, reduction="none")
    assert loss.shape == backward().shape == ()
    assert backward().dtype == np.float32


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, ">i4"])
def test_labels_of_any_integer_type(dtype):
    logits, labels = sample()
    loss, backward = softmax_cross_entropy(logits, labels.astype(dtype))
    assert loss == softmax_cross_entropy(logits, labels.tolist())[0]
    np.testing.assert_array_equal(backward(), softmax_cross_entropy(logits, labels)[1]())


Z = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (Z.astype(np.int64), [0, 1, 2], TypeError, "logits: expected floating point, got int64"),
        (Z > 0, [0, 1, 2], TypeError, "logits: expected floating point, got bool"),
        (Z.astype(complex), [0, 1, 2], TypeError, "logits: expected .*, got complex128"),
        (None, [0, 1, 2], TypeError, "logits: expected floating point, got object"),
        (Z[0], [0, 1, 2], ValueError, r"logits: expected a non-empty .*, got \(4,\)"),
        (Z[None], [0, 1, 2], ValueError, r"logits: expected .*, got \(1, 3, 4\)"),
        (Z[:0], [], ValueError, r"logits: expected a non-empty batch .*, got \(0, 4\)"),
        (Z[:, :0], [0, 1, 2], ValueError, r"logits: expected a non-empty .*, got \(3, 0\)"),
        (Z, [0, 1], ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
        (Z, [[0], [1], [2]], ValueError, r"labels: expected shape \(3,\), got \(3, 1\)"),
        (Z, 1, ValueError, r"labels: expected shape \(3,\), got \(\)"),
        (Z, np.eye(3, 4), ValueError, r"labels: expected shape \(3,\), got \(3, 4\)"),
        (Z, [0.0, 1.0, 2.0], TypeError, "labels: expected integers, got float64"),
        (Z, [True, False, True], TypeError, "labels: expected integers, got bool"),
        (Z, [0, 4, 1], ValueError, "labels: expected values from 0 to 3, got 0 to 4"),
        (Z, [0, -1, 1], ValueError, "labels: expected values from 0 to 3, got -1 to 1"),
    ],
)
def test_bad_calls(logits, labels, error, message):
    with pytest.raises(error, match="^softmax_cross_entropy: " + message) as info:
        softmax_cross_entropy(logits, labels)
    assert type(info.value) is error


def assert_agrees(ours, theirs, tensor):
    """The loss and the gradient of `ours` are PyTorch's."""
    loss, backward = ours
    weights = np.random.default_rng(3).uniform(1, 2, np.shape(loss))
    theirs.backward(torch_like(weights, theirs))
    tolerance = 1e-6 if tensor.grad.numpy().dtype == np.float32 else 1e-13
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=tolerance, atol=1e-12)
    grad = tensor.grad.numpy()
    np.testing.assert_allclose(backward(weights), grad, rtol=10 * tolerance, atol=1e-8)


def torch_like(array, tensor):
    return tensor.new_tensor(array.tolist())


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", CROSS_ENTROPY)
def test_agrees_with_pytorch(options, reduction, dtype, scale):
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    logits, labels = sample(20, 5, dtype, scale)
    tensor = torch.from_numpy(logits).requires_grad_()
    settings = {"reduction": reduction, **options}
    ours = softmax_cross_entropy(logits, labels, **settings)
    if "weight" in options:
        settings["weight"] = torch_like(np.array(WEIGHT), tensor)
    theirs = torch.nn.functional.cross_entropy(tensor, torch.from_numpy(labels), **settings)
    assert_agrees(ours, theirs, tensor)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", FOCAL)
def test_focal_losses_agree_with_the_formula_in_pytorch(options, reduction):
    """In float64: in float32 the formula itself loses the digits of 1 - p."""
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    logits, labels = sample(20, 5)
    gamma, alpha = options["gamma"], options["alpha"]
    cross_entropy = torch.nn.functional.cross_entropy
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def reduce(loss):
        return loss if reduction == "none" else getattr(loss, reduction)()

    # torchvision.ops.sigmoid_focal_loss, line by line.
    tensor = torch.from_numpy(logits).requires_grad_()
    targets = targets_for(sigmoid_focal_loss, labels)
    t = torch_like(targets, tensor)
    p = torch.sigmoid(tensor)
    p_t = p * t + (1 - p) * (1 - t)
    loss = bce(tensor, t, reduction="none") * (1 - p_t) ** gamma
    if alpha is not None:
        a = torch_like(np.array(alpha), tensor)
        loss = (a * t + (1 - a) * (1 - t)) * loss
    ours = sigmoid_focal_loss(logits, targets, reduction=reduction, **options)
    assert_agrees(ours, reduce(loss), tensor)

    tensor = torch.from_numpy(logits).requires_grad_()
    log_p = -cross_entropy(tensor, torch.from_numpy(labels), reduction="none")
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    if alpha is not None:
        loss = torch_like(np.broadcast_to(alpha, 5)[labels], tensor) * loss
    ours = softmax_focal_loss(logits, labels, reduction=reduction, **options)
    assert_agrees(ours, reduce(loss), tensor)


# Focal losses


@pytest.mark.parametrize("size", [3, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_gamma_focal_is_cross_entropy(dtype, size):
    logits, labels = sample(dtype=dtype, scale=size)
    rtol = 4 * np.finfo(dtype).eps
    loss, backward = softmax_focal_loss(logits, labels, gamma=0)
    expected_loss, expected_backward = softmax_cross_entropy(logits, labels)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-14)
    np.testing.assert_allclose(backward(), expected_backward(), rtol, atol=1e-16)

    # Two classes with logits 0 and z are one with logit z.
    z = logits[:, 0]
    loss, backward = sigmoid_focal_loss(z, labels > 1, gamma=0, alpha=None)
    both = np.stack([np.zeros_like(z), z], axis=1)
    expected_loss, expected_backward = softmax_cross_entropy(both, (labels > 1).astype(int))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-14)
    np.testing.assert_allclose(backward(), expected_backward()[:, 1], rtol, atol=1e-16)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5.5])
@pytest.mark.parametrize("size", [1e4, 1e30, LARGEST])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_focal_losses_of_huge_logits(dtype, size, gamma):
    size = dtype(size)
    right = np.array([size, -size], dtype)
    options = dict(gamma=gamma, alpha=None, reduction="none")
    loss, backward = sigmoid_focal_loss(right, [1, 0], **options)
    np.testing.assert_array_equal(loss, [0, 0])
    np.testing.assert_array_equal(backward(), [0, 0])
    loss, backward = sigmoid_focal_loss(right, [0, 1], **options)
    np.testing.assert_array_equal(loss, [size, size])
    np.testing.assert_array_equal(backward(), [1, -1])

    rows = np.array([[size, 0, -size]] * 2, dtype)
    loss, backward = softmax_focal_loss(rows, [0, 2], gamma=gamma, reduction="none")
    np.testing.assert_array_equal(loss, [0, 2 * float(size)])
    np.testing.assert_array_equal(backward(), [[0, 0, 0], [1, 0, -1]])


@pytest.mark.parametrize("gamma", [0, 0.25, 1, 2])
def test_focal_losses_of_sure_predictions_keep_their_digits(gamma):
    """Where 1 - p is tiny the loss is (1 - p)^(gamma + 1), its gradient (gamma + 1) times that."""
    z = np.array([20.0, 40.0, 100.0])
    miss = np.exp(-z)
    slope = -(gamma + 1) * miss ** (gamma + 1)
    loss, backward = sigmoid_focal_loss(z, [1, 1, 1], gamma=gamma, alpha=None, reduction="none")
    np.testing.assert_allclose(loss, miss ** (gamma + 1), rtol=1e-7)
    np.testing.assert_allclose(backward(), slope, rtol=1e-7)
    rows = np.stack([z, np.zeros(3)], axis=1)
    loss, backward = softmax_focal_loss(rows, [0, 0, 0], gamma=gamma, reduction="none")
    np.testing.assert_allclose(loss, miss ** (gamma + 1), rtol=1e-7)
    np.testing.assert_allclose(backward(), np.stack([slope, -slope], axis=1), rtol=1e-7)


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_focal_losses_of_infinite_logits(gamma):
    options = dict(gamma=gamma, reduction="none")
    z = np.array([np.inf, -np.inf, np.inf, -np.inf, np.nan, 0], np.float32)
    loss, backward = sigmoid_focal_loss(z, [1, 0, 0, 1, 1, 1], alpha=None, **options)
    half = np.log(2) / 2**gamma
    np.testing.assert_allclose(loss, [0, 0, np.inf, np.inf, np.nan, half])
    slope = -(0.5**gamma) * (gamma * np.log(2) / 2 + 0.5)
    np.testing.assert_allclose(backward(), [0, 0, 1, -1, np.nan, slope], rtol=1e-6)

    rows = np.array([[0, -np.inf], [0, -np.inf], [np.nan, 0], [np.inf, 0], [0, 0]], np.float32)
    loss, backward = softmax_focal_loss(rows, [0, 1, 0, 0, 0], **options)
    np.testing.assert_allclose(loss, [0, np.inf, np.nan, np.nan, half])
    grad = backward()
    np.testing.assert_array_equal(grad[:2], [[0, 0], [1, -1]])
    assert np.isnan(grad[2:4]).all()
    np.testing.assert_allclose(grad[4], [slope, -slope], rtol=1e-6)


def test_focal_losses_do_not_change_their_inputs():
    logits, labels = sample()
    for loss in (softmax_focal_loss, sigmoid_focal_loss):
        targets = targets_for(loss, labels)
        before = logits.copy(), targets.copy()
        _, backward = loss(logits, targets)
        np.testing.assert_array_equal(backward(), backward())
        np.testing.assert_array_equal(logits, before[0])
        np.testing.assert_array_equal(targets, before[1])


def test_without_positives_the_denominator_is_one():
    z = np.zeros((3, 4), np.float32)
    loss, backward = sigmoid_focal_loss(z, np.zeros((3, 4)), gamma=0, reduction="positives")
    np.testing.assert_allclose(loss, 12 * 0.75 * np.log(2))
    np.testing.assert_allclose(backward(), np.full((3, 4), 0.375))


@pytest.mark.parametrize("loss", [softmax_cross_entropy, softmax_focal_loss])
def test_ignored_samples_count_for_nothing(loss):
    logits, labels = sample()
    logits[1] = np.nan
    labels[[1, 4]] = -100
    kept = np.flatnonzero(labels >= 0)
    value, backward = loss(logits, labels, ignore_index=-100)
    expected_value, expected_backward = loss(logits[kept], labels[kept])
    assert value == expected_value
    grad = backward()
    np.testing.assert_array_equal(grad[kept], expected_backward())
    np.testing.assert_array_equal(grad[[1, 4]], 0)
    for reduction in ("mean", "sum"):
        value, backward = loss(logits, np.full(7, -100), ignore_index=-100, reduction=reduction)
        assert value == 0
        np.testing.assert_array_equal(backward(), np.zeros((7, 5)))


def test_a_batch_without_weight_has_no_loss():
    logits, _ = sample()
    loss, backward = softmax_cross_entropy(logits, [2] * 7, weight=WEIGHT)
    assert loss == 0
    np.testing.assert_array_equal(backward(), np.zeros((7, 5)))


def test_targets_of_any_type():
    logits, labels = sample()
    targets = targets_for(sigmoid_focal_loss, labels)
    loss, _ = sigmoid_focal_loss(logits, targets)
    for other in (targets.astype(bool), targets.astype(np.float32), targets.tolist()):
        assert sigmoid_focal_loss(logits, other)[0] == loss
    assert type(sigmoid_focal_loss(np.float32(0), 1)[0]) is float


# Uncertainty weighting


def test_uncertainty_weighting_against_the_formula_and_finite_differences():
    weighting = UncertaintyWeighting(["regression", "classification", 3], dtype=np.float64)
    c, s = np.array([0.5, 1, 3]), np.array([-1.0, 0.5, 2])
    weighting.log_variances.data[...] = s
    values = np.array([4.0, 0.3, 1e-3])
    total, backward = weighting.forward(values)
    np.testing.assert_allclose(total, (c * np.exp(-s) * values + s / 2).sum(), rtol=1e-14)
    np.testing.assert_allclose(backward(), c * np.exp(-s), rtol=1e-14)
    np.testing.assert_allclose(
        weighting.log_variances.grad, 0.5 - c * np.exp(-s) * values, rtol=1e-14
    )
    assert weighting(values) == total
    gradcheck(weighting, values)


def test_uncertainty_weighting_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    s = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([2.0, 5.0], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([1.0, 0.5], dtype=torch.float64)
    theirs = (c * torch.exp(-s) * values + s / 2).sum()
    theirs.backward()
    weighting = UncertaintyWeighting(["classification", "regression"], dtype=np.float64)
    weighting.log_variances.data[...] = s.detach().numpy()
    total, backward = weighting.forward(values.detach().numpy())
    np.testing.assert_allclose(total, theirs.item(), rtol=1e-14)
    np.testing.assert_allclose(backward(), values.grad.numpy(), rtol=1e-14)
    np.testing.assert_allclose(weighting.log_variances.grad, s.grad.numpy(), rtol=1e-14)


def test_uncertainty_weighting_learns_the_optimum():
    """e^s = 2 c L, whatever the unit of the loss."""
    weighting = UncertaintyWeighting(["regression", "classification"], dtype=np.float64)
    optimizer = optim.Adam(weighting.named_parameters(), lr=0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        weighting.forward([100, 0.2])[1]()
        optimizer.step()
    np.testing.assert_allclose(np.exp(weighting.log_variances.data), [100, 0.4], rtol=1e-3)


def test_uncertainty_weighting_is_a_module():
    weighting = UncertaintyWeighting(["regression", 2.0])
    assert list(weighting.state_dict()) == ["log_variances"]
    assert not weighting.log_variances.decay
    assert repr(weighting) == "UncertaintyWeighting(0.5, 2)"
    total, backward = weighting.forward(np.array([1.0, np.nan]))
    assert np.isnan(total)
    backward()
    np.testing.assert_array_equal(weighting.log_variances.grad, [0, np.nan])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: UncertaintyWeighting([]), ValueError, r"tasks: expected one .*, got \[\]"),
        (lambda: UncertaintyWeighting("regression"), ValueError, "expected one .*'regression'"),
        (lambda: UncertaintyWeighting(["a"]), ValueError, "a number or regression, .*, got 'a'"),
        (lambda: UncertaintyWeighting([0]), ValueError, "expected finite numbers > 0, got 0"),
        (lambda: UncertaintyWeighting([np.nan]), ValueError, "expected finite numbers > 0.*nan"),
        (lambda: UncertaintyWeighting([None]), TypeError, "tasks: expected a number, got NoneType"),
        (lambda: UncertaintyWeighting([1], dtype=int), TypeError, "dtype: expected float32 or"),
        (lambda: UncertaintyWeighting([1])([1, 2]), ValueError, r"shape \(1,\), got \(2,\)"),
        (lambda: UncertaintyWeighting([1])(1.0), ValueError, r"expected shape \(1,\), got \(\)"),
    ],
)
def test_bad_tasks(call, error, message):
    with pytest.raises(error, match="^UncertaintyWeighting: .*" + message) as info:
        call()
    assert type(info.value) is error


Y = [0, 1, 2]
CE, SOFT, SIGMOID = softmax_cross_entropy, softmax_focal_loss, sigmoid_focal_loss


@pytest.mark.parametrize(
    ("loss", "targets", "options", "error", "message"),
    [
        (CE, Y, dict(weight=[1, 1]), ValueError, r"weight: expected shape \(4,\), got \(2,\)"),
        (CE, Y, dict(weight=1.0), ValueError, r"weight: expected shape \(4,\), got \(\)"),
        (CE, Y, dict(weight=[1, 1, 1, -1]), ValueError, "weight: expected finite values >= 0"),
        (CE, Y, dict(weight=[1, 1, 1, np.nan]), ValueError, "weight: expected finite values >= 0"),
        (CE, Y, dict(weight=list("abcd")), TypeError, "weight: expected numbers, got <U1"),
        (CE, Y, dict(label_smoothing=-0.1), ValueError, r"label_smoothing: .* \[0, 1\], got -0\.1"),
        (CE, Y, dict(label_smoothing=1.1), ValueError, "label_smoothing: expected a number in"),
        (
            CE,
            Y,
            dict(label_smoothing="a"),
            TypeError,
            "label_smoothing: expected a number, got str",
        ),
        (CE, Y, dict(reduction="avg"), ValueError, "reduction: .* mean, sum, none, got 'avg'"),
        (CE, Y, dict(reduction="positives"), ValueError, "reduction: expected one of mean, sum, n"),
        (CE, Y, dict(ignore_index=0.5), TypeError, r"ignore_index: expected an integer, got 0\.5"),
        (CE, [0, 7, 2], dict(ignore_index=8), ValueError, "values from 0 to 3, got 0 to 7"),
        (SOFT, Y, dict(gamma=-1), ValueError, "gamma: expected a finite number >= 0, got -1"),
        (SOFT, Y, dict(gamma=np.nan), ValueError, "gamma: expected a finite number >= 0, got nan"),
        (SOFT, Y, dict(gamma=None), TypeError, "gamma: expected a number, got NoneType"),
        (SOFT, Y, dict(alpha=-1), ValueError, "alpha: expected finite values >= 0, got -1"),
        (SOFT, Y, dict(alpha=[1, 2]), ValueError, r"alpha: expected shape \(4,\), got \(2,\)"),
        (SOFT, Y, dict(reduction=None), ValueError, "reduction: expected one of .*, got None"),
        (SOFT, [0, 1], {}, ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
        (SOFT, [0, 1, 4], {}, ValueError, "labels: expected values from 0 to 3, got 0 to 4"),
        (SIGMOID, Y, {}, ValueError, r"targets: expected shape \(3, 4\), got \(3,\)"),
        (SIGMOID, Z + 0.5, {}, ValueError, r"targets: expected 0 or 1 each, got 0\.5"),
        (SIGMOID, Z * np.nan, {}, ValueError, "targets: expected 0 or 1 each, got nan"),
        (SIGMOID, Z.astype(str), {}, TypeError, "targets: expected numbers, got <U32"),
        (SIGMOID, Z, dict(alpha=1.5), ValueError, r"alpha: expected values in \[0, 1\], got 1\.5"),
        (SIGMOID, Z, dict(alpha=[1] * 3), ValueError, r"alpha: .* \(4,\), got \(3,\)"),
        (SIGMOID, Z, dict(gamma=np.inf), ValueError, "gamma: expected a finite .*, got inf"),
        (SIGMOID, Z, dict(reduction="max"), ValueError, "of mean, positives, sum, none, got 'max'"),
    ],
)
def test_bad_options(loss, targets, options, error, message):
    with pytest.raises(error, match=f"^{loss.__name__}: .*" + message) as info:
        loss(Z, targets, **options)
    assert type(info.value) is error


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (np.zeros((0, 4)), ValueError, r"logits: expected one value or more, got shape \(0, 4\)"),
        (np.zeros(4, int), TypeError, "logits: expected floating point, got int64"),
    ],
)
def test_bad_logits_of_the_sigmoid(logits, error, message):
    with pytest.raises(error, match="^sigmoid_focal_loss: " + message):
        sigmoid_focal_loss(logits, np.zeros(logits.shape))


def test_examples():
    result = doctest.testmod(losses)
    assert result.attempted >= 12
    assert result.failed == 0
