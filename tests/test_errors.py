"""Bad calls: each raises the right error, naming operation, argument, expected and actual."""

import re

import numpy as np
import pytest

import bnext
from bnext import _core, nn
from bnext import functional as F
from bnext.losses import UncertaintyWeighting, sigmoid_focal_loss, softmax_cross_entropy
from bnext.regularizers import l2_penalty
from bnext.scaling import BNP, BatchNormScaling

X = np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(np.float32)
G = np.ones_like(X)
W = np.ones(3, np.float32)
VAR = np.full(3, 2.0, np.float32)
ROWS = X[:2, :, 0, 0]
PAIR = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm(3))
RAGGED = [[1.0, 2.0], [3.0]]
LAST = np.ascontiguousarray(np.moveaxis(X, 1, -1))


def bn(x=X, *args, **kwargs):
    return F.batch_norm_forward(x, *args, **kwargs)


def saved():
    return bn()[1]


def inference(x=X, mean=W, var=VAR, *args, **kwargs):
    return F.batch_norm_inference(x, mean, var, *args, **kwargs)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def on_overlap(call):
    """Call with two views of one memory, shifted by one element."""
    memory = np.zeros(X.size + 1, np.float32)
    return call(memory[:-1].reshape(X.shape), memory[1:].reshape(X.shape))


def shares_out_with(call):
    """Call with `out` and another array in the same memory."""
    memory = np.zeros(X.size, np.float32)
    return call(memory[:3], memory.reshape(X.shape))


def forward_then_dropout_backward():
    return F.dropout_backward(G, saved())


def layer(module, x, train=True):
    return (module.train() if train else module.eval()).forward(x)


