"""Batch normalization of other frameworks in our terms.

What differs (y and running statistics mean the same otherwise):

=========  ==========================  =======  =================  =========
framework  momentum weighs             eps      running variance   channels
=========  ==========================  =======  =================  =========
bnext      the new batch, 0.1          1e-5     unbiased           1 or -1
PyTorch    the new batch, 0.1          1e-5     unbiased           1
Keras      the old statistics, 0.99    1e-3     biased             -1
ONNX       the old statistics, 0.9     1e-5     biased             1
=========  ==========================  =======  =================  =========

Running variances are taken over as they are, so that evaluation gives the same results. With
`count`, the number of values per channel in a batch of the training so far, biased ones are
multiplied by ``count / (count - 1)``, as if they had been collected here.

>>> from bnext import conventions, nn
>>> conventions.from_keras({"momentum": 0.99, "epsilon": 0.001}).options
{'eps': 0.001, 'momentum': 0.01, 'affine': True, 'channel_axis': -1}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnext._dtypes import is_half, parameter_dtype
from bnext._pieces import integer
from bnext.nn.batchnorm import BatchNorm
from bnext.nn.module import Array, number

__all__ = ["Converted", "from_keras", "from_onnx", "from_torch"]


class Converted(NamedTuple):
    """A layer of another framework.

    Attributes
    ----------
    options : dict
        Arguments of `nn.BatchNorm`; `num_features` and `dtype` too if there are arrays.
    state : dict
        For its ``load_state_dict``; empty without arrays.
    """

    options: dict[str, Any]
    state: dict[str, Array]

    def build(self, **options: Any) -> BatchNorm:
        """The layer, with further `options` of `nn.BatchNorm`, and its state."""
        layer = BatchNorm(**{**self.options, **options})
        if self.state:
            layer.load_state_dict(self.state)
        return layer


def from_torch(module: Any) -> Converted:
    """Of a `torch.nn.BatchNorm1d`, `2d` or `3d`, or what has its attributes and `state_dict`.

    Raises
    ------
    TypeError
        If it has not, or is an instance normalization.
    ValueError
        If it is a lazy one that has seen no input.

    Examples
    --------
    ``norm = conventions.from_torch(torch.nn.BatchNorm2d(3)).build(activation="relu")``
    """
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    missing = [name for name in (*names, "state_dict") if not hasattr(module, name)]
    if missing:
        raise TypeError(
            "from_torch: module: expected a torch.nn.BatchNorm, got "
            f"{type(module).__name__} without {', '.join(missing)}"
        )
    if any(base.__name__ == "_InstanceNorm" for base in type(module).__mro__):
        raise TypeError(
            f"from_torch: module: expected a torch.nn.BatchNorm, got {type(module).__name__}"
        )
    if module.num_features == 0:
        raise ValueError(
            f"from_torch: module: expected features, got none: run the {type(module).__name__} once"
        )
    state = {name: _array(tensor.cpu()) for name, tensor in module.state_dict().items()}
    options = {name: getattr(module, name) for name in names}
    dtype = next((a.dtype for name, a in state.items() if name != "num_batches_tracked"), None)
    return Converted(options | {"dtype": parameter_dtype(dtype)}, state)


def _array(tensor: Any) -> Array:
    # NumPy has no bfloat16.
    half = tensor.is_floating_point() and tensor.element_size() < 4
    return np.asarray(tensor.float() if half else tensor)


def from_keras(
    config: Mapping[str, Any],
    weights: Sequence[npt.ArrayLike] | None = None,
    *,
    count: int | None = None,
) -> Converted:
    """Of a `keras.layers.BatchNormalization`.

    Parameters
    ----------
    config : mapping
        ``layer.get_config()``, or some of it: momentum, epsilon, axis, center and scale count;
        what is missing has Keras's default.
    weights : sequence of arrays, optional
        ``layer.get_weights()``: gamma if `scale`, beta if `center`, moving mean and variance.
        If there is only one of gamma and beta, the other begins as what it stands for, and is
        trained here.
    count : int, optional
        See above.

    Raises
    ------
    ValueError
        For another axis than 1 or -1, and weights that do not fit.
    """
    _check_mapping("from_keras", "config", config)
    axis = config.get("axis", -1)
    axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
    if axis not in (1, -1):
        raise ValueError(
            f"from_keras: axis: expected 1 or -1, got {axis}; where it is the last one, write -1"
        )
    scale, center = config.get("scale", True), config.get("center", True)
    options = {
        "eps": _epsilon("from_keras", config.get("epsilon", 1e-3)),
        "momentum": _of_new_batch("from_keras", config.get("momentum", 0.99)),
        "affine": bool(scale or center),
        "channel_axis": axis,
    }
    if weights is None:
        return Converted(options, {})
    names = ["weight"] * bool(scale) + ["bias"] * bool(center) + ["running_mean", "running_var"]
    return _with_state("from_keras", "weights", options, names, weights, count)


def from_onnx(
    attributes: Mapping[str, Any],
    inputs: Sequence[npt.ArrayLike] | None = None,
    *,
    count: int | None = None,
) -> Converted:
    """Of an ONNX BatchNormalization node (opset 9 or later).

    Parameters
    ----------
    attributes : mapping
        epsilon and momentum count; what is missing has ONNX's default.
    inputs : sequence of arrays, optional
        scale, B, input_mean, input_var.
    count : int, optional
        See above.

    Raises
    ------
    ValueError
        For inputs that do not fit, and attributes of opsets before 9.
    """
    _check_mapping("from_onnx", "attributes", attributes)
    if attributes.get("spatial", 1) != 1:
        raise ValueError("from_onnx: spatial: expected 1, got 0 (opset 8 or earlier)")
    options = {
        "eps": _epsilon("from_onnx", attributes.get("epsilon", 1e-5)),
        "momentum": _of_new_batch("from_onnx", attributes.get("momentum", 0.9)),
        "affine": True,
        "channel_axis": 1,
    }
    if inputs is None:
        return Converted(options, {})
    names = ["weight", "bias", "running_mean", "running_var"]
    return _with_state("from_onnx", "inputs", options, names, inputs, count)


def _check_mapping(function: str, argument: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{function}: {argument}: expected a mapping of names to values, "
            f"got {type(given).__name__}"
        )


def _epsilon(function: str, epsilon: Any) -> float:
    if not 0 <= number(function, "epsilon", epsilon) < np.inf:
        raise ValueError(f"{function}: epsilon: expected a finite number >= 0, got {epsilon!r}")
    return float(epsilon)


def _of_new_batch(function: str, of_old: Any) -> float:
    of_old = number(function, "momentum", of_old)
    if not 0 <= of_old <= 1:
        raise ValueError(f"{function}: momentum: expected a number in [0, 1], got {of_old}")
    return other_momentum(of_old)


def other_momentum(momentum: float) -> float:
    """The weight of the new batch from that of the old statistics, or the other way round.

    >>> other_momentum(0.99)  # not 0.010000000000000009
    0.01
    """
    return float(1 - Decimal(repr(float(momentum))))


def _with_state(
    function: str,
    argument: str,
    options: dict[str, Any],
    names: Sequence[str],
    given: Sequence[npt.ArrayLike],
    count: int | None,
) -> Converted:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            f"{function}: {argument}: expected a sequence of arrays, got {type(given).__name__}"
        )
    arrays = [np.asarray(array) for array in given]
    shapes = [array.shape for array in arrays]
    if len(arrays) != len(names) or len(set(shapes)) != 1 or arrays[0].ndim != 1:
        raise ValueError(
            f"{function}: {argument}: expected {len(names)} arrays of one shape (C,) for "
            f"{', '.join(names)}, got {len(arrays)} of shapes {shapes}"
        )
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.kind not in "iuf" and not is_half(array.dtype):
            raise TypeError(
                f"{function}: {argument}: {name}: expected real numbers, got {array.dtype}"
            )
    dtype = parameter_dtype(arrays[0].dtype)
    features = len(arrays[0])
    state = {"weight": np.ones(features, dtype), "bias": np.zeros(features, dtype)}
    if not options["affine"]:
        state.clear()
    state |= {name: array.astype(dtype) for name, array in zip(names, arrays, strict=True)}
    if not (state["running_var"] >= 0).all():
        raise ValueError(
            f"{function}: {argument}: running_var: expected no negative variance and no NaN"
        )
    if count is not None:
        count = integer(function, "count", count, 2)
        state["running_var"] = (state["running_var"] * (count / (count - 1))).astype(dtype)
    state["num_batches_tracked"] = np.zeros((), np.int64)
    return Converted({"num_features": features, **options, "dtype": dtype}, state)
