"""The models of ``bnext train``: `mlp`, `cnn` and `resnet`, with a choice of normalization."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnext import nn, random
from bnext.nn.module import Module, number

__all__ = ["DROPOUT_POSITIONS", "NORMS", "NORM_POSITIONS", "build", "names", "parse"]

NORMS = ("batch", "none")
NORM_POSITIONS = ("before", "after")
DROPOUT_POSITIONS = ("head", "after-activation", "before-norm")

Layers = dict[str, Module]


@dataclass(frozen=True)
class _Parts:
    """The pieces that models are made of, each as the options want it."""

    norm: str
    norm_position: str
    dropout: float
    dropout_position: str
    dtype: npt.DTypeLike

    @property
    def bias(self) -> bool:
        """Whether hidden layers have one; normalization right after it would cancel it."""
        return self.norm == "none" or self.norm_position == "after"

    def conv(self, inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
        """A convolution that keeps height and width."""
        layer = nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, bias=self.bias, dtype=self.dtype
        )
        _initialize(layer)
        return layer

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        """A hidden linear layer."""
        layer = nn.Linear(inputs, outputs, self.bias, dtype=self.dtype)
        _initialize(layer)
        return layer

    def unit(self, channels: int) -> Layers:
        """ReLU, with the normalization before or after it, and dropout where it belongs."""
        if self.norm == "none":
            layers: Layers = {"relu": nn.ReLU()}
        elif self.norm_position == "before":
            layers = {"norm": nn.BatchNorm(channels, activation="relu", dtype=self.dtype)}
        else:
            layers = {"relu": nn.ReLU(), "norm": nn.BatchNorm(channels, dtype=self.dtype)}
        if self.dropout and self.dropout_position != "head":
            named = list(layers.items())
            # If there is no layer of its own for the activation, it is the first one's.
            place = list(layers).index("norm") if self.dropout_position == "before-norm" else 1
            named.insert(place, ("dropout", nn.Dropout(self.dropout)))
            layers = dict(named)
        return layers

    def head(self, features: int, num_classes: int) -> Layers:
        """The last linear layer."""
        layers: Layers = {}
        if self.dropout and self.dropout_position == "head":
            layers["dropout"] = nn.Dropout(self.dropout)
        layers["linear"] = nn.Linear(features, num_classes, dtype=self.dtype)
        return layers


def _initialize(layer: nn.Conv2d | nn.Linear) -> None:
    """He et al. (2015): the signal keeps its variance through a layer and the ReLU after it."""
    weight = layer.weight.data
    weight[...] = random.initial_rng().normal(0, math.sqrt(2 / weight[0].size), weight.shape)
    if layer.bias is not None:
        layer.bias.data[...] = 0


def _numbered(index: int, layers: Layers) -> Layers:
    return {f"{name}{index}": layer for name, layer in layers.items()}


def _mlp(
    parts: _Parts, input_shape: tuple[int, ...], num_classes: int, depth: int, width: int
) -> Module:
    layers: Layers = {"flatten": nn.Flatten()}
    features = math.prod(input_shape)
    for index in range(1, depth + 1):
        layers |= _numbered(index, {"linear": parts.linear(features, width), **parts.unit(width)})
        features = width
    return nn.Sequential(layers | {"head": nn.Sequential(parts.head(features, num_classes))})


def _cnn(
    parts: _Parts, input_shape: tuple[int, ...], num_classes: int, depth: int, width: int
) -> Module:
    channels = _channels("cnn", input_shape, depth)
    layers: Layers = {}
    for index in range(1, depth + 1):
        for half in "ab":
            stage = {"conv": parts.conv(channels, width, 3), **parts.unit(width)}
            layers |= {f"{name}{index}{half}": layer for name, layer in stage.items()}
            channels = width
        layers[f"pool{index}"] = nn.MaxPool2d(2)
        width *= 2
    layers["mean"] = nn.GlobalAvgPool2d()
    return nn.Sequential(layers | {"head": nn.Sequential(parts.head(channels, num_classes))})


def _resnet(
    parts: _Parts, input_shape: tuple[int, ...], num_classes: int, depth: int, width: int
) -> Module:
    layers: Layers = {"stem": parts.conv(_channels("resnet", input_shape, 2), width, 3)}
    channels = width
    for stage in range(1, 4):
        if stage > 1:
            layers[f"pool{stage - 1}"] = nn.MaxPool2d(2)
            width *= 2
        for block in range(1, depth + 1):
            layers[f"stage{stage}_block{block}"] = _block(parts, channels, width)
            channels = width
    layers |= {"last": nn.Sequential(parts.unit(channels)), "mean": nn.GlobalAvgPool2d()}
    return nn.Sequential(layers | {"head": nn.Sequential(parts.head(channels, num_classes))})


def _block(parts: _Parts, inputs: int, outputs: int) -> Module:
    """He et al. (2016): normalization and ReLU come before each convolution."""
    body = _numbered(1, {**parts.unit(inputs), "conv": parts.conv(inputs, outputs, 3)})
    last = parts.conv(outputs, outputs, 3)
    # Blocks begin as the identity: without normalization, deep models diverge otherwise.
    last.weight.data[...] = 0
    body |= _numbered(2, {**parts.unit(outputs), "conv": last})
    shortcut = None if inputs == outputs else parts.conv(inputs, outputs, 1)
    return nn.Residual(nn.Sequential(body), shortcut)


def _channels(name: str, input_shape: tuple[int, ...], poolings: int) -> int:
    """Channels of an input that is an image large enough for so many halvings."""
    if len(input_shape) != 3:
        raise ValueError(
            f"models.build: input_shape: {name} expects images (C, H, W), got {input_shape}; "
            "mlp takes any shape"
        )
    least = 2**poolings
    if min(input_shape[1:]) < least:
        raise ValueError(
            f"models.build: input_shape: {name} with {poolings} poolings expects images of "
            f"{least}x{least} or more, got {input_shape}"
        )
    return input_shape[0]


# Builder, default depth, default width.
_MODELS: dict[str, tuple[Callable[..., Module], int, int]] = {
    "mlp": (_mlp, 2, 256),
    "cnn": (_cnn, 2, 32),
    "resnet": (_resnet, 1, 32),
}


def names() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(_MODELS)


# Options of `build` that a spec may give, and what they are read as.
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "norm": str,
    "norm_position": str,
    "dropout": float,
    "dropout_position": str,
    "depth": int,
    "width": int,
}


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options, for `build`, of a model that is written in one word.

    Raises
    ------
    ValueError
        For an unknown name or option, or a value of another kind.

    Examples
    --------
    >>> parse("mlp:norm=none,dropout=0.3")
    ('mlp', {'norm': 'none', 'dropout': 0.3})
    """
    name, _, text = spec.partition(":")
    if name not in names():
        raise ValueError(f"model {spec!r}: expected one of {', '.join(names())}, got {name!r}")
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if key not in _OPTIONS or not equals:
            near = difflib.get_close_matches(key, _OPTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"model {spec!r}: expected OPTION=VALUE with one of {', '.join(_OPTIONS)}, "
                f"got {item!r}{hint}"
            )
        try:
            options[key] = _OPTIONS[key](value.strip())
        except ValueError:
            kind = "a whole number" if _OPTIONS[key] is int else "a number"
            raise ValueError(f"model {spec!r}: {key}: expected {kind}, got {value!r}") from None
    return name, options


