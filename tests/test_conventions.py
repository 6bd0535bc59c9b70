"""Other frameworks' batch normalization, converted: the same evaluation, the same next step."""

import types

import numpy as np
import pytest

from bnext import conventions, nn
from cases import data

X = data((6, 3, 4, 4))
ARRAYS = [np.array(values, np.float32) for values in ([1, 2, 3], [0, 1, 0], [3, -1, 2], [2, 1, 4])]


def keras(x, gamma, beta, mean, var, epsilon):
    """y and moving statistics after a step, of Keras's formulas; channels last."""
    batch_mean, batch_var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    y = gamma * (x - mean) / np.sqrt(var + epsilon) + beta
    return y, mean * 0.9 + batch_mean * 0.1, var * 0.9 + batch_var * 0.1


def test_keras():
    x = np.ascontiguousarray(np.moveaxis(X, 1, -1))
    config = {"name": "bn", "momentum": 0.9, "epsilon": 0.01, "axis": [-1]}
    options, state = conventions.from_keras(config, ARRAYS)
    assert options == {
        "num_features": 3,
        "eps": 0.01,
        "momentum": 0.1,
        "affine": True,
        "channel_axis": -1,
        "dtype": np.float32,
    }
    norm = nn.BatchNorm(**options)
    norm.load_state_dict(state)
    y, mean, var = keras(x.astype(float), *ARRAYS, 0.01)
    np.testing.assert_allclose(norm(x), y, rtol=1e-5, atol=1e-5)
    norm.forward(x)
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    # Another estimator: ours is unbiased.
    extra = 0.1 * x.var((0, 1, 2)) / (6 * 16 - 1)
    np.testing.assert_allclose(norm.running_var, var + extra, rtol=1e-5)


def test_the_estimator_is_converted_if_the_count_is_known():
    _, state = conventions.from_keras({}, ARRAYS, count=96)
    np.testing.assert_allclose(state["running_var"], ARRAYS[3] * 96 / 95)
    _, state = conventions.from_onnx({}, ARRAYS)
    np.testing.assert_array_equal(state["running_var"], ARRAYS[3])


@pytest.mark.parametrize("momentum", [0.99, 0.999, 0.9, 0.1, 0, 1, 0.3])
def test_momentum_is_the_other_weight_to_the_digit(momentum):
    expected = {0.99: 0.01, 0.999: 0.001, 0.9: 0.1, 0.1: 0.9, 0: 1.0, 1: 0.0, 0.3: 0.7}[momentum]
    assert conventions.from_keras({"momentum": momentum}).options["momentum"] == expected
    assert conventions.from_onnx({"momentum": momentum}).options["momentum"] == expected


def test_defaults_are_theirs():
    assert conventions.from_keras({}).options == {
        "eps": 1e-3,
        "momentum": 0.01,
        "affine": True,
        "channel_axis": -1,
    }
    assert conventions.from_onnx({}).options == {
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "channel_axis": 1,
    }
    assert conventions.from_keras({}).build(num_features=3).num_features == 3


@pytest.mark.parametrize(("scale", "center"), [(True, False), (False, True), (False, False)])
def test_keras_without_gamma_or_beta(scale, center):
    weights = ARRAYS[:1] * scale + ARRAYS[1:2] * center + ARRAYS[2:]
    norm = conventions.from_keras({"scale": scale, "center": center, "axis": 1}, weights).build()
    gamma = ARRAYS[0] if scale else np.ones(3)
    beta = ARRAYS[1] if center else np.zeros(3)
    x = np.moveaxis(X, 1, -1).astype(float)
    expected = np.moveaxis(keras(x, gamma, beta, *ARRAYS[2:], 1e-3)[0], -1, 1)
    np.testing.assert_allclose(norm(X), expected, rtol=1e-5, atol=1e-5)
    assert norm.affine == (scale or center)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
def test_torch(options):
    torch = pytest.importorskip("torch", reason="the layer that is converted is PyTorch's")
    torch.manual_seed(0)
    theirs = torch.nn.BatchNorm2d(3, **options).double()
    theirs(torch.from_numpy(X.astype(float)))
    if theirs.affine:
        torch.nn.init.normal_(theirs.weight)
    ours = conventions.from_torch(theirs).build()
    x = data((5, 3, 4, 4), dtype=np.float64, seed=3)
    for _ in range(2):
        expected = theirs(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(ours.forward(x)[0], expected, rtol=1e-10, atol=1e-10)
    expected = theirs.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours(x), expected, rtol=1e-10, atol=1e-10)
    assert ours.running_mean.dtype == np.float64 if ours.track_running_stats else True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_in_half_precision(dtype):
    torch = pytest.importorskip("torch", reason="the layer that is converted is PyTorch's")
    theirs = torch.nn.BatchNorm1d(3).to(getattr(torch, dtype))
    torch.nn.init.normal_(theirs.weight)
    ours = conventions.from_torch(theirs).build()
    assert ours.weight.data.dtype == ours.running_var.dtype == np.float32
    np.testing.assert_array_equal(ours.weight.data, theirs.weight.detach().float().numpy())


