"""ONNX's own test data, which the package onnx brings, through our functions and `load`."""

import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import bnext
import bnext.onnx
from bnext import functional as F
from bnext import nn

onnx = pytest.importorskip("onnx", reason='pip install "bnext[onnx]"')
from onnx.backend.test.case import node as onnx_cases  # noqa: E402

# Of the data itself, as the package states it; it was computed in float32.
RTOL, ATOL = 1e-3, 1e-7


def node_cases(op):
    """The test cases of one operator, by name: (node, inputs by argument, outputs)."""
    for module in pkgutil.iter_modules(onnx_cases.__path__):
        if module.name in ("batch_normalization", "batchnorm", "dropout"):
            importlib.import_module(f"{onnx_cases.__name__}.{module.name}")
    cases = {}
    for case in onnx_cases._NodeTestCases:
        (node,) = case.model.graph.node
        if node.op_type == op:
            ((inputs, outputs),) = case.data_sets
            cases[case.name] = (case.model, node, inputs, outputs)
    return cases


BATCH_NORM, DROPOUT = node_cases("BatchNormalization"), node_cases("Dropout")
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def test_the_data_is_there():
    assert len(BATCH_NORM) >= 4
    assert sum("training" in name for name in BATCH_NORM) >= 2
    assert len(DROPOUT) >= 12
    assert sum("training" in name for name in DROPOUT) >= 6


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL)


def frozen(model, inputs):
    """The model with all inputs but x as initializers, which is what files look like."""
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    for value, array in list(zip(model.graph.input, inputs, strict=True))[1:]:
        frozen.graph.input.remove(value)
        frozen.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), value.name))
    return frozen


@dtypes
@pytest.mark.parametrize("case", BATCH_NORM)
def test_batch_norm_functions(case, dtype):
    _, node, inputs, outputs = BATCH_NORM[case]
    x, weight, bias, mean, var = (array.astype(dtype) for array in inputs)
    options = attributes(node)
    eps = options.get("epsilon", 1e-5)
    if not options.get("training_mode", 0):
        (y,) = outputs
        assert_close(F.batch_norm_inference(x, mean, var, weight, bias, eps=eps), y)
        return
    y, new_mean, new_var = outputs
    ours, saved = F.batch_norm_forward(x, weight, bias, eps=eps)
    old = options.get("momentum", 0.9)
    assert_close(ours, y)
    assert_close(old * mean + (1 - old) * saved.mean, new_mean)
    assert_close(old * var + (1 - old) * saved.var, new_var)


@pytest.mark.parametrize("case", BATCH_NORM)
def test_batch_norm_layers(case):
    model, node, inputs, outputs = BATCH_NORM[case]
    layer = bnext.onnx.load(frozen(model, inputs))
    assert isinstance(layer, nn.BatchNorm)
    x, var = inputs[0], inputs[4]
    if not attributes(node).get("training_mode", 0):
        assert_close(layer(x), outputs[0])
        return
    y, new_mean, new_var = outputs
    assert_close(layer.forward(x)[0], y)
    assert_close(layer.running_mean, new_mean)
    # They collect the variance over the n values of a channel, we over n - 1.
    n = x.size // x.shape[1]
    old = 1 - layer.momentum
    assert_close((layer.running_var - old * var) * (n - 1) / n + old * var, new_var)


