"""From a model of ours to ONNX: one row of `_EXPORT` a layer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bnext import _core, nn, random
from bnext.checkpoint import write_atomically
from bnext.conventions import other_momentum
from bnext.nn import _check
from bnext.nn.module import Array, Module
from bnext.onnx._common import channels_first, channels_last, join, require
from bnext.onnx._graph import Graph

# The first opset in which BatchNormalization has the types and the meaning of today.
_OLDEST_OPSET = 15


class _Writer:
    """The ONNX graph that is being written; its values are known by their names."""

    def __init__(self, dtype: np.dtype[Any], training: bool, opset: int) -> None:
        self.onnx = require("onnx")
        self.dtype = dtype
        self.training = training
        self.opset = opset
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self.statistics: dict[str, int] = {}
        """Further outputs: new running statistics by name, with the number of channels."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the values, for a batch of two."""
        self._names: Counter[str] = Counter()

    def emit(self, layer: Module, path: str, x: str) -> str:
        """Write `layer`, called `path`, with input `x`; return the name of its output."""
        y = self.row(layer, path)(self, layer, path, x)
        if y not in self.shapes:
            # The layer itself knows best, and says what is wrong with an input.
            self.shapes[y] = layer(np.zeros(self.shapes[x], self.dtype)).shape
        return y

    def row(self, layer: Module, path: str) -> Callable[..., str]:
        """What writes a layer of this type."""
        row = _EXPORT.get(type(layer))
        if row is None:
            known = ", ".join(sorted(kind.__name__ for kind in _EXPORT))
            raise TypeError(
                f"onnx.export: {path or 'model'}: expected one of {known}; "
                f"got {type(layer).__name__}, which has no row in bnext.onnx._EXPORT"
            )
        return row

    def node(
        self,
        op: str,
        path: str,
        inputs: Iterable[str],
        outputs: Iterable[str] = (),
        **attributes: Any,
    ) -> str:
        """Add a node; return the name of its first output, which is the node's own name."""
        try:
            self.onnx.defs.get_schema(op, self.opset)
        except self.onnx.defs.SchemaError:
            first = self.onnx.defs.get_schema(op).since_version
            raise ValueError(
                f"onnx.export: opset: expected {first} or more for {op}, got {self.opset}"
            ) from None
        name = join(path, op, "/")
        self._names[name] += 1
        if self._names[name] > 1:
            name += f"_{self._names[name]}"
        self.nodes.append(
            self.onnx.helper.make_node(op, list(inputs), [name, *outputs], name, **attributes)
        )
        return name

    def constant(self, path: str, name: str, value: Array) -> str:
        """An initializer; its name is the value's key in `state_dict`."""
        key = join(path, name, ".")
        self.constants[key] = value
        return key

    def number(self, path: str, name: str, value: float) -> str:
        """A constant of the data's dtype and no axes."""
        return self.constant(path, name, np.array(value, self.dtype))


def _sequential(writer: _Writer, layer: nn.Sequential, path: str, x: str) -> str:
    for name, child in layer._modules.items():
        x = writer.emit(child, join(path, name, "."), x)
    return x


def _residual(writer: _Writer, layer: nn.Residual, path: str, x: str) -> str:
    body = writer.emit(layer.body, join(path, "body", "."), x)
    shortcut = x
    if layer.shortcut is not None:
        shortcut = writer.emit(layer.shortcut, join(path, "shortcut", "."), x)
    if layer.norm is None:
        return writer.node("Add", path, [body, shortcut])
    path = join(path, "norm", ".")
    return writer.row(layer.norm, path)(writer, layer.norm, path, body, shortcut)


def _graph(writer: _Writer, layer: Graph, path: str, x: str) -> str:
    values = [x]
    for name, inputs in layer.steps:
        terms = [values[index] for index in inputs]
        if name is None:
            y = writer.node("Add", path, terms)
            writer.shapes[y] = writer.shapes[terms[0]]
        else:
            y = writer.emit(layer._modules[name], join(path, name, "."), terms[0])
        values.append(y)
    return values[-1]


def _conv2d(writer: _Writer, layer: nn.Conv2d, path: str, x: str) -> str:
    inputs = [x, writer.constant(path, "weight", layer.weight.data)]
    if layer.bias is not None:
        inputs.append(writer.constant(path, "bias", layer.bias.data))
    return writer.node(
        "Conv",
        path,
        inputs,
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=layer.padding * 2,
        dilations=layer.dilation,
        group=layer.groups,
    )


