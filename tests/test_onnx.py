"""ONNX: exported models run in onnxruntime and come back; foreign graphs load or say why not."""

import copy
import io
import itertools
import sys
import warnings

import numpy as np
import pytest

import bnext
import bnext.onnx
from bnext import functional as F
from bnext import models, nn
from gradcheck import gradcheck

onnx = pytest.importorskip("onnx", reason='pip install "bnext[onnx]"')
ort = pytest.importorskip("onnxruntime", reason='pip install "bnext[test]"')

# Of float32, in units of 1 + |y|: two implementations of a few layers of some hundred terms.
TOLERANCE = 2e-5


def randomize(model, seed=0):
    """Parameters and statistics of their own everywhere."""
    rng = np.random.default_rng(seed)
    for name, array in model.state_dict().items():
        if name.endswith("running_var"):
            array[...] = rng.uniform(0.5, 2, array.shape)
        elif not name.endswith("num_batches_tracked"):
            array[...] = rng.normal(0, 0.5, array.shape)
    return model


def batch(shape, n=5, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(dtype)


def run(proto, x):
    """The outputs of onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(
        proto.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        # It removes Dropout between other nodes, in training mode too.
        disabled_optimizers=["EliminateDropout"],
    )
    return session.run(None, {session.get_inputs()[0].name: x})


def assert_near(ours, theirs):
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs) / (1 + np.abs(theirs))
    assert difference.max(initial=0) <= TOLERANCE


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    # ONNX has no place for the number of batches seen.
    names = {name for name in one if not name.endswith("num_batches_tracked")}
    assert names == {name for name in other if not name.endswith("num_batches_tracked")}
    for name in names:
        np.testing.assert_array_equal(one[name], other[name])


IMAGE, VECTOR, SEQUENCE, VOLUME = (4, 6, 5), (7,), (4, 9), (4, 3, 4, 5)
# (layer, shape of a sample); they come back as the same layer with the same state.
LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3), IMAGE),
    "conv, all options": (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, bias=False),
        IMAGE,
    ),
    "conv, depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), IMAGE),
    "linear": (nn.Linear(7, 3), VECTOR),
    "linear, no bias": (nn.Linear(7, 3, bias=False), VECTOR),
    "linear, one output": (nn.Linear(7, 1), VECTOR),
    "linear, 3 axes": (nn.Linear(9, 3), SEQUENCE),
    "linear, 3 axes, no bias": (nn.Linear(9, 3, bias=False), SEQUENCE),
    "batch norm": (nn.BatchNorm(4, eps=0.01, momentum=0.03), IMAGE),
    "batch norm 1d": (nn.BatchNorm1d(4), SEQUENCE),
    "batch norm 2d": (nn.BatchNorm2d(4), IMAGE),
    "batch norm 3d": (nn.BatchNorm3d(4), VOLUME),
    "batch norm, last axis": (nn.BatchNorm(5, channel_axis=-1), IMAGE),
    "batch norm, last of 3 axes": (nn.BatchNorm(9, channel_axis=-1), SEQUENCE),
    "batch norm, last axis, relu": (
        nn.BatchNorm(5, channel_axis=-1, activation="relu"),
        IMAGE,
    ),
    **{
        f"batch norm, {name}": (nn.BatchNorm(7, activation=name, negative_slope=0.2), VECTOR)
        for name in F.activations
    },
    "dropout": (nn.Dropout(0.3), IMAGE),
    "dropout, p=0": (nn.Dropout(0), VECTOR),
    "relu": (nn.ReLU(), IMAGE),
    "leaky relu": (nn.LeakyReLU(0.2), VECTOR),
    "relu6": (nn.ReLU6(), IMAGE),
    "hardswish": (nn.Hardswish(), VECTOR),
    "silu": (nn.SiLU(), IMAGE),
    "gelu": (nn.GELU(), SEQUENCE),
    "max pool": (nn.MaxPool2d(2), IMAGE),
    "max pool, all options": (nn.MaxPool2d((3, 2), (1, 2), (1, 0)), IMAGE),
    "avg pool": (nn.AvgPool2d(2), IMAGE),
    "avg pool, all options": (nn.AvgPool2d((3, 2), (1, 2), (1, 1)), IMAGE),
    "avg pool, without padding": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "global avg pool": (nn.GlobalAvgPool2d(), IMAGE),
    "flatten": (nn.Flatten(), IMAGE),
    "sequential": (
        nn.Sequential({"a": nn.Linear(7, 5), "b": nn.Sequential(nn.ReLU(), nn.Linear(5, 2))}),
        VECTOR,
    ),
    "residual": (nn.Residual(nn.Sequential(nn.Linear(7, 7), nn.ReLU())), VECTOR),
    "residual, shortcut": (
        nn.Residual(nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 1)),
        IMAGE,
    ),
}
# What runs the same in onnxruntime and comes back as something equal in evaluation.
UNLIKE = {
    "batch norm, last of 2 axes": (nn.BatchNorm(7, channel_axis=-1), VECTOR),
    "batch norm, not affine": (nn.BatchNorm(4, affine=False), IMAGE),
    "batch norm, channels not normalized": (
        nn.BatchNorm(4, channel_mask=[True, False, True, False]),
        IMAGE,
    ),
    "batch norm, banks": (nn.BatchNorm(4, banks=("real", "fake")), IMAGE),
    "batch norm, ghost batches": (nn.BatchNorm(4, ghost_batch_size=2), IMAGE),
    "batch norm, renormalized": (nn.BatchRenorm(4), IMAGE),
    **{
        kind.__name__: (nn.Sequential(kind(0.3), nn.ReLU()), shape)
        for kind, shape in (
            (nn.Dropout1d, SEQUENCE),
            (nn.Dropout2d, IMAGE),
            (nn.Dropout3d, VOLUME),
            (nn.DropPath, IMAGE),
            (nn.AlphaDropout, IMAGE),
            (nn.FeatureAlphaDropout, IMAGE),
            (nn.GaussianDropout, IMAGE),
        )
    },
    "dropout of everything": (
        nn.Sequential(nn.Dropout(1.0), nn.BatchNorm(7, dropout=1.0), nn.ReLU()),
        VECTOR,
    ),
    "DropBlock2d": (nn.Sequential(nn.DropBlock2d(0.3, 3), nn.ReLU()), IMAGE),
    "statistics of the input": (nn.Sequential(nn.InputStatistics(4), nn.Conv2d(4, 2, 3)), IMAGE),
    "nothing": (nn.Sequential(), VECTOR),
    "residual, norm": (
        nn.Residual(nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm(4, activation="relu")),
        IMAGE,
    ),
    "residual, shortcut, norm over the last axis": (
        nn.Residual(
            nn.Linear(9, 5),
            nn.Linear(9, 5),
            norm=nn.BatchNorm(5, channel_axis=-1, activation="silu"),
        ),
        SEQUENCE,
    ),
}
# What runs the same in onnxruntime and cannot come back.
ONE_WAY = {
    "flatten the first axes": (nn.Sequential(nn.Flatten(0, 1), nn.ReLU()), IMAGE),
    "flatten the middle": (nn.Flatten(1, 2), IMAGE),
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("case", [*LAYERS, *UNLIKE, *ONE_WAY])
def test_layers_run_in_onnxruntime(case, n, tmp_path):
    layer, shape = {**LAYERS, **UNLIKE, **ONE_WAY}[case]
    randomize(layer)
    path = tmp_path / "layer.onnx"
    proto = bnext.onnx.export(layer, path, shape)
    assert onnx.load(path) == proto
    x = batch(shape, n)
    (y,) = run(proto, x)
    assert_near(layer(x), y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_come_back(case, dtype, tmp_path):
    layer, shape = LAYERS[case]
    if dtype == np.float64:
        layer = in_float64(layer)
    randomize(layer)
    path = tmp_path / "layer.onnx"
    loaded = bnext.onnx.load(bnext.onnx.export(layer, path, shape))
    assert_same_state(layer, loaded)
    x = batch(shape, dtype=dtype if layer.state_dict() else np.float32)
    np.testing.assert_array_equal(loaded(x), layer(x))
    if not list(layer.children()):
        # Layers of the same kind and options; the ranked aliases come back as BatchNorm.
        assert isinstance(layer, type(loaded))
        assert loaded.extra_repr() == layer.extra_repr()
    again = bnext.onnx.export(loaded, None, shape)
    np.testing.assert_array_equal(bnext.onnx.load(str(path))(x), bnext.onnx.load(again)(x))


def in_float64(model):
    """A copy whose parameters and statistics are float64."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        for parameter in layer._parameters.values():
            parameter.data = parameter.data.astype(np.float64)
        for name, buffer in list(layer._buffers.items()):
            if name != "num_batches_tracked":
                setattr(layer, name, buffer.astype(np.float64))
        if hasattr(layer, "dtype"):
            layer.dtype = np.dtype(np.float64)
    return model


@pytest.mark.parametrize("case", UNLIKE)
def test_what_comes_back_as_something_equal(case):
    layer, shape = UNLIKE[case]
    loaded = bnext.onnx.load(bnext.onnx.export(randomize(layer), None, shape))
    x = batch(shape)
    np.testing.assert_array_equal(loaded(x), layer(x))
    assert not any(isinstance(part, nn.Dropout) for part in loaded.modules())


INPUTS = {"mlp": (6,), "cnn": (1, 6, 5), "resnet": (2, 5, 4)}


@pytest.mark.parametrize("name", models.names())
def test_models(name):
    """Every model with every option: same outputs there, same outputs and state back."""
    x = batch(INPUTS[name])
    for norm, position, (dropout, place) in itertools.product(
        models.NORMS,
        models.NORM_POSITIONS,
        [(0.0, "head"), *((0.3, place) for place in models.DROPOUT_POSITIONS)],
    ):
        if norm == "none" and place == "before-norm":
            continue
        model = models.build(
            name,
            INPUTS[name],
            3,
            norm=norm,
            norm_position=position,
            dropout=dropout,
            dropout_position=place,
            depth=1,
            width=4,
        )
        randomize(model)
        proto = bnext.onnx.export(model, None, INPUTS[name])
        assert_near(model(x), run(proto, x)[0])
        loaded = bnext.onnx.load(proto)
        assert_same_state(model, loaded)
        np.testing.assert_array_equal(loaded(x), model(x))
        kinds = [[type(layer) for layer in m.modules()] for m in (model, loaded)]
        for kind in (nn.BatchNorm, nn.Dropout, nn.ReLU):
            assert kinds[0].count(kind) == kinds[1].count(kind)


def test_a_default_model_and_its_state_in_a_checkpoint():
    model = randomize(models.build("resnet", (1, 28, 28), 10))
    x = batch((1, 28, 28), 3)
    proto = bnext.onnx.export(model, None, (1, 28, 28))
    assert_near(model(x), run(proto, x)[0])
    loaded = bnext.onnx.load(proto)
    other = models.build("resnet", (1, 28, 28), 10)
    other.load_state_dict(loaded.state_dict())
    np.testing.assert_array_equal(other(x), model(x))


@pytest.mark.parametrize("opset", [15, 17, 20, None])
def test_opsets(opset):
    newest = min(onnx.defs.onnx_opset_version(), 23)  # which onnxruntime need not know
    model = randomize(models.build("cnn", (1, 8, 8), 3, dropout=0.2, width=4))
    x = batch((1, 8, 8))
    proto = bnext.onnx.export(model, None, (1, 8, 8), opset=opset or newest)
    assert proto.opset_import[0].version == (opset or newest)
    assert_near(model(x), run(proto, x)[0])
    np.testing.assert_array_equal(bnext.onnx.load(proto)(x), model(x))


# -- training --------------------------------------------------------------------------------
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_in_training(channel_axis):
    layer = nn.Sequential({"norm": nn.BatchNorm(5, momentum=0.3, channel_axis=channel_axis)})
    randomize(layer)
    shape = (5, 6) if channel_axis == 1 else (6, 5)
    before = {name: array.copy() for name, array in layer.state_dict().items()}
    proto = bnext.onnx.export(layer, None, shape, training=True)
    names = [output.name for output in proto.graph.output]
    assert names == ["y", "norm.new_running_mean", "norm.new_running_var"]
    loaded = bnext.onnx.load(proto)
    x = batch(shape, 3)
    y, mean, var = run(proto, x)
    assert_near(layer.forward(x)[0], y)
    after = layer.state_dict()
    assert_near(after["norm.running_mean"], mean)
    # Theirs collects the variance over the 18 values of a channel, ours over 17.
    moved = after["norm.running_var"] - 0.7 * before["norm.running_var"]
    assert_near(moved * 17 / 18 + 0.7 * before["norm.running_var"], var)
    # A layer that goes on from the same state.
    np.testing.assert_array_equal(loaded.forward(x)[0], layer.forward(x)[0])


def test_batch_norm_without_running_statistics():
    """It uses the batch's in evaluation too, so its node is in training mode."""
    layer = nn.Sequential(nn.BatchNorm(4, track_running_stats=False), nn.ReLU())
    proto = bnext.onnx.export(randomize(layer), None, IMAGE)
    x = batch(IMAGE)
    (y,) = run(proto, x)
    assert_near(layer(x), y)
    loaded = bnext.onnx.load(proto)
    assert_near(loaded.forward(x)[0], y)
    assert_near(loaded(x), y)
    assert not loaded.track_running_stats


def test_frozen_batch_norm_in_training():
    layer = randomize(nn.BatchNorm(5)).freeze()
    x = batch((5, 6))
    (y,) = run(bnext.onnx.export(layer, None, (5, 6), training=True), x)
    assert_near(layer.forward(x)[0], y)


def test_dropout_of_batch_norm():
    layer = randomize(nn.BatchNorm(5, activation="relu", dropout=0.25))
    x = batch((5, 6), 40)
    y, *_ = run(bnext.onnx.export(layer, None, (5, 6), training=True), x)
    full, _ = F.batch_norm_forward(x, layer.weight.data, layer.bias.data, activation="relu")
    kept = y != 0
    assert_near(np.where(kept, full / 0.75, 0).astype(F32), y)
    assert abs(kept.sum() / (full != 0).sum() - 0.75) < 0.1
    (y,) = run(bnext.onnx.export(layer, None, (5, 6)), x)
    assert_near(layer(x), y)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.DropPath])