def test_onnx():
    onnx = pytest.importorskip("onnx", reason="the reference is ONNX's")
    from onnx.reference import ReferenceEvaluator

    def run(training, outputs):
        names = ["X", "scale", "B", "input_mean", "input_var"]
        node = onnx.helper.make_node(
            "BatchNormalization", names, outputs, epsilon=0.01, momentum=0.8, training_mode=training
        )
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [node],
            "bn",
            [value(name, onnx.TensorProto.FLOAT, None) for name in names],
            [value(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)])
        return ReferenceEvaluator(model).run(None, dict(zip(names, [X, *ARRAYS], strict=True)))

    norm = conventions.from_onnx({"epsilon": 0.01, "momentum": 0.8}, ARRAYS).build()
    np.testing.assert_allclose(norm(X), run(0, ["Y"])[0], rtol=1e-5, atol=1e-5)
    y, mean, var = run(1, ["Y", "running_mean", "running_var"])
    np.testing.assert_allclose(norm.forward(X)[0], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        norm.running_var, var + 0.2 * X.var((0, 2, 3)) / (6 * 16 - 1), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(dtype):
    layer = conventions.from_onnx({}, [array.astype(dtype) for array in ARRAYS]).build()
    expected = np.float64 if dtype == np.float64 else np.float32
    assert layer.running_var.dtype == layer.weight.data.dtype == expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conventions.from_keras({"axis": 3}), ValueError, "axis: expected 1 or -1, got 3"),
        (lambda: conventions.from_keras({"axis": [1, 2]}), ValueError, "axis: expected 1 or -1"),
        (
            lambda: conventions.from_keras({"momentum": 1.5}),
            ValueError,
            r"from_keras: momentum: expected a number in \[0, 1\], got 1.5",
        ),
        (lambda: conventions.from_keras({"epsilon": "x"}), TypeError, "epsilon: expected a number"),
        (
            lambda: conventions.from_keras({"scale": False}, ARRAYS),
            ValueError,
            "from_keras: weights: expected 3 arrays .* for bias, running_mean, running_var, got 4",
        ),
        (lambda: conventions.from_onnx({}, ARRAYS[:3]), ValueError, "expected 4 arrays"),
        (
            lambda: conventions.from_onnx({}, [*ARRAYS[:3], ARRAYS[3][:2]]),
            ValueError,
            "of one shape",
        ),
        (
            lambda: conventions.from_onnx({}, [*ARRAYS[:3], -ARRAYS[3]]),
            ValueError,
            "running_var: expected no negative variance",
        ),
        (lambda: conventions.from_onnx({}, ARRAYS, count=1), ValueError, "count: expected 2 or"),
        (lambda: conventions.from_onnx({}, ARRAYS, count=2.5), TypeError, "count: expected an int"),
        (lambda: conventions.from_keras(3), TypeError, "from_keras: config: expected a mapping"),
        (lambda: conventions.from_onnx(None), TypeError, "from_onnx: attributes: expected a map"),
        (lambda: conventions.from_keras({}, 3), TypeError, "weights: expected a sequence of arr"),
        (
            lambda: conventions.from_onnx({}, [a.astype(complex) for a in ARRAYS]),
            TypeError,
            "from_onnx: inputs: weight: expected real numbers, got complex128",
        ),
        *(
            (lambda eps=eps: conventions.from_keras({"epsilon": eps}), ValueError, "epsilon: expec")
            for eps in (-1, np.nan, np.inf)
        ),
        (lambda: conventions.from_onnx({"spatial": 0}), ValueError, "spatial: expected 1, got 0"),
        (
            lambda: conventions.from_torch(types.SimpleNamespace(eps=1)),
            TypeError,
            "from_torch: module: expected a torch.nn.BatchNorm, got SimpleNamespace without num_fe",
        ),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_normalization_of_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    instance = torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    with pytest.raises(TypeError, match=r"expected a torch.nn.BatchNorm, got InstanceNorm2d"):
        conventions.from_torch(instance)
    lazy = torch.nn.LazyBatchNorm2d()
    with pytest.raises(ValueError, match="got none: run the LazyBatchNorm2d once"):
        conventions.from_torch(lazy)
    lazy(torch.ones(2, 3, 4, 4))
    assert conventions.from_torch(lazy).options["num_features"] == 3
