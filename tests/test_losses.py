"""The loss: value, gradient, logits of any size, and what it refuses."""

import numpy as np
import pytest

from bnext.losses import softmax_cross_entropy
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
    def __init__(self, labels):
        super().__init__()
        self.labels = labels

    def forward(self, x):
        loss, backward = softmax_cross_entropy(x, self.labels)
        return np.array(loss), lambda grad_y: grad_y * backward()


def test_gradient_against_finite_differences():
    logits, labels = sample()
    gradcheck(_Loss(labels), logits)


def test_small_losses_keep_their_digits():
    loss, _ = softmax_cross_entropy(np.array([[30.0, 0.0], [0.0, 20.0]], np.float32), [0, 1])
    np.testing.assert_allclose(loss, (np.exp(-30) + np.exp(-20)) / 2, rtol=1e-6)


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


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_pytorch(dtype, scale):
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    logits, labels = sample(20, 10, dtype, scale)
    tensor = torch.from_numpy(logits).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(tensor, torch.from_numpy(labels))
    theirs.backward()
    loss, backward = softmax_cross_entropy(logits, labels)
    tolerance = 1e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(loss, theirs.item(), rtol=tolerance)
    np.testing.assert_allclose(backward(), tensor.grad.numpy(), rtol=10 * tolerance, atol=1e-8)
