"""From ONNX to a module of ours: one row of `_LOAD` an operator."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnext import nn
from bnext.conventions import from_onnx
from bnext.nn.activation import activation_layer
from bnext.nn.module import Array, Module
from bnext.onnx._common import (
    channels_first,
    channels_last,
    decimal,
    join,
    require,
)
from bnext.onnx._graph import Graph

_PLAIN = ""
_TURNED = "channels first"
"""What a Transpose made of (N, *, C); the value itself is not transposed."""
_POOLED = "1x1"
"""(N, C) that ONNX sees as (N, C, 1, 1)."""
_SIGMOID = "sigmoid"
"""The sigmoid of the value, to be multiplied with it."""


@dataclass(frozen=True)
class _Value:
    """What a name of the ONNX graph stands for: a result of ours, seen in some form."""

    source: str
    form: str = _PLAIN


@dataclass(frozen=True)
class _Activation:
    """One of `bnext.functional.activations`, before it is known whether a BatchNorm does it."""

    name: str
    slope: float = 0.01


@dataclass(frozen=True)
class _Bias:
    """What is added to the result of a MatMul."""

    value: Array


@dataclass
class _Step:
    """What gives a result: a layer, or a sum if None, of the results that `sources` names."""

    node: _Node
    name: str
    layer: Module | _Activation | _Bias | None
    sources: tuple[str, ...]


class _Node:
    """A node while it is read: attributes that nobody asked for are errors."""

    def __init__(self, reader: _Reader, proto: Any) -> None:
        get = reader.onnx.helper.get_attribute_value
        self.reader = reader
        self.op: str = proto.op_type
        self.domain: str = proto.domain
        self.name: str = proto.name
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self._attributes = {
            attribute.name: get(attribute)
            for attribute in proto.attribute
            if not attribute.ref_attr_name
        }

    def error(self, problem: str) -> ValueError:
        name = self.name or self.outputs[0]
        return ValueError(f"onnx.load: node {name!r} ({self.op}): {problem}")

    def attribute(self, name: str, default: Any) -> Any:
        value = self._attributes.pop(name, default)
        if isinstance(value, bytes):
            return value.decode()
        return decimal(value) if isinstance(value, float) else value

    def expect(self, name: str, *accepted: Any) -> None:
        """The attribute `name` is one of `accepted`, of which the first is its default."""
        value = self.attribute(name, accepted[0])
        value = list(value) if not isinstance(value, (int, float, str)) else value
        if value not in accepted:
            raise self.error(f"{name}: expected {accepted[0]}, got {value}")

    def finish(self) -> None:
        for name, value in self._attributes.items():
            raise self.error(f"{name}: the attribute is not supported, got {value}")

    def shape(self, index: int) -> tuple[int | str | None, ...] | None:
        """That of the input `index` in the ONNX graph: sizes, names of sizes, None if unknown."""
        return self.reader.shapes.get(self.inputs[index])

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] != ""

    def is_constant(self, index: int) -> bool:
        return self.inputs[index] in self.reader.constants

    def constant(self, index: int, argument: str) -> Array:
        """The input `index`, which has to be known."""
        if not self.has(index) or not self.is_constant(index):
            got = self.inputs[index] if self.has(index) else "none"
            raise self.error(f"{argument}: expected an initializer or a Constant, got {got!r}")
        constant: Array = self.reader.constants[self.inputs[index]]
        return constant

    def fill(self, array: Array, index: int, argument: str) -> None:
        """Copy the input `index` into `array`."""
        value = self.constant(index, argument)
        if value.shape != array.shape:
            raise self.error(f"{argument}: expected shape {array.shape}, got {value.shape}")
        array[...] = value

    def integers(self, index: int, name: str) -> list[int]:
        """The input `index` if there is one, else the attribute `name` (of older opsets)."""
        values = self.constant(index, name) if self.has(index) else self.attribute(name, ())
        return [int(value) for value in values]

    def value(self, index: int = 0, *forms: str) -> _Value:
        """The input `index`, which has to be computed and of one of `forms` (or plain)."""
        name = self.inputs[index]
        value = self.reader.values.get(name)
        if value is None:
            what = "a constant" if name in self.reader.constants else "not what a layer gives"
            raise self.error(f"input {name!r}: expected a result of another node; it is {what}")
        if value.form not in (_PLAIN, *forms):
            raise self.error(f"input {name!r}: {_PROBLEMS[value.form]}")
        return value


_PROBLEMS = {
    _TURNED: "a Transpose can only surround BatchNormalization and elementwise operators",
    _POOLED: "a global average with height and width of 1 has to be flattened first",
    _SIGMOID: "a Sigmoid can only be multiplied with its own input",
}


class _Reader:
    """What has been read of an ONNX graph."""

    def __init__(self, model: Any) -> None:
        self.onnx = require("onnx")
        graph = model.graph
        self.shapes = _shapes(model)
        to_array = self.onnx.numpy_helper.to_array
        self.constants = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            names = ", ".join(repr(value.name) for value in inputs)
            raise ValueError(f"onnx.load: inputs: expected one, got {names or 'none'}")
        self.x: str = inputs[0].name
        self.batch = (self.shapes.get(self.x) or (None,))[0]
        """The size of the batch, if it is fixed."""
        self.values = {self.x: _Value(self.x)}
        self.steps: dict[str, _Step] = {}
        """By the name of the result, in order."""
        self.statistics: set[str] = set()
        """The results that are new running statistics."""
        self._names: set[str] = set()

    def read(self, node: _Node) -> None:
        row = _LOAD.get(node.op) if node.domain in ("", "ai.onnx") else None
        if row is None:
            op = join(node.domain, node.op, ".")
            raise node.error(f"op {op}: expected one of {', '.join(sorted(_LOAD))}")
        try:
            row(self, node)
        except (TypeError, ValueError) as error:
            if str(error).startswith("onnx.load:"):
                raise
            raise type(error)(str(node.error(str(error)))) from error
        node.finish()

    def add(self, node: _Node, layer: Module | _Activation | _Bias, *forms: str) -> None:
        """`layer` does what `node` does, to an input that is plain or of one of `forms`."""
        self._step(node, layer, [node.value(0, *forms)])

    def sum(self, node: _Node) -> None:
        terms = [node.value(index, _TURNED, _POOLED) for index in (0, 1)]
        shapes = [node.shape(index) for index in (0, 1)]
        if terms[0].form != terms[1].form or not _same(*shapes):
            got = "" if None in shapes else f", got {shapes[0]} and {shapes[1]}"
            raise node.error(f"inputs: expected two of one shape{got}")
        self._step(node, None, terms)

    def view(self, node: _Node, form: str) -> None:
        """`node` does nothing to its first input but to show it in another form."""
        self.values[node.outputs[0]] = _Value(self.values[node.inputs[0]].source, form)

    def _step(
        self, node: _Node, layer: Module | _Activation | _Bias | None, inputs: list[_Value]
    ) -> None:
        y = node.outputs[0]
        sources = tuple(value.source for value in inputs)
        self.steps[y] = _Step(node, self._name(node), layer, sources)
        self.values[y] = _Value(y, inputs[0].form)

    def _name(self, node: _Node) -> str:
        """That of the weight before ".weight", as `state_dict` had it, or else the node's."""
        weight = node.inputs[1] if len(node.inputs) > 1 else ""
        if weight.endswith(".weight"):
            name = weight.removesuffix(".weight")
        else:
            name = node.name.removesuffix(node.op).strip("/") or node.op.lower()
        unique, count = name, 1
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        return unique

    def fuse(self, output: str) -> None:
        """Let BatchNorm do the activation after it, and Linear the addition of its bias."""
        uses = Counter(source for step in self.steps.values() for source in step.sources)
        uses[output] += 1
        for y, step in list(self.steps.items()):
            if not isinstance(step.layer, (_Activation, _Bias)):
                continue
            (source,) = step.sources
            before = self.steps.get(source)
            if before is not None and uses[source] == 1 and _joined(before.layer, step.layer):
                self.steps[y] = self.steps.pop(source)
            elif isinstance(step.layer, _Bias):
                raise step.node.error(
                    "B: expected a result, or a bias of a MatMul, "
                    f"got a constant of shape {step.layer.value.shape}"
                )
            else:
                step.layer = activation_layer(step.layer.name, step.layer.slope)

    def module(self, output: str) -> Module:
        """The steps as one module."""
        needed, used = {output}, {}
        for y, step in reversed(self.steps.items()):
            if y in needed:
                used[y] = step
                needed.update(step.sources)
        steps = dict(reversed(used.items()))
        layers = {
            step.name: step.layer for step in steps.values() if isinstance(step.layer, Module)
        }
        number = {name: index for index, name in enumerate([self.x, *steps])}
        wiring = [
            (
                None if step.layer is None else step.name,
                tuple(number[source] for source in step.sources),
            )
            for step in steps.values()
        ]
        if any(inputs != (index,) for index, (_, inputs) in enumerate(wiring)):
            return Graph(layers, wiring)
        return next(iter(layers.values())) if len(layers) == 1 else nn.Sequential(layers)