def _linear(writer: _Writer, layer: nn.Linear, path: str, x: str) -> str:
    weight = writer.constant(path, "weight", layer.weight.data)
    bias = None if layer.bias is None else writer.constant(path, "bias", layer.bias.data)
    if len(writer.shapes[x]) == 2:
        return writer.node("Gemm", path, [x, weight] + ([bias] if bias else []), transB=1)
    y = writer.node("MatMul", path, [x, writer.node("Transpose", path, [weight], perm=[1, 0])])
    return writer.node("Add", path, [y, bias]) if bias else y


def _batch_norm(
    writer: _Writer, layer: nn.BatchNorm, path: str, x: str, residual: str | None = None
) -> str:
    rank = len(writer.shapes[x])
    turned = layer.channel_axis == -1 and rank > 2
    if turned:
        x = writer.node("Transpose", path, [x], perm=channels_first(rank))

    def constant(name: str, value: Array | None, default: float) -> str:
        if value is None:
            value = np.full(layer.num_features, default, writer.dtype)
        return writer.constant(path, name, value)

    tracked = layer.track_running_stats
    # Channels that are not normalized have mean 0, variance 1, and eps is part of the variances.
    evaluation = {"eps": layer.eps, **(layer._running_statistics if tracked else {})}
    by_batch = not tracked or (writer.training and not layer.frozen_stats)
    if by_batch:
        _check_trainable(layer, path)
        evaluation["eps"] = layer.eps
    inputs = [
        x,
        constant("weight", None if layer.weight is None else layer.weight.data, 1),
        constant("bias", None if layer.bias is None else layer.bias.data, 0),
        constant("running_mean", evaluation.get("mean"), 0),
        constant("running_var", evaluation.get("var"), 1),
    ]
    attributes: dict[str, Any] = {"epsilon": evaluation["eps"]}
    if not tracked:
        attributes["momentum"] = 1.0  # they never move: what `load` knows it by
    elif layer.momentum is not None:
        attributes["momentum"] = other_momentum(layer.momentum)
    outputs: list[str] = []
    if by_batch:
        if tracked and layer.momentum is None:
            raise ValueError(
                f"onnx.export: {path or 'model'}: momentum: expected a number for training=True, "
                "got None; ONNX has no average over all batches"
            )
        attributes["training_mode"] = 1
        outputs = [join(path, f"new_running_{name}", ".") for name in ("mean", "var")]
        if tracked:
            writer.statistics |= dict.fromkeys(outputs, layer.num_features)
    y = writer.node("BatchNormalization", path, inputs, outputs, **attributes)
    if turned:
        y = writer.node("Transpose", path, [y], perm=channels_last(rank))
    if residual is not None:
        y = writer.node("Add", path, [y, residual])
    y = _ACTIVATIONS[layer.activation](writer, path, y, layer.negative_slope)
    return _dropped(writer, layer.dropout, layer.generator, path, y) if layer.dropout else y


def _check_trainable(layer: nn.BatchNorm, path: str) -> None:
    """Refuse what BatchNormalization with batch statistics cannot do."""
    for name in ("channel_mask", "ghost_batch_size"):
        if getattr(layer, name) is not None:
            raise _untrainable(path, f"{name}: expected None")
    if isinstance(layer, nn.BatchRenorm):
        raise _untrainable(path, "expected another layer than BatchRenorm")


def _untrainable(path: str, expected: str) -> ValueError:
    return ValueError(
        f"onnx.export: {path or 'model'}: {expected} for batch statistics or training=True; "
        "ONNX has no such operator"
    )


def _silu(writer: _Writer, path: str, x: str, _: float) -> str:
    return writer.node("Mul", path, [x, writer.node("Sigmoid", path, [x])])


def _relu6(writer: _Writer, path: str, x: str, _: float) -> str:
    return writer.node(
        "Clip", path, [x, writer.number(path, "min", 0), writer.number(path, "max", 6)]
    )


def _activation(writer: _Writer, layer: Any, path: str, x: str) -> str:
    return _ACTIVATIONS[layer._function](writer, path, x, layer.negative_slope)


# Of BatchNorm, or layers of their own; the slope matters to leaky_relu alone.
_ACTIVATIONS: dict[str | None, Callable[[_Writer, str, str, float], str]] = {
    None: lambda writer, path, x, slope: x,
    "relu": lambda writer, path, x, slope: writer.node("Relu", path, [x]),
    "leaky_relu": lambda writer, path, x, slope: writer.node("LeakyRelu", path, [x], alpha=slope),
    "relu6": _relu6,
    "silu": _silu,
    "gelu": lambda writer, path, x, slope: writer.node("Gelu", path, [x], approximate="tanh"),
    "hardswish": lambda writer, path, x, slope: writer.node("HardSwish", path, [x]),
}