def test_dropout_in_training(kind):
    shape = (16, 3, 3)
    layer = nn.Sequential(kind(0.25), kind(0.25, generator=bnext.Generator(7)))
    proto = bnext.onnx.export(layer, None, shape, training=True)
    seeds = [
        attribute.i
        for node in proto.graph.node
        for attribute in node.attribute
        if attribute.name == "seed"
    ]
    assert len(set(seeds)) == 2
    x = batch(shape, 40)
    factors = run(proto, x)[0] / x
    steps = np.round(factors * 0.75**2, 3)
    assert set(np.unique(steps)) == {0, 1}
    if kind is nn.Dropout2d:
        assert (steps == steps[..., :1, :1]).all()
        steps = steps[..., 0, 0]
    elif kind is nn.DropPath:
        assert (steps == steps[:, :1, :1, :1]).all()
        steps = steps[:, 0, 0, 0]
    # Five standard deviations of a binomial distribution.
    spread = np.sqrt(0.5625 * 0.4375 / steps.size)
    assert abs(steps.mean() - 0.5625) < 5 * spread
    # Without training it is the identity.
    np.testing.assert_array_equal(run(bnext.onnx.export(layer, None, shape), x)[0], x)


def test_training_twice_the_same_seed():
    layer = nn.Dropout(0.5, generator=bnext.Generator(2**64 - 1))
    one, two = (bnext.onnx.export(layer, None, (9,), training=True) for _ in range(2))
    assert one == two