def _shapes(model: Any) -> dict[str, tuple[int | str | None, ...]]:
    """Sizes of the values of a graph: numbers, names, None if unknown."""
    graph = require("onnx.shape_inference").infer_shapes(model).graph
    return {
        value.name: tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param or None
            for size in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _same(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    """Whether two shapes may be the same: not if they are known to differ, as numbers do, but not
    names, of which shape inference invents some.
    """
    if a is None or b is None:
        return True
    sizes = zip(a, b, strict=False)
    return len(a) == len(b) and not any(
        isinstance(one, int) and isinstance(other, int) and one != other for one, other in sizes
    )


def _joined(layer: Module | _Activation | _Bias | None, after: _Activation | _Bias) -> bool:
    """Make `layer` do `after` as well; False if it cannot."""
    if isinstance(after, _Bias):
        if not isinstance(layer, nn.Linear) or layer.bias is not None:
            return False
        bias = _row(after.value, layer.out_features)
        if bias is None:
            return False
        layer.bias = nn.Parameter(bias.astype(layer.dtype), decay=False)
        return True
    if not isinstance(layer, nn.BatchNorm) or layer.activation is not None:
        return False
    layer.activation, layer.negative_slope = after.name, after.slope
    return True


def _row(value: Array, size: int) -> Array | None:
    """`value` as what is added to each row of (N, size); None if rows would differ."""
    if value.shape[:-1] not in ((), (1,)) or value.shape[-1:] not in ((), (1,), (size,)):
        return None
    row: Array = np.broadcast_to(value, (1, size))[0]
    return row


def _load_conv(reader: _Reader, node: _Node) -> None:
    weight = node.constant(1, "W")
    if weight.ndim != 4:
        raise node.error(f"W: expected the four axes of a 2-D convolution, got {weight.shape}")
    node.expect("kernel_shape", list(weight.shape[2:]))
    groups = node.attribute("group", 1)
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2:],
        **_load_window(node, weight.shape[2:]),
        dilation=tuple(node.attribute("dilations", (1, 1))),
        groups=groups,
        bias=node.has(2),
        dtype=weight.dtype,
    )
    layer.weight.data[...] = weight
    if layer.bias is not None:
        node.fill(layer.bias.data, 2, "B")
    reader.add(node, layer)


