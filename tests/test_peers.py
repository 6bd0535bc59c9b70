"""The same inputs through PyTorch: forward, autograd, running statistics, layers."""

import math

import numpy as np
import pytest

from bnext import functional as F
from bnext import nn
from cases import DTYPES, SHAPES, data, name_of, parameters

torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")

# PyTorch's own rounding dominates: it accumulates float32 in float32.
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def assert_close(ours, theirs):
    tolerance = TOLERANCE[ours.dtype.type]
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def channels_first(array, channel_axis):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, channel_axis, 1)))


@dtypes
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("case", [c for c in SHAPES if np.prod(c[0]) < 20_000], ids=name_of)
def test_batch_norm_and_autograd(case, activation, dtype):
    shape, channel_axis = case
    x = data(shape, channel_axis, dtype, offset=0.3)
    g = data(shape, channel_axis, dtype, seed=3, offset=0.3)
    weight, bias = parameters(shape[channel_axis], dtype)
    y, saved = F.batch_norm_forward(
        x, weight, bias, channel_axis=channel_axis, activation=activation
    )
    grads = F.batch_norm_backward(g, saved)

    leaves = [channels_first(x, channel_axis), torch.from_numpy(weight), torch.from_numpy(bias)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
    if activation is not None:
        theirs = getattr(torch.nn.functional, activation)(theirs)
    theirs.backward(channels_first(g, channel_axis))

    # The natural size of a gradient is that of weight r grad_y, which it is a difference of.
    per_channel = (1, -1) + (1,) * (len(shape) - 2)
    unit = np.maximum(1, np.abs(weight * saved.inv_std)).reshape(per_channel)
    assert_close(np.moveaxis(y, channel_axis, 1), theirs.detach().numpy())
    assert_close(np.moveaxis(grads.x, channel_axis, 1) / unit, leaves[0].grad.numpy() / unit)
    root = math.sqrt(saved.count)
    assert_close(grads.weight / root, leaves[1].grad.numpy() / root)
    assert_close(grads.bias / root, leaves[2].grad.numpy() / root)


@dtypes
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.filterwarnings("ignore:BatchNorm2d. momentum 1.0")
def test_layer_trains_and_evaluates_alike(dtype, momentum, affine):
    ours = nn.BatchNorm2d(5, momentum=momentum, affine=affine, dtype=dtype)
    theirs = torch.nn.BatchNorm2d(
        5, momentum=momentum, affine=affine, dtype=torch.from_numpy(np.zeros(1, dtype)).dtype
    )
    for step in range(4):
        x = data((6, 5, 4, 3), 1, dtype, seed=step, offset=0.3)
        g = data((6, 5, 4, 3), 1, dtype, seed=9, offset=0.3)
        tensor = torch.from_numpy(x).requires_grad_()
        y, backward = ours.forward(x)
        expected = theirs(tensor)
        expected.backward(torch.from_numpy(g))
        assert_close(y, expected.detach().numpy())
        assert_close(backward(g), tensor.grad.numpy())
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[key], value.numpy(), rtol=TOLERANCE[dtype])
    if affine:
        for name in ("weight", "bias"):
            assert_close(getattr(ours, name).grad, getattr(theirs, name).grad.numpy())

    theirs.eval()
    ours.eval()
    tensor = torch.from_numpy(x).requires_grad_()
    y, backward = ours.forward(x)
    expected = theirs(tensor)
    expected.backward(torch.from_numpy(g))
    assert_close(y, expected.detach().numpy())
    assert_close(ours(x), expected.detach().numpy())
    assert_close(backward(g), tensor.grad.numpy())


def test_state_dict_has_the_names_of_pytorch():
    for options in ({}, {"affine": False}, {"track_running_stats": False}):
        ours, theirs = nn.BatchNorm2d(3, **options), torch.nn.BatchNorm2d(3, **options)
        assert set(ours.state_dict()) == set(theirs.state_dict())
        ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})


def test_tensors_are_accepted_as_arrays():
    x = torch.randn(4, 3, 5)
    y, _ = F.batch_norm_forward(x)
    np.testing.assert_allclose(
        y, torch.nn.functional.batch_norm(x, None, None, training=True), atol=1e-5
    )