# -- graphs ----------------------------------------------------------------------------------
def make_model(nodes, shape=("N", 4), constants=(), opset=20, outputs=("y",), inputs=("x",)):
    """An ONNX model of `nodes` (op, inputs, outputs, attributes)."""
    helper = onnx.helper
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node(op, inputs, outputs, f"n{index}", **attributes)
            for index, (op, inputs, outputs, attributes) in enumerate(nodes)
        ],
        "test",
        [helper.make_tensor_value_info(name, float32, shape) for name in inputs],
        [helper.make_tensor_value_info(name, float32, None) for name in outputs],
        [
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in dict(constants).items()
        ],
    )
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    proto = onnx.shape_inference.infer_shapes(proto)
    for output in proto.graph.output:
        if not output.type.tensor_type.HasField("shape"):  # the graph makes no sense
            output.type.tensor_type.shape.dim.add()
    return proto


F32 = np.float32
W = np.random.default_rng(3).normal(size=(4, 4)).astype(F32)
B = np.random.default_rng(4).normal(size=4).astype(F32)
KERNEL = np.random.default_rng(5).normal(size=(4, 4, 3, 3)).astype(F32)
NORM = {"s": B, "b": B + 1, "m": B - 1, "v": B**2 + 1}
BATCH_NORM = ("BatchNormalization", ["x", "s", "b", "m", "v"], ["h"], {})

