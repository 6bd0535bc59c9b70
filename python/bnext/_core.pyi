from collections.abc import Callable
from typing import Any, SupportsIndex, TypedDict

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
_Activation = str | None
_Pair = tuple[int, int]

class _GeneratorState(TypedDict):
    seed: int
    offset: int

__version__: str
activations: tuple[str | None, ...]
dtypes: dict[str, str]  # those of data, and of their parameters and statistics
default_generator: Generator

class Generator:
    def __init__(self, seed: SupportsIndex) -> None: ...
    @property
    def state(self) -> _GeneratorState: ...
    @state.setter
    def state(self, state: _GeneratorState) -> None: ...

class BatchNormSaved:
    @property
    def mean(self) -> _Array: ...
    @property
    def var(self) -> _Array: ...
    @property
    def inv_std(self) -> _Array: ...
    @property
    def moments(self) -> tuple[_Array, _Array]: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class BatchNormGrads:
    @property
    def x(self) -> _Array: ...
    @property
    def weight(self) -> _Array | None: ...
    @property
    def bias(self) -> _Array | None: ...
    @property
    def residual(self) -> _Array | None: ...

class DropoutSaved:
    @property
    def p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def mask_shape(self) -> tuple[int, ...]: ...

def batch_norm_forward(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    residual: npt.ArrayLike | None = None,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    dropout: float = 0.0,
    generator: Generator | None = None,
    out: _Array | None = None,
) -> tuple[_Array, BatchNormSaved]: ...
def batch_norm_backward(
    grad_y: npt.ArrayLike, saved: BatchNormSaved, *, out: _Array | None = None
) -> BatchNormGrads: ...
def batch_norm_inference(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    residual: npt.ArrayLike | None = None,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    out: _Array | None = None,
) -> _Array: ...
def batch_norm_inference_forward(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    residual: npt.ArrayLike | None = None,
    activation: _Activation = None,
    negative_slope: float = 0.01,
    out: _Array | None = None,
) -> tuple[_Array, BatchNormSaved]: ...
def dropout_forward(
    x: npt.ArrayLike,
    p: float = 0.5,
    *,
    mask_shape: tuple[int, ...] | None = None,
    generator: Generator | None = None,
    out: _Array | None = None,
) -> tuple[_Array, DropoutSaved]: ...
def alpha_dropout_forward(
    x: npt.ArrayLike,
    p: float = 0.5,
    *,
    mask_shape: tuple[int, ...] | None = None,
    generator: Generator | None = None,
    out: _Array | None = None,
) -> tuple[_Array, DropoutSaved]: ...
def dropout_backward(
    grad_y: npt.ArrayLike, saved: DropoutSaved, *, out: _Array | None = None
) -> _Array: ...
def dropout_mask(
    seed: SupportsIndex, offset: SupportsIndex, shape: tuple[int, ...], p: float, *, first: int = 0
) -> npt.NDArray[np.bool_]: ...
def gaussian_dropout_noise(
    seed: SupportsIndex, offset: SupportsIndex, shape: tuple[int, ...], p: float, *, first: int = 0
) -> npt.NDArray[np.float32]: ...
def prepare(
    operation: str, argument: str, x: npt.ArrayLike, out: _Array | None
) -> tuple[_Array, _Array]: ...
def draw(operation: str, generator: Generator | None, advance: bool) -> tuple[int, int]: ...
def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...
def im2col(
    x: _Array, cols: _Array, kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> None: ...
def col2im(
    cols: _Array, x: _Array, kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> None: ...
def max_pool(
    x: _Array, y: _Array, index: _Array | None, kernel: _Pair, stride: _Pair, padding: _Pair
) -> None: ...
def max_pool_backward(
    grad_y: _Array, index: _Array, grad_x: _Array, kernel: _Pair, stride: _Pair, padding: _Pair
) -> None: ...
def avg_pool(
    x: _Array, y: _Array, kernel: _Pair, stride: _Pair, padding: _Pair, count_padding: bool
) -> None: ...
def avg_pool_backward(
    grad_y: _Array,
    grad_x: _Array,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    count_padding: bool,
) -> None: ...
def winograd_input(x: _Array, tiles: _Array, padding: _Pair) -> None: ...
def winograd_input_transpose(tiles: _Array, x: _Array, padding: _Pair) -> None: ...
def winograd_output(tiles: _Array, y: _Array) -> None: ...
def winograd_output_transpose(y: _Array, tiles: _Array) -> None: ...
def run_tasks(task: Callable[[int], object], count: int) -> None: ...
def backends() -> list[tuple[str, bool]]: ...
def backend() -> str: ...
def set_backend(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: SupportsIndex) -> None: ...
def empty_like(x: npt.ArrayLike) -> _Array: ...
def buffer_stats() -> dict[str, int]: ...
def set_buffer_limit(bytes: SupportsIndex) -> None: ...
def cache_bytes() -> int: ...
def has_openmp() -> bool: ...
def pause_threads() -> None: ...
def copy_count() -> int: ...