def _dropout(writer: _Writer, layer: nn.Dropout, path: str, x: str) -> str:
    return _dropped(writer, layer.p, layer.generator, path, x)


def _dropped(
    writer: _Writer, p: float, generator: random.Generator | None, path: str, x: str
) -> str:
    """A Dropout node; it does nothing in evaluation, but says what p was."""
    if p == 1 and writer.training:
        raise ValueError(
            f"onnx.export: {path or 'model'}: p: expected less than 1 for training=True, as ONNX's "
            "Dropout has it"
        )
    if p == 1:
        return writer.node("Identity", path, [x])
    inputs = [x, writer.constant(path, "p", np.array(p, np.float32))]
    if not writer.training:
        return writer.node("Dropout", path, inputs)
    inputs.append(writer.constant(path, "training_mode", np.array(True)))
    seed = (generator or random.default_generator).state["seed"]
    # Another seed for each node: with one for all, equal shapes could get equal masks.
    seed = (seed + len(writer.nodes)) % 2**63
    return writer.node("Dropout", path, inputs, seed=seed)


def _shared_dropout(writer: _Writer, layer: nn.Dropout, path: str, x: str) -> str:
    if not writer.training:
        return writer.node("Identity", path, [x])
    # What is dropped are factors of 1, one for all that falls together.
    samples = writer.node("Shape", path, [x], end=1)
    shape = layer._mask_shape_of(writer.shapes[x])[1:]
    factors = writer.constant(path, "factors", np.array(shape, np.int64))
    ones = writer.node(
        "ConstantOfShape",
        path,
        [writer.node("Concat", path, [samples, factors], axis=0)],
        value=writer.onnx.numpy_helper.from_array(np.ones(1, writer.dtype)),
    )
    return writer.node("Mul", path, [x, _dropped(writer, layer.p, layer.generator, path, ones)])


def _only_evaluation(writer: _Writer, layer: nn.Dropout, path: str, x: str) -> str:
    if writer.training and layer.p:
        raise _untrainable(path, f"expected another layer than {type(layer).__name__}")
    return writer.node("Identity", path, [x])


def _max_pool(writer: _Writer, layer: nn.MaxPool2d, path: str, x: str) -> str:
    return writer.node("MaxPool", path, [x], **_window(layer))


def _avg_pool(writer: _Writer, layer: nn.AvgPool2d, path: str, x: str) -> str:
    include = int(layer.count_include_pad)
    return writer.node("AveragePool", path, [x], **_window(layer), count_include_pad=include)


def _window(layer: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": layer.padding * 2,
    }


def _global_avg_pool(writer: _Writer, layer: nn.GlobalAvgPool2d, path: str, x: str) -> str:
    return writer.node("Flatten", path, [writer.node("GlobalAveragePool", path, [x])], axis=1)


def _flatten(writer: _Writer, layer: nn.Flatten, path: str, x: str) -> str:
    shape = writer.shapes[x]
    rank = len(shape)
    start, end = (axis % rank for axis in (layer.start_dim, layer.end_dim))
    if (start, end) == (1, rank - 1):
        return writer.node("Flatten", path, [x], axis=1)
    # 0 keeps an axis; those after the joined ones have moved.
    target = np.array([0] * start + [-1, *shape[end + 1 :]], np.int64)
    return writer.node("Reshape", path, [x, writer.constant(path, "shape", target)])


# The one list of what can be exported. By exact type: a subclass may compute something else.
# A row writes its layer's nodes and returns the name of the output.
_EXPORT: dict[type[Module], Callable[[_Writer, Any, str, str], str]] = {
    nn.Sequential: _sequential,
    nn.Residual: _residual,
    Graph: _graph,
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.BatchNorm: _batch_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.BatchRenorm: _batch_norm,
    nn.Dropout: _dropout,
    nn.Dropout1d: _shared_dropout,
    nn.Dropout2d: _shared_dropout,
    nn.Dropout3d: _shared_dropout,
    nn.DropPath: _shared_dropout,
    nn.AlphaDropout: _only_evaluation,
    nn.FeatureAlphaDropout: _only_evaluation,
    nn.DropBlock2d: _only_evaluation,
    nn.GaussianDropout: _only_evaluation,
    nn.ReLU: _activation,
    nn.LeakyReLU: _activation,
    nn.ReLU6: _activation,
    nn.Hardswish: _activation,
    nn.SiLU: _activation,
    nn.GELU: _activation,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.GlobalAvgPool2d: _global_avg_pool,
    nn.Flatten: _flatten,
    nn.InputStatistics: lambda writer, layer, path, x: x,
}