@dtypes
@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_functions(case, dtype):
    """Where random numbers are drawn, their mask is NumPy's and ours is Philox's.

    So masks differ; what both have to do with a mask is compared. Elsewhere, all is.
    """
    _, node, inputs, outputs = DROPOUT[case]
    x, *rest = inputs
    x = x.astype(dtype)
    p = float(rest[0]) if rest else attributes(node).get("ratio", 0.5)
    training = len(rest) > 1 and bool(rest[1])
    y = outputs[0]
    if not training:
        layer = nn.Dropout(p).eval()
        for ours in (layer(x), layer.forward(x)[0]):
            np.testing.assert_array_equal(ours, y.astype(dtype))
        ones = np.ones(x.shape, bool)
    else:
        ours, saved = F.dropout_forward(x, p, generator=bnext.Generator(0))
        ones = F.dropout_backward(np.ones_like(x), saved) != 0  # our mask
        theirs = outputs[1] if len(outputs) > 1 else y != 0
        scale = 1 / (1 - p)
        # The same meaning of a mask, on both sides ...
        np.testing.assert_allclose(ours, np.where(ones, x * scale, 0), rtol=1e-6)
        np.testing.assert_allclose(y, np.where(theirs, x * scale, 0), rtol=1e-6)
        # ... so the same values where both keep, and as many zeros, within five deviations.
        both = ones & theirs
        assert both.any()
        np.testing.assert_allclose(ours[both], y[both], rtol=1e-6)
        spread = np.sqrt(x.size * p * (1 - p))
        for mask in (ones, theirs):
            assert abs(mask.sum() - x.size * (1 - p)) <= 5 * spread
        if p == 0:
            np.testing.assert_array_equal(ours, y.astype(dtype))
    if len(outputs) > 1 and (not training or p == 0):
        np.testing.assert_array_equal(ones, outputs[1])


@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_layers(case):
    model, node, inputs, outputs = DROPOUT[case]
    layer = bnext.onnx.load(only_first_output(frozen(model, inputs)))
    assert isinstance(layer, nn.Dropout)
    p = float(inputs[1]) if len(inputs) > 1 else attributes(node).get("ratio", 0.5)
    assert np.float32(layer.p) == np.float32(p)
    if "training" not in case or p == 0:
        np.testing.assert_array_equal(layer(inputs[0]), outputs[0])


def only_first_output(model):
    del model.graph.output[1:]
    return model


CONVERTED = Path(onnx.__file__).parent / "backend/test/data/pytorch-converted"
# What PyTorch's layers were exported as, long ago: opset 6.
LAYERS = {
    "test_AvgPool2d": nn.AvgPool2d,
    "test_AvgPool2d_stride": nn.AvgPool2d,
    "test_BatchNorm1d_3d_input_eval": nn.BatchNorm,
    "test_BatchNorm2d_eval": nn.BatchNorm,
    "test_BatchNorm2d_momentum_eval": nn.BatchNorm,
    "test_BatchNorm3d_eval": nn.BatchNorm,
    "test_BatchNorm3d_momentum_eval": nn.BatchNorm,
    "test_Conv2d": nn.Conv2d,
    "test_Conv2d_depthwise": nn.Conv2d,
    "test_Conv2d_depthwise_padded": nn.Conv2d,
    "test_Conv2d_depthwise_strided": nn.Conv2d,
    "test_Conv2d_depthwise_with_multiplier": nn.Conv2d,
    "test_Conv2d_dilated": nn.Conv2d,
    "test_Conv2d_groups": nn.Conv2d,
    "test_Conv2d_groups_thnn": nn.Conv2d,
    "test_Conv2d_no_bias": nn.Conv2d,
    "test_Conv2d_padding": nn.Conv2d,
    "test_Conv2d_strided": nn.Conv2d,
    "test_LeakyReLU": nn.LeakyReLU,
    "test_LeakyReLU_with_negval": nn.LeakyReLU,
    "test_Linear": nn.Linear,
    "test_Linear_no_bias": nn.Linear,
    "test_MaxPool2d": nn.MaxPool2d,
    "test_ReLU": nn.ReLU,
}


def read(path):
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.filterwarnings("ignore:BatchNorm. momentum")  # the data has 0.1 for the old value
def test_layers_of_pytorch(case):
    layer = bnext.onnx.load(CONVERTED / case / "model.onnx")
    assert isinstance(layer, LAYERS[case])
    data = CONVERTED / case / "test_data_set_0"
    x, y = read(data / "input_0.pb"), read(data / "output_0.pb")
    np.testing.assert_allclose(layer(x), y, rtol=1e-4, atol=1e-5)


OTHERS = sorted({path.parent.name for path in CONVERTED.glob("*/model.onnx")} - set(LAYERS))


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_says_why_not(case):
    with pytest.raises(ValueError, match=r"^onnx\.load: (node|output) '"):
        bnext.onnx.load(CONVERTED / case / "model.onnx")
