"""The operations on arrays of a GPU, without copies: what the core's functions hand on to here.

Arrays are those of whichever library says where their memory is, by `__cuda_array_interface__` or
DLPack, and so are results. Work goes to the current stream of that library, in its order, and
nothing waits for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from bnext import _core
from bnext._core import DeviceArray, Generator


# -- libraries -------------------------------------------------------------------------------------
class _Library:
    """How arrays of a library are seen, and made. This one: of any, by the protocols alone."""

    def view(self, x: Any, where: str) -> DeviceArray:
        """`x` for the core; TypeError if it is no array of a GPU."""
        if isinstance(x, DeviceArray):
            return x
        interface = getattr(x, "__cuda_array_interface__", None)
        if interface is not None:
            return _of_interface(interface, x, where)
        if hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) in (2, 13):
            return DeviceArray.from_dlpack(x.__dlpack__(stream=self.stream(x) or 1))
        raise TypeError(f"{where}expected an array of a GPU, as the data, got {type(x).__name__}")

    def stream(self, x: Any) -> int:
        """The stream of the library for the device of x: by default the legacy default stream."""
        interface = getattr(x, "__cuda_array_interface__", None) or {}
        return int(interface.get("stream") or 0)

    def empty(self, like: Any, shape: Sequence[int], dtype: str, device: int, stream: int) -> Any:
        """An array of this library that `view` can see without a copy."""
        return DeviceArray.empty(tuple(shape), dtype, device, stream)

    def finished(self, result: Any, like: Any) -> Any:
        """What the caller gets for something that `empty` made."""
        if not isinstance(result, DeviceArray):
            return result
        module = sys.modules[type(like).__module__.partition(".")[0]]
        namespace = like.__array_namespace__() if hasattr(like, "__array_namespace__") else module
        from_dlpack = getattr(namespace, "from_dlpack", None)
        return result if from_dlpack is None else from_dlpack(result)

    def cast(self, x: Any, dtype: str) -> Any:
        return x.astype(dtype) if hasattr(x, "astype") else x


class _Torch(_Library):
    def view(self, x: Any, where: str) -> DeviceArray:
        if not getattr(x, "is_cuda", False):
            return super().view(x, where)
        return self.of_tensor(x, x.device.index)

    def of_tensor(self, x: Any, device: int) -> DeviceArray:
        x = x.detach()
        if not x.is_contiguous():
            x = x.contiguous()
        dtype = str(x.dtype).removeprefix("torch.")
        return DeviceArray(x.data_ptr(), dtype, tuple(x.shape), device, x)

    def stream(self, x: Any) -> int:
        return int(sys.modules["torch"].cuda.current_stream(x.device).cuda_stream)

    def empty(self, like: Any, shape: Sequence[int], dtype: str, device: int, stream: int) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=like.device)

    def cast(self, x: Any, dtype: str) -> Any:
        return x.to(getattr(sys.modules["torch"], dtype))


class _CuPy(_Library):
    def view(self, x: Any, where: str) -> DeviceArray:
        if hasattr(x, "flags") and hasattr(x, "data") and not x.flags.c_contiguous:
            x = sys.modules["cupy"].ascontiguousarray(x)
        return super().view(x, where)

    def stream(self, x: Any) -> int:
        return int(sys.modules["cupy"].cuda.get_current_stream(x.device.id).ptr)

    def empty(self, like: Any, shape: Sequence[int], dtype: str, device: int, stream: int) -> Any:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            return cupy.empty(tuple(shape), _cupy_dtype(like, dtype))


def _cupy_dtype(like: Any, dtype: str) -> Any:
    return like.dtype if str(like.dtype) == dtype else dtype


class _Numba(_Library):
    def finished(self, result: Any, like: Any) -> Any:
        if not isinstance(result, DeviceArray):
            return result
        return importlib.import_module("numba.cuda").as_cuda_array(result)


_LIBRARIES = {"torch": _Torch(), "cupy": _CuPy(), "numba": _Numba()}
_ANY = _Library()


def _library(x: Any) -> _Library:
    return _LIBRARIES.get(type(x).__module__.partition(".")[0], _ANY)


_TYPES = {"<f2": "float16", "<f4": "float32", "<f8": "float64", "|f2": "float16"}


def _of_interface(interface: dict[str, Any], x: Any, where: str) -> DeviceArray:
    shape = tuple(interface["shape"])
    dtype = _TYPES.get(interface["typestr"], interface["typestr"])
    if dtype not in _core.dtypes:
        dtype = str(getattr(x, "dtype", dtype))  # a bfloat16 is <V2 there
    if dtype not in _core.dtypes:
        raise TypeError(f"{where}expected dtype {' or '.join(_core.dtypes)}, got {dtype}")
    expected = _core.dtype_size(dtype)
    for extent, stride in zip(
        reversed(shape), reversed(interface.get("strides") or ()), strict=False
    ):
        if extent != 1 and stride != expected:
            raise ValueError(f"{where}expected a C-contiguous array")
        expected *= extent
    if interface.get("mask") is not None:
        raise TypeError(f"{where}expected an array without a mask")
    pointer = interface["data"][0]
    device = _core.device_of(pointer) if pointer else 0
    return DeviceArray(pointer, dtype, shape, device, x)


def view_of_tensor(x: Any) -> DeviceArray:
    """A tensor of PyTorch on a GPU for the core."""
    return _LIBRARIES["torch"].view(x, "")


# -- one call --------------------------------------------------------------------------------------
class _Call:
    """The data of one call, and how to see and make others like them."""

    def __init__(self, operation: str, argument: str, x: Any) -> None:
        self.operation, self.like, self.library = operation, x, _library(x)
        self.x = self.view(argument, x)
        self.stream = self.library.stream(x)

    def view(self, argument: str, x: Any) -> DeviceArray:
        return self.library.view(x, f"{self.operation}: {argument}: ")

    def optional(self, argument: str, x: Any) -> DeviceArray | None:
        return None if x is None else self.view(argument, x)

    def empty(self, shape: Sequence[int], dtype: str) -> tuple[Any, DeviceArray]:
        """An array of the caller's library, and what the core sees of it."""
        made = self.library.empty(self.like, shape, dtype, self.x.device, self.stream)
        return made, self.library.view(made, "")

    def out(self, out: Any) -> tuple[Any, DeviceArray]:
        """A new array like the data, or `out`."""
        if out is None:
            return self.empty(self.x.shape, self.x.dtype)
        seen = self.view("out", out)
        if seen.nbytes > 0 and seen.pointer != _pointer_of(out, seen):
            self.fail("out", "expected a C-contiguous array")
        return out, seen

    def finished(self, result: Any) -> Any:
        return self.library.finished(result, self.like)

    def fail(self, argument: str, message: str) -> NoReturn:
        raise ValueError(f"{self.operation}: {argument}: {message}")