def _load_window(node: _Node, kernel: Sequence[int]) -> dict[str, Any]:
    """Stride and padding of a convolution or a pooling."""
    if len(kernel) != 2:
        raise node.error(f"kernel_shape: expected height and width, got {tuple(kernel)}")
    auto_pad = node.attribute("auto_pad", "NOTSET")
    pads = tuple(node.attribute("pads", (0, 0, 0, 0)))
    if auto_pad not in ("NOTSET", "VALID"):
        raise node.error(f"auto_pad: expected NOTSET or VALID, got {auto_pad}")
    if auto_pad == "VALID" and any(pads):
        raise node.error(f"pads: expected none with auto_pad VALID, got {pads}")
    if pads[:2] != pads[2:]:
        raise node.error(f"pads: expected the same at both ends of an axis, got {pads}")
    return {"stride": tuple(node.attribute("strides", (1, 1))), "padding": pads[:2]}


def _load_linear(reader: _Reader, node: _Node, weight: Array, bias: Array | None) -> None:
    """`weight` is (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    layer.weight.data[...] = weight
    if layer.bias is not None and bias is not None:
        row = _row(bias, layer.out_features)
        if row is None:
            raise node.error(f"C: expected shape ({layer.out_features},), got {bias.shape}")
        layer.bias.data[...] = row
    reader.add(node, layer)


def _load_gemm(reader: _Reader, node: _Node) -> None:
    node.expect("transA", 0)
    node.attribute("broadcast", 1)  # of opset 6 and before
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    weight = node.constant(1, "B") * np.asarray(alpha, node.constant(1, "B").dtype)
    if not node.attribute("transB", 0):
        weight = weight.T
    bias = node.constant(2, "C") * weight.dtype.type(beta) if node.has(2) else None
    _load_linear(reader, node, weight, bias)


def _load_matmul(reader: _Reader, node: _Node) -> None:
    weight = node.constant(1, "B")
    if weight.ndim != 2:
        raise node.error(f"B: expected a matrix, got shape {weight.shape}")
    _load_linear(reader, node, weight.T, None)


def _load_add(reader: _Reader, node: _Node) -> None:
    node.attribute("broadcast", 1)  # of opset 6 and before
    if node.is_constant(0):
        node.inputs.reverse()
    if node.is_constant(1):
        reader.add(node, _Bias(node.constant(1, "B")))
    else:
        reader.sum(node)


def _load_mul(reader: _Reader, node: _Node) -> None:
    a, b = (node.value(index, _TURNED, _POOLED, _SIGMOID) for index in (0, 1))
    if a.form == _SIGMOID:
        node.inputs.reverse()
        a, b = b, a
    if b.form != _SIGMOID or a.form == _SIGMOID or a.source != b.source:
        raise node.error("inputs: expected a value and its own Sigmoid")
    reader.add(node, _Activation("silu"), _TURNED, _POOLED)


def _load_sigmoid(reader: _Reader, node: _Node) -> None:
    node.value(0, _TURNED, _POOLED)
    reader.view(node, _SIGMOID)


def _load_batch_norm(reader: _Reader, node: _Node) -> None:
    node.expect("spatial", 1)  # of opset 8 and before, as is is_test
    for name in ("is_test", "consumed_inputs"):
        node.attribute(name, 0)
    weight = node.constant(1, "scale")
    names = ("epsilon", "momentum")
    given = {name: node.attribute(name, None) for name in names}
    options = from_onnx({name: value for name, value in given.items() if value is not None}).options
    layer = nn.BatchNorm(
        weight.size,
        options["eps"],
        options["momentum"],
        # Statistics that never move are none.
        track_running_stats=not (node.attribute("training_mode", 0) and options["momentum"] == 0),
        channel_axis=-1 if node.value(0, _TURNED, _POOLED).form == _TURNED else 1,
        dtype=weight.dtype,
    )
    assert layer.weight is not None
    assert layer.bias is not None
    node.fill(layer.weight.data, 1, "scale")
    node.fill(layer.bias.data, 2, "B")
    if layer.track_running_stats:
        node.fill(layer.running_mean, 3, "input_mean")
        node.fill(layer.running_var, 4, "input_var")
        if not (layer.running_var >= 0).all():
            raise node.error("input_var: expected no negative variance and no NaN")
    reader.statistics.update(node.outputs[1:3])
    reader.add(node, layer, _TURNED, _POOLED)


def _load_dropout(reader: _Reader, node: _Node) -> None:
    for name in ("is_test", "seed"):
        node.attribute(name, 0)
    ratio = node.attribute("ratio", 0.5)
    if node.has(1):
        ratio = decimal(node.constant(1, "ratio").item())
    reader.add(node, nn.Dropout(ratio), _TURNED, _POOLED)


def _load_pool(reader: _Reader, node: _Node) -> None:
    kernel = tuple(node.attribute("kernel_shape", ()))
    window = {"kernel_size": kernel, **_load_window(node, kernel)}
    node.expect("ceil_mode", 0)
    node.expect("dilations", [1, 1])
    node.attribute("storage_order", 0)  # of the second output, which we have not
    if node.op == "MaxPool":
        reader.add(node, nn.MaxPool2d(**window))
    else:
        include = bool(node.attribute("count_include_pad", 0))
        reader.add(node, nn.AvgPool2d(**window, count_include_pad=include))


def _load_global_average(reader: _Reader, node: _Node) -> None:
    shape = node.shape(0)
    if shape is not None and len(shape) != 4:
        raise node.error(f"X: expected shape (N, C, H, W), got {shape}")
    keepdims = 1
    if node.op == "ReduceMean":
        axes = node.integers(1, "axes")
        if sorted(axis % 4 for axis in axes) != [2, 3]:
            raise node.error(f"axes: expected those of height and width, got {axes}")
        keepdims = node.attribute("keepdims", 1)
        node.attribute("noop_with_empty_axes", 0)
    reader.add(node, nn.GlobalAvgPool2d())
    if keepdims:
        y = node.outputs[0]
        reader.values[y] = _Value(y, _POOLED)


def _load_flatten(reader: _Reader, node: _Node) -> None:
    """Flatten, and what else can make (N, features)."""
    pooled = node.value(0, _POOLED).form == _POOLED
    if node.op == "Flatten":
        node.expect("axis", 1)
    elif node.op == "Squeeze":
        if not pooled or sorted(axis % 4 for axis in node.integers(1, "axes")) != [2, 3]:
            raise node.error("expected height and width after a global average")
    else:
        node.attribute("allowzero", 0)
        shape = node.integers(1, "shape")
        if len(shape) != 2 or shape[0] not in (-1, 0, reader.batch):
            raise node.error(f"shape: expected (N, features), got {shape}")
        sizes = (node.shape(0) or (None, None))[1:]
        known = [size for size in sizes if isinstance(size, int)]
        features = math.prod(known) if len(known) == len(sizes) else None
        # With -1 first, another number of features would make another number of samples.
        if shape[0] == -1 and features is None:
            raise node.error(f"shape: expected (0, -1) where features are not known, got {shape}")
        if features is not None and shape[1] != features and (shape[0] == -1 or shape[1] != -1):
            raise node.error(f"shape: expected (N, {features}), got {shape}")
    if pooled:
        reader.view(node, _PLAIN)
    else:
        reader.add(node, nn.Flatten())


def _load_transpose(reader: _Reader, node: _Node) -> None:
    if node.is_constant(0):
        constant = node.constant(0, "data")
        axes = node.attribute("perm", tuple(reversed(range(constant.ndim))))
        reader.constants[node.outputs[0]] = constant.transpose(axes)
        return
    axes = list(node.attribute("perm", ()))
    form = node.value(0, _TURNED).form
    if axes != (channels_last if form == _TURNED else channels_first)(max(len(axes), 2)):
        raise node.error(
            f"perm: expected {channels_first(4)} before and {channels_last(4)} after a "
            f"BatchNormalization (or as many axes as x has), got {axes}"
        )
    reader.view(node, _PLAIN if form == _TURNED else _TURNED)


def _load_identity(reader: _Reader, node: _Node) -> None:
    if node.is_constant(0):
        reader.constants[node.outputs[0]] = node.constant(0, "input")
    else:
        reader.view(node, node.value(0, _TURNED, _POOLED).form)


def _load_constant(reader: _Reader, node: _Node) -> None:
    y = node.outputs[0]
    tensor = node.attribute("value", None)
    if tensor is not None:
        reader.constants[y] = reader.onnx.numpy_helper.to_array(tensor)
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        for value in (node.attribute(name, None), node.attribute(name + "s", None)):
            if value is not None:
                reader.constants[y] = np.asarray(value, dtype)


def _load_clip(reader: _Reader, node: _Node) -> None:
    low, high = (
        float(node.constant(index, name).item()) if node.has(index) else node.attribute(name, bound)
        for index, (name, bound) in enumerate((("min", -math.inf), ("max", math.inf)), 1)
    )
    if high >= np.finfo(np.float32).max:
        high = math.inf
    if (low, high) not in ((0, 6), (0, math.inf)):
        raise node.error(f"min, max: expected 0 and 6 (relu6) or none, got {low} and {high}")
    reader.add(node, _Activation("relu6" if high == 6 else "relu"), _TURNED, _POOLED)


def _load_gelu(reader: _Reader, node: _Node) -> None:
    approximate = node.attribute("approximate", "none")
    if approximate != "tanh":
        raise node.error(f"approximate: expected tanh, got {approximate}")
    reader.add(node, _Activation("gelu"), _TURNED, _POOLED)


# The one list of operators that can be read.
_LOAD: dict[str, Callable[[_Reader, _Node], None]] = {
    "Add": _load_add,
    "AveragePool": _load_pool,
    "BatchNormalization": _load_batch_norm,
    "Clip": _load_clip,
    "Constant": _load_constant,
    "Conv": _load_conv,
    "Dropout": _load_dropout,
    "Flatten": _load_flatten,
    "Gelu": _load_gelu,
    "Gemm": _load_gemm,
    "GlobalAveragePool": _load_global_average,
    "HardSwish": lambda reader, node: reader.add(node, _Activation("hardswish"), _TURNED, _POOLED),
    "Identity": _load_identity,
    "LeakyRelu": lambda reader, node: reader.add(
        node, _Activation("leaky_relu", node.attribute("alpha", 0.01)), _TURNED, _POOLED
    ),
    "MatMul": _load_matmul,
    "MaxPool": _load_pool,
    "Mul": _load_mul,
    "ReduceMean": _load_global_average,
    "Relu": lambda reader, node: reader.add(node, _Activation("relu"), _TURNED, _POOLED),
    "Reshape": _load_flatten,
    "Sigmoid": _load_sigmoid,
    "Squeeze": _load_flatten,
    "Transpose": _load_transpose,
}


def load(model: str | os.PathLike[str] | Any) -> Module:
    """Make a module of an ONNX graph.

    Parameters
    ----------
    model : path-like or onnx.ModelProto

    Returns
    -------
    Module
        The layer, if there is one only; a `Sequential`, if they follow each other; or else a
        `Graph`. Layers have the names that their weights have in the file (``"head.linear"``
        of ``"head.linear.weight"``), so that the keys of `state_dict` are those of the model
        that was exported.

    Raises
    ------
    ValueError
        If the file is no valid model, or an operator or an attribute is not supported: the
        message names the node.
    TypeError
        If `model` is something else, or weights are neither float32 nor float64.
    FileNotFoundError
    ImportError
        Without the extra ``bnext[onnx]``.

    Notes
    -----
    An activation that follows a BatchNormalization becomes the layer's own. The ONNX
    ``momentum`` m becomes 1 - m. Its running variance is taken as it is; once training goes on,
    ours collects the variance over N - 1. A node in training mode becomes a layer that keeps
    running statistics, or none if their ``momentum`` is 1, so that they never move. A Dropout's
    ``seed`` is not used: random numbers are ours.

    Examples
    --------
    >>> from bnext import nn, onnx
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.ReLU(), nn.Dropout(0.2))
    >>> onnx.load(onnx.export(model, None, (4,)))
    Sequential(
      (0): Linear(4, 3)
      (1): BatchNorm(3, eps=1e-05, momentum=0.1, activation='relu')
      (3): Dropout(p=0.2)
    )
    """
    onnx = require("onnx")
    if isinstance(model, (str, os.PathLike)):
        try:
            proto = onnx.load(os.fspath(model))
        except require("google.protobuf.message").DecodeError as error:
            raise ValueError(f"onnx.load: {os.fspath(model)}: not an ONNX file") from error
    elif isinstance(model, onnx.ModelProto):
        proto = model
    else:
        raise TypeError(
            f"onnx.load: model: expected a path or onnx.ModelProto, got {type(model).__name__}"
        )
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"onnx.load: model: {error}") from error
    reader = _Reader(proto)
    for node in proto.graph.node:
        reader.read(_Node(reader, node))
    output, *others = [value.name for value in proto.graph.output]
    for name in others:
        if name not in reader.statistics:
            raise ValueError(f"onnx.load: outputs: expected one, got a second, {name!r}")
    y = reader.values.get(output)
    if y is None:
        raise ValueError(f"onnx.load: output {output!r}: expected the result of a layer")
    if y.form != _PLAIN:
        raise ValueError(f"onnx.load: output {output!r}: {_PROBLEMS[y.form]}")
    reader.fuse(y.source)
    return reader.module(y.source)