# name: (nodes, shape of x, constants, kinds of the layers that come out)
GRAPHS = {
    "gemm": ([("Gemm", ["x", "W", "B"], ["y"], {})], ("N", 4), {"W": W, "B": B}, ["Linear"]),
    "gemm, scaled": (
        [("Gemm", ["x", "W", "B"], ["y"], dict(alpha=0.5, beta=2.0, transB=1))],
        ("N", 4),
        {"W": W, "B": B[:1]},
        ["Linear"],
    ),
    "matmul and add": (
        [("MatMul", ["x", "W"], ["h"], {}), ("Add", ["B", "h"], ["y"], {})],
        ("N", 3, 4),
        {"W": W, "B": B},
        ["Linear"],
    ),
    "matmul and add of one number": (
        [("MatMul", ["x", "W"], ["h"], {}), ("Add", ["h", "B"], ["y"], {})],
        ("N", 4),
        {"W": W, "B": B[0]},
        ["Linear"],
    ),
    "weights from constants": (
        [
            ("Constant", [], ["W"], dict(value=onnx.numpy_helper.from_array(W))),
            ("Identity", ["W"], ["V"], {}),
            ("Transpose", ["V"], ["U"], {}),
            ("Constant", [], ["r"], dict(value_float=0.25)),
            ("MatMul", ["x", "U"], ["h"], {}),
            ("Dropout", ["h", "r"], ["y"], {}),
        ],
        ("N", 4),
        {},
        ["Linear", "Dropout"],
    ),
    "two uses of a normalized value": (
        [
            BATCH_NORM,
            ("Relu", ["h"], ["r"], {}),
            ("Add", ["h", "r"], ["y"], {}),
        ],
        ("N", 4),
        NORM,
        ["BatchNorm", "ReLU"],
    ),
    "batch norm, add, relu": (
        [BATCH_NORM, ("Add", ["x", "h"], ["z"], {}), ("Relu", ["z"], ["y"], {})],
        ("N", 4, 5),
        NORM,
        ["BatchNorm", "ReLU"],
    ),
    "twice the input": ([("Add", ["x", "x"], ["y"], {})], ("N", 4), {}, []),
    "dense sums": (
        [
            ("Relu", ["x"], ["a"], {}),
            ("Add", ["x", "a"], ["b"], {}),
            ("Gemm", ["b", "W"], ["c"], {}),
            ("Add", ["c", "a"], ["d"], {}),
            ("Relu", ["x"], ["unused"], {}),
            ("Add", ["d", "b"], ["y"], {}),
        ],
        ("N", 4),
        {"W": W},
        ["ReLU", "Linear"],
    ),
    "identity after all": (
        [("Relu", ["x"], ["h"], {}), ("Identity", ["h"], ["y"], {})],
        ("N", 4),
        {},
        ["ReLU"],
    ),
    "clip to relu": (
        [("Clip", ["x", "zero"], ["h"], {}), ("Clip", ["h", "zero", "max"], ["y"], {})],
        ("N", 4),
        {"zero": F32(0), "max": np.finfo(F32).max},
        ["ReLU", "ReLU"],
    ),
    "global average, dropout, squeeze": (
        [
            ("GlobalAveragePool", ["x"], ["a"], {}),
            ("Dropout", ["a"], ["b"], {}),
            ("Squeeze", ["b", "axes"], ["y"], {}),
        ],
        ("N", 4, 3, 3),
        {"axes": np.array([-1, 2])},
        ["GlobalAvgPool2d", "Dropout"],
    ),
    "mean over the image": (
        [("ReduceMean", ["x", "axes"], ["y"], dict(keepdims=0))],
        ("N", 4, 3, 3),
        {"axes": np.array([2, 3])},
        ["GlobalAvgPool2d"],
    ),
    "mean over the image, reshaped": (
        [
            ("ReduceMean", ["x", "axes"], ["h"], {}),
            ("Reshape", ["h", "shape"], ["z"], {}),
            ("Gemm", ["z", "W"], ["y"], {}),
        ],
        ("N", 4, 3, 3),
        {"axes": np.array([2, 3]), "shape": np.array([-1, 4]), "W": W},
        ["GlobalAvgPool2d", "Linear"],
    ),
    "reshape of a fixed batch": (
        [("Conv", ["x", "K", "B"], ["h"], {}), ("Reshape", ["h", "shape"], ["y"], {})],
        (5, 4, 4, 4),
        {"K": KERNEL, "B": B, "shape": np.array([5, -1])},
        ["Conv2d", "Flatten"],
    ),
    "convolution without attributes": (
        [("Conv", ["x", "K"], ["y"], dict(auto_pad="VALID"))],
        ("N", 4, 5, 6),
        {"K": KERNEL},
        ["Conv2d"],
    ),
    "pools with stride 1": (
        [
            ("MaxPool", ["x"], ["h"], dict(kernel_shape=[2, 2])),
            ("AveragePool", ["h"], ["y"], dict(kernel_shape=[2, 2], pads=[1, 0, 1, 0])),
        ],
        ("N", 4, 5, 6),
        {},
        ["MaxPool2d", "AvgPool2d"],
    ),
    "sum of values in channels-last": (
        [
            ("Transpose", ["x"], ["t"], dict(perm=[0, 3, 1, 2])),
            ("BatchNormalization", ["t", "s", "b", "m", "v"], ["h"], {}),
            ("Add", ["h", "t"], ["z"], {}),
            ("LeakyRelu", ["z"], ["l"], dict(alpha=0.1)),
            ("Transpose", ["l"], ["y"], dict(perm=[0, 2, 3, 1])),
        ],
        ("N", 3, 2, 4),
        NORM,
        ["BatchNorm", "LeakyReLU"],
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs_load(case):
    nodes, shape, constants, kinds = GRAPHS[case]
    proto = make_model(nodes, shape, constants)
    onnx.checker.check_model(proto, full_check=True)
    model = bnext.onnx.load(proto)
    layers = [m for m in model.modules() if not isinstance(m, (nn.Sequential, bnext.onnx.Graph))]
    assert [type(layer).__name__ for layer in layers] == kinds
    x = batch(shape[1:])
    (y,) = run(proto, x)
    assert_near(model(x), y)
    # And out again.
    again = bnext.onnx.export(model, None, shape[1:])
    assert_near(run(again, x)[0], y)


@pytest.mark.parametrize("case", ["dense sums", "twice the input", "batch norm, add, relu"])
def test_gradients_of_graphs(case):
    nodes, shape, constants, _ = GRAPHS[case]
    constants = {name: value.astype(np.float64) for name, value in constants.items()}
    model = bnext.onnx.load(make_model(nodes, shape, constants))
    gradcheck(model, batch(shape[1:], 4, np.float64))


def test_a_graph_says_which_terms_differ():
    graph = bnext.onnx.Graph({"flat": nn.Flatten()}, [("flat", (0,)), (None, (0, 1))])
    for call in (graph, graph.forward):
        with pytest.raises(
            ValueError, match=r"^Graph: expected two terms of one shape, got \(2, 3"
        ):
            call(np.zeros((2, 3, 4), F32))


def test_batch_norm_conventions():
    """ONNX's momentum weighs the old value; float32 attributes are read as written."""
    attributes = dict(momentum=0.95, epsilon=1e-3)
    node = ("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], attributes)
    norm = bnext.onnx.load(make_model([node], constants=NORM))
    assert (norm.momentum, norm.eps) == (0.05, 1e-3)
    for ours, theirs in zip(
        (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var),
        NORM.values(),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    (node,) = bnext.onnx.export(norm, None, (4,)).graph.node
    written = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert written == {"epsilon": F32(1e-3), "momentum": F32(0.95)}


UNSUPPORTED = {
    "op": ([("Softmax", ["x"], ["y"], {})], {}, r"node 'n0' \(Softmax\): op Softmax: expected one"),
    "attribute": (
        [("MaxPool", ["x"], ["y"], dict(kernel_shape=[2, 2], ceil_mode=1))],
        {},
        r"node 'n0' \(MaxPool\): ceil_mode: expected 0, got 1",
    ),
    "dilated pool": (
        [("MaxPool", ["x"], ["y"], dict(kernel_shape=[2, 2], dilations=[2, 2]))],
        {},
        r"\(MaxPool\): dilations: expected \[1, 1\], got \[2, 2\]",
    ),
    "1-D pool": (
        [("MaxPool", ["x"], ["y"], dict(kernel_shape=[2]))],
        {},
        "kernel_shape: expected height and width, got",
    ),
    "a window padded by more than half": (
        [("MaxPool", ["x"], ["y"], dict(kernel_shape=[2, 2], pads=[2, 2, 2, 2]))],
        {},
        r"node 'n0' \(MaxPool\): MaxPool2d: padding: expected at most half",
    ),
    "pads": (
        [("Conv", ["x", "K"], ["y"], dict(pads=[0, 0, 1, 1]))],
        {"K": KERNEL},
        r"node 'n0' \(Conv\): pads: expected the same at both ends of an axis, got \(0, 0, 1, 1",
    ),
    "auto_pad": (
        [("Conv", ["x", "K"], ["y"], dict(auto_pad="SAME_UPPER"))],
        {"K": KERNEL},
        r"auto_pad: expected NOTSET or VALID, got SAME_UPPER",
    ),
    "3-D convolution": (
        [("Conv", ["x", "K"], ["y"], {})],
        {"K": KERNEL[..., None]},
        r"W: expected the four axes of a 2-D convolution, got \(4, 4, 3, 3, 1\)",
    ),
    "transA": (
        [("Gemm", ["x", "W"], ["y"], dict(transA=1))],
        {"W": W},
        r"\(Gemm\): transA: expected 0, got 1",
    ),
    "float16": (
        [("Gemm", ["x", "W"], ["y"], {})],
        {"W": W.astype(np.float16)},
        r"\(Gemm\): Linear: dtype: expected float32 or float64, got float16",
    ),
    "a weight that is computed": (
        [("Relu", ["x"], ["h"], {}), ("MatMul", ["x", "h"], ["y"], {})],
        {},
        r"\(MatMul\): B: expected an initializer or a Constant, got 'h'",
    ),
    "a constant on the left": (
        [("MatMul", ["W", "x"], ["y"], {})],
        {"W": W},
        r"\(MatMul\): B: expected an initializer or a Constant, got 'x'",
    ),
    "a constant through a layer": (
        [("Relu", ["W"], ["y"], {})],
        {"W": W},
        r"\(Relu\): input 'W': expected a result of another node; it is a constant",
    ),
    "matrices": (
        [("MatMul", ["x", "K"], ["y"], {})],
        {"K": KERNEL},
        r"\(MatMul\): B: expected a matrix, got shape \(4, 4, 3, 3\)",
    ),
    "a constant term": (
        [("Relu", ["x"], ["h"], {}), ("Add", ["h", "B"], ["y"], {})],
        {"B": B},
        r"node 'n1' \(Add\): B: expected a result, or a bias of a MatMul, got a const.* \(4,\)",
    ),
    "a bias of a full matrix": (
        [("Gemm", ["x", "W", "W"], ["y"], {})],
        {"W": W},
        r"node 'n0' \(Gemm\): C: expected shape \(4,\), got \(4, 4\)",
    ),
    "a bias of a full matrix, added": (
        [("MatMul", ["x", "W"], ["h"], {}), ("Add", ["h", "W"], ["y"], {})],
        {"W": W},
        r"node 'n1' \(Add\): B: expected a result, or a bias of a MatMul, got a .* \(4, 4\)",
    ),
    "statistics of another size": (
        [("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], {})],
        {**NORM, "v": F32([1])},
        r"node 'n0' \(BatchNormalization\): input_var: expected shape \(4,\), got \(1,\)",
    ),
    "flatten": (
        [("Flatten", ["x"], ["y"], dict(axis=2))],
        {},
        r"\(Flatten\): axis: expected 1, got 2",
    ),
    "reshape": (
        [("Reshape", ["x", "s"], ["y"], {})],
        {"s": np.array([0, 2, -1])},
        r"\(Reshape\): shape: expected \(N, features\), got \[0, 2, -1\]",
    ),
    "a reshape to other samples": (
        [("Reshape", ["x", "s"], ["y"], {})],
        {"s": np.array([-1, 8])},
        r"\(Reshape\): shape: expected \(N, 64\), got \[-1, 8\]",
    ),
    "a reshape to fewer features": (
        [("Reshape", ["x", "s"], ["y"], {})],
        {"s": np.array([0, 8])},
        r"\(Reshape\): shape: expected \(N, 64\), got \[0, 8\]",
    ),
    "a reshape of pooled channels": (
        [("GlobalAveragePool", ["x"], ["h"], {}), ("Reshape", ["h", "s"], ["y"], {})],
        {"s": np.array([-1, 1])},
        r"\(Reshape\): shape: expected \(N, 4\), got \[-1, 1\]",
    ),
    "a sum that broadcasts": (
        [
            ("MaxPool", ["x"], ["h"], dict(kernel_shape=[4, 4])),
            ("Add", ["x", "h"], ["y"], {}),
        ],
        {},
        r"\(Add\): inputs: expected two of one shape, got \('N', 4, 4, 4\) and \('N', 4, 1, 1\)",
    ),
    "padding besides auto_pad": (
        [("Conv", ["x", "K"], ["y"], dict(auto_pad="VALID", pads=[1, 1, 1, 1]))],
        {"K": KERNEL},
        r"\(Conv\): pads: expected none with auto_pad VALID, got \(1, 1, 1, 1\)",
    ),
    "squeeze": (
        [("Squeeze", ["x"], ["y"], {})],
        {},
        r"\(Squeeze\): expected height and width after a global average",
    ),
    "mean": (
        [("ReduceMean", ["x", "a"], ["y"], {})],
        {"a": np.array([1])},
        r"\(ReduceMean\): axes: expected those of height and width, got \[1\]",
    ),
    "a pooled output": (
        [("GlobalAveragePool", ["x"], ["y"], {})],
        {},
        r"output 'y': a global average with height and width of 1 has to be flattened",
    ),
    "a convolution of a pooled value": (
        [("GlobalAveragePool", ["x"], ["h"], {}), ("Conv", ["h", "K"], ["y"], {})],
        {"K": KERNEL},
        r"node 'n1' \(Conv\): input 'h': a global average",
    ),
    "a pooled value plus another": (
        [("GlobalAveragePool", ["x"], ["h"], {}), ("Add", ["h", "x"], ["y"], {})],
        {},
        r"\(Add\): inputs: expected two of one shape",
    ),
    "transpose": (
        [("Transpose", ["x"], ["y"], dict(perm=[3, 2, 1, 0]))],
        {},
        r"\(Transpose\): perm: expected \[0, 3, 1, 2\] before",
    ),
    "transpose and convolution": (
        [
            ("Transpose", ["x"], ["h"], dict(perm=[0, 3, 1, 2])),
            ("Conv", ["h", "K"], ["y"], {}),
        ],
        {"K": KERNEL},
        r"node 'n1' \(Conv\): input 'h': a Transpose can only surround",
    ),
    "a transposed output": (
        [("Transpose", ["x"], ["y"], dict(perm=[0, 3, 1, 2]))],
        {},
        r"output 'y': a Transpose can only surround",
    ),
    "sigmoid": (
        [("Sigmoid", ["x"], ["h"], {}), ("Relu", ["h"], ["y"], {})],
        {},
        r"\(Relu\): input 'h': a Sigmoid can only be multiplied with its own input",
    ),
    "product": (
        [("Relu", ["x"], ["h"], {}), ("Mul", ["h", "x"], ["y"], {})],
        {},
        r"\(Mul\): inputs: expected a value and its own Sigmoid",
    ),
    "clip": (
        [("Clip", ["x", "a", "b"], ["y"], {})],
        {"a": F32(-1), "b": F32(1)},
        r"\(Clip\): min, max: expected 0 and 6 \(relu6\) or none, got -1.0 and 1.0",
    ),
    "exact gelu": (
        [("Gelu", ["x"], ["y"], {})],
        {},
        r"\(Gelu\): approximate: expected tanh, got none",
    ),
    "a string constant": (
        [("Constant", [], ["c"], dict(value_string="a")), ("Relu", ["x"], ["y"], {})],
        {},
        r"node 'n0' \(Constant\): value_string: the attribute is not supported, got b'a'",
    ),
    "the mask of a dropout": (
        [("Dropout", ["x"], ["h", "mask"], {}), ("Identity", ["mask"], ["y"], {})],
        {},
        r"node 'n1' \(Identity\): input 'mask': expected a result of another node",
    ),
    "an old batch norm of every element": (
        [("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], dict(spatial=0))],
        NORM,
        r"\(BatchNormalization\): spatial: expected 1, got 0",
    ),
    "an output that is an initializer": (
        [("Relu", ["x"], ["h"], {}), ("Identity", ["W"], ["y"], {})],
        {"W": W},
        "output 'y': expected the result of a layer",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_graphs(case):
    nodes, constants, message = UNSUPPORTED[case]
    proto = make_model(nodes, ("N", 4, 4, 4), constants, opset=8 if "spatial" in message else 20)
    with pytest.raises((ValueError, TypeError), match=rf"^onnx\.load: .*{message}"):
        bnext.onnx.load(proto)


def test_height_and_width_need_not_be_known():
    """Shape inference gives each of them a name of its own."""
    model = make_model(
        [
            ("Conv", ["x", "K"], ["h"], dict(pads=[1, 1, 1, 1])),
            ("Add", ["h", "x"], ["y"], {}),
        ],
        ("N", 4, "H", "W"),
        {"K": KERNEL},
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(F32)
    np.testing.assert_allclose(bnext.onnx.load(model)(x), run(model, x)[0], rtol=1e-5, atol=1e-5)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        bnext.onnx.load(tmp_path / "none.onnx")
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"^onnx\.load: .*bad\.onnx: not an ONNX file"):
        bnext.onnx.load(path)
    with pytest.raises(TypeError, match=r"^onnx\.load: model: expected a path or .*, got int"):
        bnext.onnx.load(3)
    with pytest.raises(ValueError, match=r"^onnx\.load: model: "):
        bnext.onnx.load(make_model([("Relu", ["nowhere"], ["y"], {})]))
    rows = ("N", 4, 3)
    for node in (
        ("GlobalAveragePool", ["x"], ["y"], {}),
        ("ReduceMean", ["x", "a"], ["y"], dict(keepdims=0)),
    ):
        with pytest.raises(
            ValueError, match=r"X: expected shape \(N, C, H, W\), got \('N', 4, 3\)"
        ):
            bnext.onnx.load(make_model([node], rows, {"a": np.array([-1, -2])}))
    unknown = make_model(
        [("Reshape", ["x", "s"], ["y"], {})], ("N", 4, "L"), {"s": np.array([-1, 8])}
    )
    with pytest.raises(ValueError, match=r"shape: expected \(0, -1\) where features are not known"):
        bnext.onnx.load(unknown)
    for inputs, message in (
        (("x", "z"), "expected one, got 'x', 'z'"),
        ((), "expected one, got none"),
    ):
        node = ("Constant", [], ["y"], dict(value_float=1.0))
        with pytest.raises(ValueError, match=rf"^onnx\.load: inputs: {message}"):
            bnext.onnx.load(make_model([node], inputs=inputs))
    two = make_model([("Relu", ["x"], ["y"], {}), ("Relu", ["y"], ["z"], {})], outputs=("y", "z"))
    with pytest.raises(ValueError, match=r"^onnx\.load: outputs: expected one, got a second, 'z'"):
        bnext.onnx.load(two)


class Unknown(nn.BatchNorm):
    """A subclass, which may compute something else."""


@pytest.mark.parametrize(
    ("model", "shape", "options", "kind", "message"),
    [
        (
            nn.Sequential({"a": Unknown(4)}),
            (4,),
            {},
            TypeError,
            r"onnx\.export: a: expected one of",
        ),
        (nn.ReLU(), (4,), dict(opset=14), ValueError, "onnx.export: opset: expected 15 or more"),
        (nn.ReLU(), (4,), dict(opset=999), ValueError, "onnx.export: opset: expected at most"),
        (nn.ReLU(), (0,), {}, ValueError, "onnx.export: input_shape: expected 1 or more, got 0"),
        (nn.ReLU(), 4, {}, TypeError, "onnx.export: input_shape: expected the sizes of one sample"),
        (nn.ReLU(), (2.5,), {}, TypeError, "onnx.export: input_shape: expected an integer"),
        (nn.Linear(4, 2), (5,), {}, ValueError, r"Linear: x: expected shape \(\*, 4\)"),
        (nn.Conv2d(4, 2, 3), (4, 2, 2), {}, ValueError, "Conv2d: x: expected a height"),
        *(
            (layer, (4,), dict(training=True), ValueError, f"onnx.export: model: {message}")
            for layer, message in (
                (nn.BatchNorm(4, ghost_batch_size=2), "ghost_batch_size: expected None"),
                (nn.BatchNorm(4, channel_mask=[True] * 4), "channel_mask: expected None"),
                (nn.BatchRenorm(4), "expected another layer than BatchRenorm"),
                (nn.AlphaDropout(0.5), "expected another layer than AlphaDropout"),
                (nn.Dropout(1.0), "p: expected less than 1"),
            )
        ),
        (
            nn.BatchNorm(4, momentum=None),
            (4,),
            dict(training=True),
            ValueError,
            "onnx.export: model: momentum: expected a number for training=True",
        ),
    ],
)
def test_what_cannot_be_exported(model, shape, options, kind, message, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(kind, match=f"^{message}"):
        bnext.onnx.export(model, path, shape, **options)
    assert not path.exists()


def test_every_layer_has_a_row():
    from bnext.onnx import _export

    named = (getattr(nn, name) for name in nn.__all__)
    kinds = {kind for kind in named if isinstance(kind, type)} - {nn.Module, nn.Parameter}
    assert kinds <= set(_export._EXPORT)
    assert set(F.activations) <= set(_export._ACTIVATIONS)


def test_without_onnx_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (lambda: bnext.onnx.export(nn.ReLU(), None, (4,)), lambda: bnext.onnx.load("a")):
        with pytest.raises(ImportError, match=r'ONNX needs onnx: pip install "bnext\[onnx\]"'):
            call()


def test_export_changes_nothing():
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm(3), nn.Dropout(0.3))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    for training in (False, True):
        bnext.onnx.export(model, None, IMAGE, training=training)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


# -- PyTorch ---------------------------------------------------------------------------------
def torch_export(model, x, training):
    """What the exporter of PyTorch that needs no further package writes."""
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    mode = torch.onnx.TrainingMode
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the old one
        torch.onnx.export(
            model.train(training),
            (torch.from_numpy(x),),
            file,
            dynamo=False,
            training=mode.TRAINING if training else mode.EVAL,
            do_constant_folding=not training,
            input_names=["x"],
            dynamic_axes={"x": {0: "N"}},
        )
    return onnx.load_from_string(file.getvalue())


def torch_model():
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.norm = torch.nn.BatchNorm2d(4, momentum=0.2)

        def forward(self, x):
            return torch.relu(x + self.norm(self.conv(x)))

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, stride=2, groups=2),
        torch.nn.BatchNorm2d(4),
        torch.nn.LeakyReLU(0.1),
        Block(),
        torch.nn.MaxPool2d(2),
        torch.nn.AvgPool2d(2, 1, 1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.ReLU(),
        torch.nn.Linear(5, 3, bias=False),
    )


def test_a_model_of_pytorch_for_inference():
    model = torch_model()
    x = batch((2, 12, 11))
    for parameter in model.state_dict().values():
        parameter.copy_(parameter.abs() + 0.1)  # statistics and weights of no special value
    loaded = bnext.onnx.load(torch_export(model, x, training=False))
    assert_near(loaded(x), model(pytest.importorskip("torch").from_numpy(x)).detach().numpy())


def test_a_model_of_pytorch_for_training():
    model = torch_model()
    torch = pytest.importorskip("torch")
    x = batch((2, 12, 11))
    loaded = bnext.onnx.load(torch_export(model, x, training=True))
    # Names of weights are kept, so state moves between the two; tracing counted no batches.
    names = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert names <= set(loaded.state_dict())
    model.load_state_dict(
        {
            name: torch.from_numpy(np.array(array))
            for name, array in loaded.state_dict().items()
            if name in model.state_dict()
        }
    )
    assert_near(loaded.forward(x)[0], model.train()(torch.from_numpy(x)).detach().numpy())
    state = loaded.state_dict()
    for name in names:
        assert_near(state[name], model.state_dict()[name].numpy())