def _pointer_of(x: Any, seen: DeviceArray) -> int:
    """Where x itself is, not a contiguous copy of it."""
    if hasattr(x, "data_ptr"):
        return int(x.data_ptr())
    interface = getattr(x, "__cuda_array_interface__", None)
    return seen.pointer if interface is None else int(interface["data"][0])


class Draw(NamedTuple):
    """Where a mask's random numbers come from. `array`: the seed is in memory of the GPU."""

    seed: int
    offset: int
    array: DeviceArray | None = None

    @property
    def arguments(self) -> dict[str, int]:
        pointer = 0 if self.array is None else self.array.pointer
        return {"seed": self.seed, "offset": self.offset, "device_seed": pointer}


def _draw(operation: str, generator: Generator | Draw | None, p: float) -> Draw:
    if isinstance(generator, Draw):
        return generator
    return Draw(*_core.draw(operation, generator, isinstance(p, int | float) and 0 < p <= 1))


# -- batch normalization ---------------------------------------------------------------------------
class DeviceBatchNormSaved:
    """What `batch_norm_backward` needs: `BatchNormSaved` for arrays of a GPU.

    Attributes
    ----------
    mean, var, inv_std : (C,), arrays of the caller's library, dtype of weight
    moments : the first two as float64
    count, nbytes : int
    """

    _of_device = True

    def __init__(
        self,
        call: _Call,
        arrays: dict[str, DeviceArray | None],
        statistics: dict[str, Any],
        options: dict[str, Any],
        draw: Draw,
    ) -> None:
        self._call, self._arrays, self._draw = call, arrays, draw
        self._statistics, self._options = statistics, options
        self.x_overwritten = self.residual_overwritten = self.has_residual = False
        self.batch_statistics = True
        self.gradients_of: tuple[bool, bool] = (False, False)  # weight, bias

    def _in_dtype_of_weight(self, name: str) -> Any:
        dtype = _core.dtypes[self._call.x.dtype]
        return self._call.library.cast(self._statistics[name], dtype)

    @property
    def mean(self) -> Any:
        return self._in_dtype_of_weight("mean")

    @property
    def var(self) -> Any:
        return self._in_dtype_of_weight("var")

    @property
    def inv_std(self) -> Any:
        return self._in_dtype_of_weight("inv_std")

    @property
    def moments(self) -> tuple[Any, Any]:
        return self._statistics["mean"], self._statistics["var"]

    @property
    def count(self) -> int:
        x, channels = self._call.x, self._arrays["mean"]
        width = x.nbytes // _core.dtype_size(x.dtype)
        return 0 if channels is None or not channels.nbytes else width // (channels.nbytes // 8)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self._call.x, *self._arrays.values()) if array)

    def __repr__(self) -> str:
        activation = self._options["activation"]
        return f"DeviceBatchNormSaved(x={self._call.x!r}, activation={activation})"