# (call, exception, what the message says). Rows are grouped by what is wrong.
BAD_CALLS = [
    # dtypes and kinds of x
    (lambda: bn(X.astype(np.int64)), TypeError, "batch_norm_forward: x: expected dtype float32, float64, float16 or bfloat16, got int64"),
    (lambda: bn(X > 0), TypeError, "batch_norm_forward: x: expected dtype .*, got bool"),
    (lambda: bn(X.astype(np.complex64)), TypeError, "x: expected dtype .*, got complex64"),
    (lambda: bn(X.astype(object)), TypeError, "x: expected dtype .*, got object"),
    (lambda: bn(X.astype(np.longdouble)), TypeError, "x: expected dtype .*, got float128|longdouble"),
    (lambda: bn(X.astype(str)), TypeError, "x: expected dtype .*, got <U"),
    (lambda: bn("text"), TypeError, "x: expected dtype .*, got <U4"),
    (lambda: bn(None), TypeError, "x: expected dtype .*, got object"),
    (lambda: bn([[1, 2], [3, 4]]), TypeError, "x: expected dtype .*, got int64"),
    (lambda: bn(np.zeros((2, 3), "datetime64[s]")), TypeError, "x: expected dtype .*, got datetime64"),
    (lambda: bn(X, out=np.ma.masked_array(X.copy(), X > 0)), TypeError, "out: expected an array without masked values"),
    (lambda: bn(np.ma.masked_array(X, X > 0)), TypeError, "x: expected an array without masked values"),
    (lambda: bn([[1.0, 2.0], [3.0]]), ValueError, "batch_norm_forward: x: expected an array, got a list that is none"),
    # shapes of x
    (lambda: bn(np.float32(1)), ValueError, r"batch_norm_forward: x: expected 2 or more dimensions, .*, got shape \(\)"),
    (lambda: bn(np.ones(3, "f")), ValueError, r"x: expected 2 or more dimensions, .*, got shape \(3,\)"),
    (lambda: bn(np.ones((1, 3), "f")), ValueError, r"x: 1 value per channel \(shape \(1, 3\)\) in training mode"),
    (lambda: bn(np.ones((1, 3, 1, 1), "f")), ValueError, r"1 value per channel \(shape \(1, 3, 1, 1\)\)"),
    (lambda: bn(np.ones((1, 1, 3), "f"), channel_axis=-1), ValueError, "1 value per channel"),
    # channel_axis
    (lambda: bn(channel_axis=0), ValueError, "channel_axis: expected 1 or -1, got 0"),
    (lambda: bn(channel_axis=3), ValueError, "channel_axis: expected 1 or -1, got 3"),
    (lambda: bn(channel_axis=2**70), ValueError, "channel_axis: out of range"),
    (lambda: bn(channel_axis="last"), TypeError, "channel_axis: expected an integer, got str"),
    (lambda: bn(channel_axis=1.0), TypeError, "channel_axis: expected an integer, got float"),
    # weight and bias
    (lambda: bn(X, np.ones(4, "f")), ValueError, r"batch_norm_forward: weight: expected shape \(3,\), got \(4,\)"),
    (lambda: bn(X, np.ones((3, 1), "f")), ValueError, r"weight: expected shape \(3,\), got \(3, 1\)"),
    (lambda: bn(X, np.float32(1)), ValueError, r"weight: expected shape \(3,\), got \(\)"),
    (lambda: bn(X, np.ones(3)), TypeError, "weight: expected dtype float32, got float64"),
    (lambda: bn(X, W, np.ones(3)), TypeError, "bias: expected dtype float32, got float64"),
    (lambda: bn(X, W, np.ones(2, "f")), ValueError, r"bias: expected shape \(3,\), got \(2,\)"),
    (lambda: bn(X, np.ones(3, int)), TypeError, "weight: expected dtype .*, got int64"),
    (lambda: bn(X, ["a", "b", "c"]), TypeError, "weight: expected dtype .*, got <U1"),
    (lambda: bn(X, [None, None, None]), TypeError, "weight: expected dtype .*, got object"),
    (lambda: bn(X, [[1.0, 2.0], [3.0]]), ValueError, "batch_norm_forward: weight: expected an array, got a list that is none"),
    (lambda: bn(LAST, np.ones(4, "f"), channel_axis=-1), ValueError, r"weight: expected shape \(3,\), got \(4,\)"),
    # eps, activation, slope
    (lambda: bn(eps=-1e-5), ValueError, "eps: expected a finite number that is not negative, got -1e-05"),
    (lambda: bn(eps=np.nan), ValueError, "eps: .*got nan"),
    (lambda: bn(eps=np.inf), ValueError, "eps: .*got inf"),
    (lambda: bn(eps="small"), TypeError, "eps: expected a number, got str"),
    (lambda: bn(eps=None), TypeError, "eps: expected a number, got NoneType"),
    (lambda: bn(activation="tanh"), ValueError, "activation: expected one of None, 'relu', .*, got 'tanh'"),
    (lambda: bn(activation="none"), ValueError, "activation: expected one of"),
    (lambda: bn(activation=1), TypeError, "activation: expected one of .*, got 1"),
    (lambda: bn(activation="leaky_relu", negative_slope=np.nan), ValueError, "negative_slope: expected a finite number, got nan"),
    (lambda: bn(negative_slope="x"), TypeError, "negative_slope: expected a number, got str"),
    # out
    (lambda: bn(out=[1.0]), TypeError, "out: expected a NumPy array, got list"),
    (lambda: bn(out=np.zeros((4, 3, 5, 6), "f")), ValueError, r"out: expected shape \(4, 3, 5, 5\), got \(4, 3, 5, 6\)"),
    (lambda: bn(out=np.zeros(X.shape)), TypeError, "out: expected dtype float32 like the data, got float64"),
    (lambda: bn(out=np.zeros(X.shape, int)), TypeError, "out: expected dtype float32, got int64"),
    (lambda: bn(out=read_only(X)), ValueError, "out: expected a writable array, got a read-only one"),
    (lambda: bn(out=np.zeros((4, 3, 5, 10), "f")[..., ::2]), ValueError, "out: expected a C-contiguous, aligned array"),
    (lambda: bn(out=np.zeros(X.shape, ">f4")), ValueError, "out: expected a C-contiguous, aligned array of native byte order"),
    (lambda: on_overlap(lambda x, out: bn(x, out=out)), ValueError, "out: overlaps x in part"),
    (lambda: shares_out_with(lambda small, out: bn(X, small, out=out)), ValueError, "out: overlaps weight"),
    (lambda: shares_out_with(lambda small, out: bn(X, None, small, out=out)), ValueError, "out: overlaps bias"),
    # calls
    (lambda: F.batch_norm_forward(), TypeError, "batch_norm_forward"),
    (lambda: F.batch_norm_forward(X, W, W, 1e-5), TypeError, "batch_norm_forward"),
    (lambda: bn(epsilon=1e-5), TypeError, "epsilon|incompatible"),
    # backward
    (lambda: F.batch_norm_backward(G, None), TypeError, "batch_norm_backward: saved: expected what batch_norm_forward returned, got NoneType"),
    (lambda: F.batch_norm_backward(G, {}), TypeError, "saved: .*got dict"),
    (lambda: F.batch_norm_backward(G, F.dropout_forward(X)[1]), TypeError, "saved: .*got .*DropoutSaved"),
    (lambda: F.batch_norm_backward(G[:2], saved()), ValueError, r"grad_y: expected shape \(4, 3, 5, 5\), got \(2, 3, 5, 5\)"),
    (lambda: F.batch_norm_backward(G.astype(float), saved()), TypeError, "grad_y: expected dtype float32 like the data, got float64"),
    (lambda: F.batch_norm_backward(G, saved(), out=np.zeros(3, "f")), ValueError, r"out: expected shape .*, got \(3,\)"),
    (lambda: F.batch_norm_backward(G, saved(), out=read_only(X)), ValueError, "out: expected a writable array"),
    (lambda: on_overlap(lambda g, out: F.batch_norm_backward(g, saved(), out=out)), ValueError, "out: overlaps grad_y in part"),
    # inference
    (lambda: inference(var=np.array([1, -1, 1], "f")), ValueError, "batch_norm_inference: var: expected no negative variance"),
    (lambda: inference(mean=np.ones(2, "f")), ValueError, r"mean: expected shape \(3,\), got \(2,\)"),
    (lambda: inference(var=np.ones(2, "f")), ValueError, r"var: expected shape \(3,\), got \(2,\)"),
    (lambda: inference(mean=None), ValueError, "mean: expected an array, got none"),
    (lambda: inference(var=np.ones(3)), TypeError, "var: expected dtype float32, got float64"),
    (lambda: inference(np.ones(3, "f")), ValueError, "x: expected 2 or more dimensions"),
    (lambda: shares_out_with(lambda small, out: inference(mean=small, out=out)), ValueError, "out: overlaps mean"),
    (lambda: shares_out_with(lambda small, out: inference(var=small, out=out)), ValueError, "out: overlaps var"),
    # dropout
    (lambda: F.alpha_dropout_forward(X, 2), ValueError, "alpha_dropout_forward: p: expected a probability"),
    (lambda: F.dropout_forward(X, -0.1), ValueError, r"dropout_forward: p: expected a probability in \[0, 1\], got -0.1"),
    (lambda: F.dropout_forward(X, 1.1), ValueError, "p: expected a probability"),
    (lambda: F.dropout_forward(X, np.nan), ValueError, "p: .*got nan"),
    (lambda: F.dropout_forward(X, "half"), TypeError, "p: expected a number, got str"),
    (lambda: F.dropout_forward(X.astype(np.int32)), TypeError, "x: expected dtype .*, got int32"),
    (lambda: F.dropout_forward(X, generator=7), TypeError, "generator: expected a bnext.Generator, got int"),
    (lambda: F.dropout_forward(X, generator=np.random.default_rng()), TypeError, "generator: expected a bnext.Generator"),
    (lambda: F.dropout_forward(X, out=np.zeros(3, "f")), ValueError, r"out: expected shape .*, got \(3,\)"),
    (lambda: F.dropout_backward(G, 0.5), TypeError, "dropout_backward: saved: expected what dropout_forward returned, got float"),
    (forward_then_dropout_backward, TypeError, "saved: .*got .*BatchNormSaved"),
    (lambda: F.channel_dropout_forward(X, channel_axis=1.0), TypeError, "channel_dropout_forward: channel_axis: expected 1 or -1, got 1.0"),
    (lambda: F.channel_dropout_mask(0, 0, (2, 3, -1, 4), 0.5), ValueError, r"channel_dropout_mask: shape: expected no negative extent, got \(2, 3, -1, 4\)"),
    (lambda: F.drop_block2d_mask(0, 0, (2, 3, -1, 4), 0.5), ValueError, "drop_block2d_mask: shape: expected no negative extent"),
    (lambda: F.drop_block2d_mask(0, 0, (2, 3, 4, 4), np.ones(2)), TypeError, "drop_block2d_mask: p: expected a number, got ndarray"),
    (lambda: F.channel_dropout_mask(0, 0, None, 0.5), TypeError, "channel_dropout_mask: shape: expected a tuple of integers, got None"),
    (lambda: F.drop_path_mask(0, 0, 3.5, 0.5), TypeError, "drop_path_mask: shape: expected a tuple of integers, got 3.5"),
    (lambda: F.drop_block2d_mask(0, 0, (2, 3), 0.5), ValueError, r"drop_block2d_mask: shape: expected \(N, C, H, W\), got shape \(2, 3\)"),
    (lambda: F.drop_block2d_forward(X, mask_shape=3), TypeError, "drop_block2d_forward: mask_shape: expected a tuple of integers, got 3"),
    (lambda: F.gaussian_dropout_forward(X, mask_shape=3), TypeError, "gaussian_dropout_forward: mask_shape: expected a tuple of integers, got 3"),
    # losses and what takes a model
    (lambda: softmax_cross_entropy(ROWS, [0, 1])[1](None), TypeError, "softmax_cross_entropy: grad_loss: expected numbers, got object"),
    (lambda: sigmoid_focal_loss(ROWS, ROWS > 0)[1]("x"), TypeError, "sigmoid_focal_loss: grad_loss: expected numbers, got <U1"),
    (lambda: UncertaintyWeighting(3), TypeError, "UncertaintyWeighting: tasks: expected one for each loss, got 3"),
    (lambda: UncertaintyWeighting([1]).forward(["x"]), TypeError, "UncertaintyWeighting: losses: expected numbers, got <U1"),
    (lambda: l2_penalty(None, 0.1), TypeError, "l2_penalty: parameters: expected several, got one NoneType"),
    (lambda: bnext.fold(nn.Linear(3, 3).eval(), ROWS, tolerance=-1), ValueError, "fold: tolerance: expected a number >= 0, got -1"),
    (lambda: bnext.reestimate(nn.BatchNorm(3), None), TypeError, "reestimate: loader: expected an iterable of batches, such as .x., got NoneType"),
    (lambda: bnext.reestimate(nn.BatchNorm(3), {"x": X}), TypeError, "reestimate: loader: .*, got dict"),
    (lambda: bnext.reestimate(nn.BatchNorm(3), "x"), TypeError, "reestimate: loader: .*, got str"),
    (lambda: bnext.fold(nn.Linear(3, 3).eval(), RAGGED), ValueError, "fold: probe: expected an array, got a list that is none"),
    (lambda: BatchNormScaling(PAIR, clip=("a", "b")), ValueError, "BatchNormScaling: clip: expected two numbers"),
    *(
        (lambda call=call: call(X), TypeError, f"{name}: model: expected a Module, got ndarray")
        for name, call in (
            ("fold", lambda model: bnext.fold(model, X)),
            ("reestimate", lambda model: bnext.reestimate(model, [X])),
            ("mc_dropout", lambda model: bnext.mc_dropout(model, X)),
            ("stats_updates", lambda model: nn.stats_updates(model, False).__enter__()),
            ("use_bank", lambda model: nn.use_bank(model, "a").__enter__()),
            ("BatchNormScaling", BatchNormScaling),
            ("BNP", BNP),
        )
    ),
    # generators, threads, backends
    (lambda: bnext.Generator(-1), ValueError, r"Generator: seed: expected 0 <= seed < 2\*\*64, got -1"),
    (lambda: bnext.Generator(2**64), ValueError, r"seed: expected 0 <= seed < 2\*\*64"),
    (lambda: bnext.Generator(1.5), TypeError, "seed: expected an integer, got float"),
    (lambda: bnext.Generator(True), TypeError, "seed: expected an integer, got bool"),
    (lambda: bnext.Generator(), TypeError, "seed|incompatible"),
    (lambda: bnext.manual_seed("x"), TypeError, "seed: expected an integer, got str"),
    (lambda: setattr(bnext.Generator(1), "state", {"seed": 1}), ValueError, "state: expected the keys 'seed' and 'offset'"),
    (lambda: setattr(bnext.Generator(1), "state", 3), TypeError, "state: expected a dict, got int"),
    (lambda: setattr(bnext.Generator(1), "state", {"seed": 1, "offset": -1}), ValueError, "offset: expected 0 <= offset"),
    (lambda: bnext.set_num_threads(0), ValueError, "set_num_threads: n: expected 1 or more, got 0"),
    (lambda: bnext.set_num_threads(1.5), TypeError, "n: expected an integer, got float"),
    (lambda: bnext.set_num_threads(2**40), ValueError, "n: out of range"),
    (lambda: _core.set_backend("avx9"), ValueError, "backend: no backend 'avx9' on this machine; available: "),
    # layers
    (lambda: nn.BatchNorm(0), ValueError, "BatchNorm: num_features: expected 1 or more, got 0"),
    (lambda: nn.BatchNorm(3, eps=-1), ValueError, "BatchNorm: eps: expected a finite number >= 0, got -1"),
    (lambda: nn.BatchNorm(3, eps="a"), TypeError, "BatchNorm: eps: expected a number, got str"),
    (lambda: nn.BatchNorm(3, momentum=1.5), ValueError, r"BatchNorm: momentum: expected None or a number in \[0, 1\], got 1.5"),
    (lambda: nn.BatchNorm(3, momentum=np.nan), ValueError, "BatchNorm: momentum: .*got nan"),
    (lambda: nn.BatchNorm(3, dtype=np.int32), TypeError, "BatchNorm: dtype: expected float32 or float64, got int32"),
    (lambda: nn.BatchNorm(3, activation="tanh"), ValueError, "BatchNorm: activation: expected one of .*, got 'tanh'"),
    (lambda: nn.BatchNorm(3, channel_axis=2), ValueError, "BatchNorm: channel_axis: expected 1 or -1, got 2"),
    (lambda: layer(nn.BatchNorm(4), X), ValueError, r"BatchNorm: expected 4 channels on axis 1, got 3 \(shape \(4, 3, 5, 5\)\)"),
    (lambda: layer(nn.BatchNorm(3), X[:1, :, :1, :1]), ValueError, r"BatchNorm: 1 value per channel \(shape \(1, 3, 1, 1\)\) in training mode; .*eval\(\)"),
    (lambda: nn.BatchNorm(3, track_running_stats=False)(X[:1, :, :1, :1]), ValueError, "BatchNorm: 1 value .* without running statistics; .* last batch of one sample$"),
    (lambda: nn.BatchNorm(3)(RAGGED), ValueError, "BatchNorm: x: expected an array, got a list that is none"),
    (lambda: nn.BatchNorm(2)(ROWS[:, :2], RAGGED), ValueError, "BatchNorm: residual: expected an array"),
    (lambda: nn.BatchNorm(2)(ROWS[:, :2], mask=RAGGED), ValueError, "BatchNorm: mask: expected an array"),
    (lambda: nn.ReLU()(RAGGED), ValueError, "ReLU: x: expected an array, got a list that is none"),
    (lambda: nn.Residual(nn.ReLU())(RAGGED), ValueError, "Residual: x: expected an array"),
    (lambda: layer(nn.BatchNorm(3), X.astype(float)), TypeError, "x: expected dtype float32, float16 or bfloat16 like the layer, got float64"),
    (lambda: layer(nn.BatchNorm(3), W), ValueError, "x: expected 2 or more dimensions"),
    (lambda: layer(nn.BatchNorm1d(3), X), ValueError, r"BatchNorm1d: expected 2 or 3 dimensions, .*got shape \(4, 3, 5, 5\)"),
    (lambda: layer(nn.BatchNorm2d(3), X[..., 0]), ValueError, r"BatchNorm2d: expected 4 dimensions, .*got shape \(4, 3, 5\)"),
    (lambda: layer(nn.BatchNorm3d(3), X), ValueError, "BatchNorm3d: expected 5 dimensions"),
    (lambda: nn.Dropout(2), ValueError, r"Dropout: p: expected a number in \[0, 1\], got 2"),
    (lambda: nn.Dropout("a"), TypeError, "Dropout: p: expected a number, got str"),
    (lambda: layer(nn.Dropout2d(0.5), X[0]), ValueError, r"Dropout2d: expected \(N, C, H, W\), got shape \(3, 5, 5\)"),
    (lambda: nn.BatchNorm(2.5), TypeError, "BatchNorm: num_features: expected an integer, got 2.5"),
    (lambda: nn.BatchNorm(3, negative_slope=np.inf), ValueError, "BatchNorm: negative_slope: expected a finite number, got inf"),
    (lambda: nn.BatchNorm(3, generator=7), TypeError, "BatchNorm: generator: expected a bnext.Generator or None, got int"),
    (lambda: nn.BatchNorm(3, dtype=None), TypeError, "BatchNorm: dtype: expected float32 or float64, got None"),
    (lambda: nn.BatchNorm(3, dtype="wide"), TypeError, "BatchNorm: dtype: expected float32 or float64, got 'wide'"),
    (lambda: nn.BatchNorm(3, banks=3), TypeError, "BatchNorm: banks: expected names, got 3"),
    (lambda: nn.BatchNorm(3, channel_axis=1.0), TypeError, "BatchNorm: channel_axis: expected 1 or -1, got 1.0"),
    (lambda: nn.Dropout2d(0.5, channel_axis="last"), TypeError, "Dropout2d: channel_axis: expected 1 or -1, got 'last'"),
    (lambda: nn.Dropout(generator="x"), TypeError, "Dropout: generator: expected a bnext.Generator or None, got str"),
    (lambda: layer(nn.Dropout(0.5), X.astype(int), train=False), TypeError, "Dropout: x: expected float32, .*, got int64"),
    (lambda: layer(nn.ReLU(), np.ma.masked_array(X, X > 0)), TypeError, "ReLU: x: expected an array without masked values"),
    (lambda: softmax_cross_entropy(np.ma.masked_array(ROWS, ROWS > 0), [0, 1]), TypeError, "softmax_cross_entropy: logits: expected an array without masked"),
    (lambda: nn.LeakyReLU("x"), TypeError, "LeakyReLU: negative_slope: expected a number, got str"),
    (lambda: nn.BatchNorm(3).load_state_dict({}), ValueError, "BatchNorm.load_state_dict: missing key 'bias'"),
    (lambda: nn.BatchNorm(3).load_state_dict(nn.BatchNorm(4).state_dict()), ValueError, r"'bias': expected shape \(3,\), got \(4,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "exception", "message"), BAD_CALLS)
def test_bad_call(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_the_table_is_long_enough():
    assert len(BAD_CALLS) >= 60


def test_nothing_is_written_or_drawn_by_a_bad_call():
    x, out = X.copy(), np.full_like(X, 7)
    generator = bnext.Generator(1)
    for call in (
        lambda: bn(x, np.ones(4, "f"), out=out),
        lambda: bn(x, eps=-1, out=out),
        lambda: inference(x, var=-W, out=out),
        lambda: F.dropout_forward(x, 2, generator=generator, out=out),
        lambda: F.batch_norm_backward(G[:1], saved(), out=out),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    assert (out == 7).all()
    assert np.array_equal(x, X)
    assert generator.state == {"seed": 1, "offset": 0}


def test_a_bad_call_leaves_a_layer_as_it_was():
    model = nn.BatchNorm(3)
    before = {key: value.copy() for key, value in model.state_dict().items()}
    for bad in (X[:1, :, :1, :1], X[:, :2], X.astype(float), X.astype(int)):
        with pytest.raises((ValueError, TypeError)):
            model.forward(bad)
    assert all(np.array_equal(value, before[key]) for key, value in model.state_dict().items())


def test_layer_errors_name_the_layer_by_its_path():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm(3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = Block()

    with pytest.raises(ValueError, match=re.escape("BatchNorm 'stem.norm': 1 value per channel")):
        Net().stem.norm.forward(X[:1, :, :1, :1])