def export(
    model: Module,
    path: str | os.PathLike[str] | None,
    input_shape: tuple[int, ...],
    *,
    training: bool = False,
    opset: int = 20,
) -> Any:
    """Write `model` as an ONNX graph of standard operators.

    Parameters
    ----------
    model : Module
        Made of the layers of `bnext.nn`; every model of `bnext.models` is.
    path : path-like or None
        The file to write, atomically; None writes none.
    input_shape : tuple of int
        Of one sample: (C, H, W), (features,). The batch is a dimension of any size, "N".
    training : bool, default False
        Whether BatchNormalization uses the statistics of the batch (``training_mode=1``) and
        Dropout drops; the new running statistics are further outputs then, after the model's.
        By default the graph computes what ``model(x)`` does.
    opset : int, default 20
        15 or more, and no more than the installed onnx knows.

    Returns
    -------
    onnx.ModelProto
        With input "x" and output "y". It has passed ``onnx.checker.check_model`` with
        ``full_check=True``. Weights and statistics have the names of `state_dict`.

    Raises
    ------
    TypeError
        If a layer has no ONNX form.
    ValueError
        If a value has none, or `input_shape` does not fit the model.
    ImportError
        Without the extra ``bnext[onnx]``.

    Notes
    -----
    ONNX's ``momentum`` weighs the old running value: it is 1 less ours. Its running variance
    collects the variance over N (population), ours over N - 1. It has no average over all
    batches: ``momentum=None`` cannot be exported for training. Its random numbers are the
    runtime's own, so masks of `Dropout` differ from ours.

    Examples
    --------
    >>> from bnext import nn, onnx
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3, activation="relu"))
    >>> proto = onnx.export(model, None, (4,))
    >>> [node.op_type for node in proto.graph.node]
    ['Gemm', 'BatchNormalization', 'Relu']
    """
    onnx = require("onnx")
    _check.model("onnx.export", model)
    newest = onnx.defs.onnx_opset_version()
    opset = _check.integer("onnx.export", "opset", opset, _OLDEST_OPSET)
    if opset > newest:
        raise ValueError(
            f"onnx.export: opset: expected at most {newest}, which is the newest that "
            f"onnx {onnx.__version__} knows, got {opset}"
        )
    if not isinstance(input_shape, (tuple, list)):
        raise TypeError(
            f"onnx.export: input_shape: expected the sizes of one sample, got {input_shape!r}"
        )
    sizes = tuple(_check.integer("onnx.export", "input_shape", size, 1) for size in input_shape)
    dtypes = [a.dtype for a in model.state_dict().values() if np.issubdtype(a.dtype, np.floating)]
    # Some statistics are wider than the data.
    dtype = min(dtypes, key=lambda d: d.itemsize, default=np.dtype(np.float32))

    writer = _Writer(dtype, bool(training), opset)
    writer.shapes["x"] = (2, *sizes)
    y = writer.emit(model, "", "x")
    if y == "x":
        y = writer.node("Identity", "", ["x"])
        writer.shapes[y] = writer.shapes["x"]
    shape = writer.shapes[y]
    for node in writer.nodes:
        for names in (node.input, node.output):
            names[:] = ["y" if name == y else name for name in names]

    helper, element = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(dtype)
    outputs = [helper.make_tensor_value_info("y", element, ["N", *shape[1:]])]
    outputs += [
        helper.make_tensor_value_info(name, element, [channels])
        for name, channels in writer.statistics.items()
    ]
    graph = helper.make_graph(
        writer.nodes,
        type(model).__name__,
        [helper.make_tensor_value_info("x", element, ["N", *sizes])],
        outputs,
        [onnx.numpy_helper.from_array(value, name) for name, value in writer.constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(
        graph,
        producer_name="bnext",
        producer_version=_core.__version__,
        opset_imports=opsets,
        # Not the newest, which older runtimes refuse.
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    onnx.checker.check_model(proto, full_check=True)
    if path is not None:
        write_atomically(path, proto.SerializeToString())
    return proto
