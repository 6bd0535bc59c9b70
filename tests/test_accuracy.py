"""The numeric contract where it is hard: a mean far larger than the standard deviation."""

import numpy as np
import pytest

import reference
from bnext import functional as F
from bnext import nn
from cases import data, parameters


def offset_data(shape, ratio, seed=0):
    """float32 with standard deviation 1 and |mean| = ratio."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + ratio).astype(np.float32)


def relative_error(actual, expected):
    return float(np.max(np.abs(actual - expected) / (1 + np.abs(expected))))


LAYOUTS = {
    "rows": ((8, 16, 40, 40), 1),
    "short rows": ((64, 16, 7, 7), 1),
    "channels-last": ((8, 40, 40, 16), -1),
    "few channels last": ((8, 40, 40, 3), -1),
    "(N, C)": ((4096, 16), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4, -1e4])
def test_outputs_and_gradients_at_large_offsets(backend, layout, ratio):
    shape, channel_axis = LAYOUTS[layout]
    x = offset_data(shape, ratio)
    weight, bias = parameters(shape[channel_axis])
    grad_y = data(shape, channel_axis, seed=5, offset=0.5)
    expected = reference.BatchNorm(x, weight, bias, channel_axis=channel_axis)
    y, saved = F.batch_norm_forward(x, weight, bias, channel_axis=channel_axis)
    grads = F.batch_norm_backward(grad_y, saved)
    grad_x, grad_weight, grad_bias = expected.backward(grad_y)
    assert relative_error(y, expected.y) <= 5e-6
    assert relative_error(grads.x, grad_x) <= 5e-6
    assert relative_error(grads.weight, grad_weight) <= 5e-6
    assert relative_error(grads.bias, grad_bias) <= 5e-6
    z = F.batch_norm_inference(x, saved.mean, saved.var, weight, bias, channel_axis=channel_axis)
    inference = reference.BatchNorm(
        x, weight, bias, channel_axis=channel_axis, mean=saved.mean, var=saved.var
    )
    assert relative_error(z, inference.y) <= 5e-6


@pytest.mark.parametrize(("ratio", "bound"), [(0.0, 2e-6), (1e4, 2e-6), (1e5, 1e-3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_of_ten_million_values(backend, ratio, bound, channels_last):
    x = offset_data((10_000_000,), ratio)
    if channels_last:
        _, saved = F.batch_norm_forward(x.reshape(-1, 1), channel_axis=-1)
    else:
        _, saved = F.batch_norm_forward(x.reshape(10, 1, -1))
    wide = x.astype(np.float64)
    mean, var = wide.mean(), wide.var()
    assert abs(saved.mean[0] - mean) <= 2 * np.spacing(np.float32(abs(mean)))
    assert abs(saved.var[0] / var - 1) <= bound


def test_where_peers_lose_accuracy(capsys):
    """PyTorch on the same input, side by side: what the contract is worth."""
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    lines = [f"{'|mean|/std':>10} {'layout':>15} {'':>18} {'bnext':>9} {'PyTorch':>9}"]
    for ratio in (1e2, 1e4, 1e5):
        x = offset_data((32, 8, 56, 56), ratio)
        expected = reference.BatchNorm(x)
        for layout in ("contiguous", "channels-last"):
            tensor = torch.from_numpy(x)
            if layout == "contiguous":
                y, saved = F.batch_norm_forward(x)
                var = saved.var
            else:
                tensor = tensor.to(memory_format=torch.channels_last)
                last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
                y, saved = F.batch_norm_forward(last, channel_axis=-1)
                y, var = np.moveaxis(y, -1, 1), saved.var
            theirs = torch.nn.functional.batch_norm(tensor, None, None, training=True).numpy()
            running_var = torch.ones(8)
            torch.nn.functional.batch_norm(
                tensor, torch.zeros(8), running_var, training=True, momentum=1.0
            )
            count = x.size / 8
            their_var = running_var.numpy() * (count - 1) / count
            ours = relative_error(y, expected.y)
            our_var = float(np.max(np.abs(var / expected.var - 1)))
            rows = (
                ("output", ours, relative_error(theirs, expected.y)),
                (
                    "variance, relative",
                    our_var,
                    float(np.max(np.abs(their_var / expected.var - 1))),
                ),
            )
            for what, a, b in rows:
                lines.append(f"{ratio:>10.0e} {layout:>15} {what:>18} {a:9.1e} {b:9.1e}")
            if ratio <= 1e4:
                assert ours <= 5e-6
                assert our_var <= 2e-6
            else:
                assert our_var <= 1e-3
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_running_statistics_keep_up():
    """The layer's evaluation at a large offset is limited by float32 statistics alone."""
    x = offset_data((64, 4, 16, 16), 1e4)
    norm = nn.BatchNorm(4, momentum=None)
    norm.forward(x)
    expected = reference.BatchNorm(x, mean=norm.running_mean, var=norm.running_var)
    assert relative_error(norm(x), expected.y) <= 5e-6