class DeviceBatchNormGrads(NamedTuple):
    """Gradients of batch normalization; None where forward had no such argument."""

    x: Any
    weight: Any
    bias: Any
    residual: Any


def _channels(x: DeviceArray, channel_axis: int) -> int:
    """How many, before anything has been checked: for the outputs that are made here."""
    return 0 if len(x.shape) < 2 else x.shape[-1 if channel_axis == -1 else 1]


def batch_norm_forward(
    x: Any, weight: Any, bias: Any, eps: float, channel_axis: int, residual: Any,
    activation: str | None, negative_slope: float, dropout: float,
    generator: Generator | Draw | None, out: Any,
) -> tuple[Any, DeviceBatchNormSaved]:  # fmt: skip
    call = _Call("batch_norm_forward", "x", x)
    w, b = call.optional("weight", weight), call.optional("bias", bias)
    r = call.optional("residual", residual)
    y, seen_y = call.out(out)
    channels = (_channels(call.x, channel_axis),)
    made = {name: call.empty(channels, "float64") for name in ("mean", "var", "inv_std")}
    passes = None
    gated = _core.is_gated(activation)
    size = call.x.nbytes // _core.dtype_size(call.x.dtype)
    if r is not None and gated:
        # Memory of the caller's library, as all that outlives the call: graphs that it captures
        # know of it. Bits, so the dtype is any of the core's.
        _, passes = call.empty((_core.passes_bytes(size) // 2 + 1,), "float16")
    draw = _draw(call.operation, generator, dropout)
    options = {
        "channel_axis": channel_axis,
        "activation": activation,
        "negative_slope": negative_slope,
        "dropout": dropout,
    }
    seen = {name: view for name, (_, view) in made.items()}
    _core.device_batch_norm_forward(
        call.x, w, b, r, seen_y, **seen,
        passes=0 if passes is None else passes.pointer,
        eps=eps, **options, **draw.arguments, stream=call.stream,
    )  # fmt: skip
    kept = r if activation is not None and passes is None else None
    saved = DeviceBatchNormSaved(
        call,
        {"weight": w, "bias": b, "residual": kept, "passes": passes, **seen},
        {name: call.finished(array) for name, (array, _) in made.items()},
        options,
        draw,
    )
    saved.has_residual = r is not None
    saved.x_overwritten = seen_y.pointer == call.x.pointer
    saved.residual_overwritten = kept is not None and seen_y.pointer == kept.pointer
    saved.gradients_of = (w is not None, b is not None)
    return call.finished(y), saved


def batch_norm_backward(grad_y: Any, saved: DeviceBatchNormSaved, out: Any) -> DeviceBatchNormGrads:
    operation = "batch_norm_backward"
    if not isinstance(saved, DeviceBatchNormSaved):
        raise TypeError(
            f"{operation}: saved: expected what batch_norm_forward returned, "
            f"got {type(saved).__name__}"
        )
    options, arrays = saved._options, saved._arrays
    call = _Call(operation, "grad_y", grad_y)
    activation, dropout = options["activation"], options["dropout"]
    invertible = _core.is_invertible(activation, options["negative_slope"])
    if saved.x_overwritten and (saved.has_residual or dropout != 0 or not invertible):
        call.fail("saved", "x was overwritten, since forward ran with out=x; backward needs x")
    if saved.residual_overwritten:
        call.fail("saved", "the residual was overwritten, since forward ran with out=residual")
    grad_x, seen_grad_x = call.out(out)
    through = activation is None and dropout == 0
    grad_residual = seen_residual = None
    if saved.has_residual and not through:
        grad_residual, seen_residual = call.empty(call.x.shape, call.x.dtype)
    if saved.has_residual and through and seen_grad_x.pointer == call.x.pointer:
        call.fail("out", "expected other memory than that of grad_y, the residual's gradient")
    dtype = _core.dtypes[saved._call.x.dtype]
    mean, inv_std = arrays["mean"], arrays["inv_std"]
    assert mean is not None
    assert inv_std is not None
    grads: list[tuple[Any, DeviceArray | None]] = [
        call.empty(mean.shape, dtype) if wanted else (None, None) for wanted in saved.gradients_of
    ]
    passes = arrays["passes"]
    _core.device_batch_norm_backward(
        call.x, saved._call.x, arrays["weight"], arrays["bias"], mean, inv_std,
        arrays["residual"], 0 if passes is None else passes.pointer, seen_grad_x, seen_residual,
        grads[0][1], grads[1][1], **options, **saved._draw.arguments,
        batch_statistics=saved.batch_statistics, from_result=saved.x_overwritten,
        stream=call.stream,
    )  # fmt: skip
    weight, bias = (None if array is None else call.finished(array) for array, _ in grads)
    if saved.has_residual:
        grad_residual = grad_y if through else call.finished(grad_residual)
    return DeviceBatchNormGrads(call.finished(grad_x), weight, bias, grad_residual)


def batch_norm_inference(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float, channel_axis: int,
    residual: Any, activation: str | None, negative_slope: float, out: Any,
) -> Any:  # fmt: skip
    call = _Call("batch_norm_inference", "x", x)
    m, v, w, b, r = (
        call.optional(name, array)
        for name, array in (
            ("mean", mean), ("var", var), ("weight", weight), ("bias", bias),
            ("residual", residual),
        )
    )  # fmt: skip
    y, seen = call.out(out)
    _core.device_batch_norm_inference(
        call.x, m, v, w, b, r, seen, eps, channel_axis, activation, negative_slope, call.stream
    )
    return call.finished(y)


def batch_norm_inference_forward(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float, channel_axis: int,
    residual: Any, activation: str | None, negative_slope: float, out: Any,
) -> tuple[Any, DeviceBatchNormSaved]:  # fmt: skip
    """With what backward needs. Of libraries whose arrays can be calculated with."""
    y = batch_norm_inference(
        x, mean, var, weight, bias, eps, channel_axis, residual, activation, negative_slope, out
    )
    call = _Call("batch_norm_inference", "x", x)
    m, v = (call.library.cast(value, "float64") for value in (mean, var))
    statistics = {"mean": m, "var": v, "inv_std": (v + eps) ** -0.5}
    r = call.optional("residual", residual)
    saved = DeviceBatchNormSaved(
        call,
        {
            "weight": call.optional("weight", weight),
            "bias": call.optional("bias", bias),
            "residual": None if activation is None else r,
            "passes": None,
            **{name: call.view(name, value) for name, value in statistics.items()},
        },
        statistics,
        {
            "channel_axis": channel_axis,
            "activation": activation,
            "negative_slope": negative_slope,
            "dropout": 0.0,
        },
        Draw(0, 0),
    )
    saved.has_residual = r is not None
    saved.batch_statistics = False
    saved.x_overwritten = out is not None and out is x
    saved.residual_overwritten = out is not None and out is residual
    saved.gradients_of = (weight is not None, bias is not None)
    return y, saved


# -- dropout ---------------------------------------------------------------------------------------
class DeviceDropoutSaved:
    """What `dropout_backward` needs: `DropoutSaved` for arrays of a GPU."""

    _of_device = True

    def __init__(
        self, p: float, draw: Draw, shape: tuple[int, ...], mask_shape: tuple[int, ...], alpha: bool
    ) -> None:
        self.p, self.shape, self._mask_shape, self.alpha = p, shape, mask_shape, alpha
        self._draw = draw

    @property
    def seed(self) -> int:
        return self._draw.seed

    @property
    def offset(self) -> int:
        return self._draw.offset

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return self._mask_shape or self.shape

    def __repr__(self) -> str:
        return f"DeviceDropoutSaved(p={self.p}, seed={self.seed}, offset={self.offset})"


def _dropout_forward(
    operation: str, x: Any, p: float, mask_shape: Sequence[int] | None,
    generator: Generator | Draw | None, out: Any, alpha: bool,
) -> tuple[Any, DeviceDropoutSaved]:  # fmt: skip
    call = _Call(operation, "x", x)
    shape = () if mask_shape is None else tuple(mask_shape)
    if mask_shape is not None and len(shape) != len(call.x.shape):
        call.fail(
            "mask_shape", f"expected {len(call.x.shape)} extents, as x has, got {mask_shape!r}"
        )
    y, seen = call.out(out)
    draw = _draw(operation, generator, p)
    _core.device_dropout(call.x, seen, p, shape, alpha, False, **draw.arguments, stream=call.stream)
    return call.finished(y), DeviceDropoutSaved(p, draw, call.x.shape, shape, alpha)


def dropout_forward(
    x: Any, p: float, mask_shape: Sequence[int] | None, generator: Generator | Draw | None, out: Any
) -> tuple[Any, DeviceDropoutSaved]:
    return _dropout_forward("dropout_forward", x, p, mask_shape, generator, out, False)


def alpha_dropout_forward(
    x: Any, p: float, mask_shape: Sequence[int] | None, generator: Generator | Draw | None, out: Any
) -> tuple[Any, DeviceDropoutSaved]:
    return _dropout_forward("alpha_dropout_forward", x, p, mask_shape, generator, out, True)


def dropout_backward(grad_y: Any, saved: DeviceDropoutSaved, out: Any) -> Any:
    call = _Call("dropout_backward", "grad_y", grad_y)
    if not isinstance(saved, DeviceDropoutSaved):
        raise TypeError(
            "dropout_backward: saved: expected what dropout_forward returned, "
            f"got {type(saved).__name__}"
        )
    if call.x.shape != saved.shape:
        call.fail("grad_y", f"expected shape {saved.shape}, got {call.x.shape}")
    grad_x, seen = call.out(out)
    _core.device_dropout(
        call.x, seen, saved.p, saved._mask_shape, saved.alpha, True, **saved._draw.arguments,
        stream=call.stream,
    )  # fmt: skip
    return call.finished(grad_x)