def build(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    norm: str = "batch",
    norm_position: str = "before",
    dropout: float = 0.0,
    dropout_position: str = "head",
    depth: int | None = None,
    width: int | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> Module:
    """A classifier with weights drawn from `bnext.random.initial_rng`.

    Parameters
    ----------
    name : {"mlp", "cnn", "resnet"}
        - ``mlp``: `depth` (2) hidden layers of `width` (256).
        - ``cnn``: `depth` (2) stages of two 3x3 convolutions and a max-pooling, the first
          `width` (32) channels wide, each following one twice as wide.
        - ``resnet``: a 3x3 convolution and three stages of `depth` (1) residual blocks with two
          3x3 convolutions each, `width` (32) channels wide, then twice and four times that at a
          half and a quarter of the resolution. Normalization and activation precede each
          convolution (He et al., arXiv:1603.05027); the blocks begin as the identity.
    input_shape : (C, H, W), or (features,) for ``mlp``
        Of one sample.
    num_classes : int
    norm : {"batch", "none"}
        `BatchNorm`, or nothing.
    norm_position : {"before", "after"}
        Whether it comes before or after the activation.
    dropout : float, default 0
        Probability in [0, 1); 0 leaves dropout out.
    dropout_position : {"head", "after-activation", "before-norm"}
        Before the last linear layer; directly after each activation (and its normalization, if
        the two are one layer); or directly before each normalization.
    depth, width : int, optional
        Defaults in brackets above.
    dtype : float32 or float64

    Returns
    -------
    Module
        Maps (N, *input_shape) to logits (N, num_classes).

    Raises
    ------
    ValueError
        For an unknown name or option, or a model that does not fit the input.

    Examples
    --------
    >>> build("cnn", (1, 8, 8), 10)(np.zeros((2, 1, 8, 8), np.float32)).shape
    (2, 10)
    """
    for argument, value, known in (
        ("name", name, names()),
        ("norm", norm, NORMS),
        ("norm_position", norm_position, NORM_POSITIONS),
        ("dropout_position", dropout_position, DROPOUT_POSITIONS),
    ):
        if value not in known:
            raise ValueError(
                f"models.build: {argument}: expected one of {', '.join(known)}, got {value!r}"
            )
    if not 0 <= number("models.build", "dropout", dropout) < 1:
        raise ValueError(f"models.build: dropout: expected a number in [0, 1), got {dropout}")
    if norm == "none" and dropout and dropout_position == "before-norm":
        raise ValueError(
            'models.build: dropout_position: "before-norm" needs norm "batch", got "none"'
        )
    builder, default_depth, default_width = _MODELS[name]
    depth = default_depth if depth is None else depth
    width = default_width if width is None else width
    for argument, size in (("num_classes", num_classes), ("depth", depth), ("width", width)):
        if size < 1:
            raise ValueError(f"models.build: {argument}: expected 1 or more, got {size}")
    if not input_shape or min(input_shape) < 1:
        raise ValueError(
            f"models.build: input_shape: expected sizes of 1 or more, got {input_shape}"
        )
    parts = _Parts(norm, norm_position, float(dropout), dropout_position, dtype)
    return builder(parts, tuple(input_shape), num_classes, depth, width)
