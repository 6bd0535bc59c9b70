"""Data sets, normalisation, augmentation and batches for training on arrays in memory.

Every defect of a data file ends in one `DataError` that names the file, what was expected and what
was found. Nothing is ever unpickled, and no size written in a file is trusted before it has been
compared with the bytes that are really there.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnext._pieces import integer

__all__ = ["Augment", "DataError", "Dataset", "Normalizer", "batches", "load", "num_batches"]

LastBatch = Literal["merge", "keep", "drop"]

_KNOWN_SPECS = "digits, fashion-mnist, idx:DIR, npz:FILE, cifar10:DIR"
_FASHION_MNIST_SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")
# One test set for all training seeds: results of different seeds are then comparable.
_DIGITS_SPLIT_SEED = 1797
_CIFAR10_RECORD = 1 + 3 * 32 * 32
# The classifier's width follows from the largest label; above this, labels are not class indices.
_MAX_CLASSES = 65_536
# Working memory of the statistics pass: 4 Mi float64 values, 32 MiB.
_CHUNK_VALUES = 1 << 22


class DataError(ValueError):
    """A data set is missing, damaged or inconsistent; the message names the file and the reason."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in memory, split into training and test part.

    Attributes
    ----------
    name : str
        The spec it was loaded from.
    x_train, x_test : array (N, C, H, W) or (N, features), uint8 or float32
        Raw values: uint8 pixels stay uint8, `batches` converts each batch to float32.
    y_train, y_test : array (N,), int64
        Labels in [0, num_classes).
    num_classes : int
        Largest label of the training split plus one.
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[np.int64]
    x_test: NDArray[Any]
    y_test: NDArray[np.int64]
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) or (features,)."""
        return self.x_train.shape[1:]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the four arrays with their dtypes and shapes, not over the name."""
        sha = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            sha.update(f"{array.dtype.str}{array.shape}".encode())
            sha.update(array.reshape(-1).data)
        return sha.hexdigest()


def load(spec: str) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    spec : str
        - ``digits``: scikit-learn's 1,797 images of 8x8, float32; 1,437 train and 360 test,
          stratified, the same split every time.
        - ``fashion-mnist``: 70,000 images of 28x28, uint8, searched in ``$BNEXT_DATA_DIR``,
          ``$BNEXT_DATA_DIR/fashion-mnist`` and ``/usr/share/datasets/fashion-mnist``.
        - ``idx:DIR``: four files in MNIST's format, plain or ``.gz``.
        - ``npz:FILE``: arrays ``x_train, y_train, x_test, y_test``; x of integers or floats,
          (n, features), (n, h, w) or (n, c, h, w).
        - ``cifar10:DIR``: CIFAR-10's binary version, in DIR or ``DIR/cifar-10-batches-bin``.

    Returns
    -------
    Dataset
        Its arrays are read-only.

    Raises
    ------
    DataError
        Unknown spec; file missing, unreadable, damaged or inconsistent.
    ImportError
        ``digits`` without scikit-learn.
    """
    kind, _, location = spec.partition(":")
    if spec == "digits":
        return _load_digits(spec)
    try:
        if spec == "fashion-mnist":
            return _load_idx(spec, _find_fashion_mnist())
        if kind in _FILE_LOADERS and location:
            return _FILE_LOADERS[kind](spec, Path(location).expanduser())
    except OSError as error:  # of a folder: those of files are DataErrors already
        raise DataError(f"{spec}: cannot be read: {error}") from error
    raise DataError(f"unknown data set {spec!r}; known: {_KNOWN_SPECS}")


class _Split(NamedTuple):
    x: NDArray[Any]
    y: NDArray[Any]
    x_source: str
    y_source: str


def _dataset(spec: str, train: _Split, test: _Split) -> Dataset:
    """Check what no single file can show, and freeze the arrays."""
    for split in (train, test):
        if len(split.x) != len(split.y):
            raise DataError(
                f"{split.y_source}: expected {len(split.x)} labels, one for each sample of "
                f"{split.x_source}, got {len(split.y)}"
            )
        if split.y.min() < 0:
            raise DataError(f"{split.y_source}: negative label {split.y.min()}")
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(
            f"{test.x_source}: expected samples of shape {train.x.shape[1:]} as in "
            f"{train.x_source}, got {test.x.shape[1:]}"
        )
    # Python ints, because uint64 labels need not fit into int64.
    num_classes = int(train.y.max()) + 1
    if num_classes > _MAX_CLASSES:
        raise DataError(
            f"{train.y_source}: label {num_classes - 1} out of range: "
            f"expected at most {_MAX_CLASSES - 1}"
        )
    if int(test.y.max()) >= num_classes:
        raise DataError(
            f"{test.y_source}: label {test.y.max()} out of range: "
            f"the training labels are 0 to {num_classes - 1}"
        )
    arrays = (train.x, train.y.astype(np.int64), test.x, test.y.astype(np.int64))
    for array in arrays:
        array.flags.writeable = False
    return Dataset(spec, *arrays, num_classes)


@contextmanager
def _reading(source: object, what: str) -> Iterator[None]:
    """Turn anything a decoder raises on damaged input into a DataError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such file") from error
    # Broad on purpose: zlib, zipfile and NumPy's header parser raise a dozen types on bad bytes.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        raise DataError(f"{source}: not a readable {what} ({reason})") from error


def _check_size(source: object, shape: tuple[int, ...], itemsize: int, actual: int) -> None:
    """Compare the size a header promises with the bytes that follow it."""
    if min(shape) < 1:
        raise DataError(f"{source}: empty or negative size: the header gives shape {shape}")
    expected = math.prod(shape) * itemsize
    if actual != expected:
        problem = "too short" if actual < expected else "too long"
        raise DataError(
            f"{source}: {problem}: the header gives shape {shape}, "
            f"expected {expected} bytes of data, got {actual}"
        )


def _load_digits(spec: str) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'data set "digits" needs scikit-learn: pip install "bnext[train]"'
        ) from error
    bunch = load_digits()
    x = bunch.images[:, np.newaxis].astype(np.float32)
    y = bunch.target
    # Raw PCG64 output is the same in every NumPy version; Generator.permutation may change.
    order = np.argsort(np.random.PCG64(_DIGITS_SPLIT_SEED).random_raw(len(y)), kind="stable")
    by_class = order[np.argsort(y[order], kind="stable")]
    in_test = np.zeros(len(y), dtype=bool)
    in_test[by_class[::5]] = True  # a fifth of each class
    source = "scikit-learn's load_digits"
    return _dataset(
        spec,
        _Split(x[~in_test], y[~in_test], source, source),
        _Split(x[in_test], y[in_test], source, source),
    )


def _find_fashion_mnist() -> Path:
    directories = [_FASHION_MNIST_SYSTEM_DIR]
    if data_dir := os.environ.get("BNEXT_DATA_DIR"):
        directories[:0] = [Path(data_dir), Path(data_dir, "fashion-mnist")]
    for directory in directories:
        if any(path.is_file() for path in _idx_spellings(directory, "train-images", 3)):
            return directory
    raise DataError(
        f"fashion-mnist: not found in {', '.join(map(str, directories))}; "
        "`apt install dataset-fashion-mnist`, or set BNEXT_DATA_DIR to a directory with its files"
    )


def _idx_spellings(directory: Path, stem: str, ndim: int) -> list[Path]:
    return [
        directory / f"{stem}{separator}idx{ndim}-ubyte{suffix}"
        for separator in "-."
        for suffix in ("", ".gz")
    ]


def _load_idx(spec: str, directory: Path) -> Dataset:
    def read_split(prefix: str) -> _Split:
        x, x_path = _read_idx(directory, f"{prefix}-images", 3)
        y, y_path = _read_idx(directory, f"{prefix}-labels", 1)
        return _Split(x[:, np.newaxis], y, str(x_path), str(y_path))

    return _dataset(spec, read_split("train"), read_split("t10k"))


def _read_idx(directory: Path, stem: str, ndim: int) -> tuple[NDArray[np.uint8], Path]:
    spellings = _idx_spellings(directory, stem, ndim)
    path = next((path for path in spellings if path.is_file()), None)
    if path is None:
        names = ", ".join(path.name for path in spellings)
        raise DataError(f"{directory}: no such file: expected one of {names}")
    with _reading(path, "file"):
        content = path.read_bytes()
    if path.suffix == ".gz":
        with _reading(path, "gzip file"):
            content = gzip.decompress(content)

    header_size = 4 + 4 * ndim
    if len(content) < header_size:
        raise DataError(
            f"{path}: too short: expected an IDX header of {header_size} bytes, got {len(content)}"
        )
    magic, *sizes = struct.unpack(f">I{ndim}i", content[:header_size])
    expected_magic = 0x0800 + ndim  # 0x08: uint8
    if magic != expected_magic:
        raise DataError(
            f"{path}: wrong IDX magic: expected 0x{expected_magic:08x} "
            f"(uint8, {ndim} dimensions), got 0x{magic:08x}"
        )
    _check_size(path, tuple(sizes), 1, len(content) - header_size)
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(sizes), path


def _load_npz(spec: str, path: Path) -> Dataset:
    with _reading(path, "npz file"), zipfile.ZipFile(path) as archive:
        members = set(archive.namelist())
    wanted = ("x_train", "y_train", "x_test", "y_test")
    missing = [key for key in wanted if f"{key}.npy" not in members]
    if missing:
        raise DataError(
            f"{path}: missing {', '.join(missing)}: expected {', '.join(wanted)}, "
            f"got {sorted(members)}"
        )

    def read_split(name: str) -> _Split:
        x_source, y_source = f"{path}: x_{name}", f"{path}: y_{name}"
        x = _read_npz_member(path, f"x_{name}", kinds="iuf", ndims=(2, 3, 4))
        y = _read_npz_member(path, f"y_{name}", kinds="iu", ndims=(1,))
        if x.dtype == np.uint8:
            x = np.ascontiguousarray(x)
        else:
            with np.errstate(over="ignore"):  # becomes Inf, which the next line names
                x = x.astype(np.float32, order="C")
            if not np.isfinite(x).all():
                raise DataError(f"{x_source}: NaN or Inf (as float32)")
        return _Split(x[:, np.newaxis] if x.ndim == 3 else x, y, x_source, y_source)

    return _dataset(spec, read_split("train"), read_split("test"))


def _read_npz_member(path: Path, key: str, *, kinds: str, ndims: tuple[int, ...]) -> NDArray[Any]:
    """Read an array without numpy.load, which allocates whatever size the header claims."""
    source = f"{path}: {key}"
    with _reading(source, "npz member"):
        with zipfile.ZipFile(path) as archive:
            content = archive.read(f"{key}.npy")
        stream = io.BytesIO(content)
        major, _ = np.lib.format.read_magic(stream)
        # Version 3 exists only for structured dtypes, which are no data for us.
        parse = (
            np.lib.format.read_array_header_1_0
            if major == 1
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = parse(stream)
    if dtype.hasobject:
        raise DataError(f"{source}: holds Python objects (dtype {dtype}), which are not unpickled")
    if dtype.kind not in kinds:
        expected = "integers" if kinds == "iu" else "integers or floats"
        raise DataError(f"{source}: expected {expected}, got dtype {dtype}")
    if len(shape) not in ndims:
        expected = " or ".join(map(str, ndims))
        raise DataError(f"{source}: expected {expected} dimensions, got shape {shape}")
    _check_size(source, shape, dtype.itemsize, len(content) - stream.tell())
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _load_cifar10(spec: str, directory: Path) -> Dataset:
    if (nested := directory / "cifar-10-batches-bin").is_dir():
        directory = nested

    def read_split(names: list[str]) -> _Split:
        records = np.concatenate([_read_cifar10(directory / name) for name in names])
        x = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)
        return _Split(x, records[:, 0], str(directory), str(directory))

    train_names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    return _dataset(spec, read_split(train_names), read_split(["test_batch.bin"]))


def _read_cifar10(path: Path) -> NDArray[np.uint8]:
    with _reading(path, "file"):
        content = path.read_bytes()
    if not content or len(content) % _CIFAR10_RECORD:
        raise DataError(
            f"{path}: expected one or more records of {_CIFAR10_RECORD} bytes, "
            f"got {len(content)} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR10_RECORD)
    if records[:, 0].max() > 9:
        raise DataError(f"{path}: label {records[:, 0].max()} out of range: expected 0 to 9")
    return records


_FILE_LOADERS: dict[str, Callable[[str, Path], Dataset]] = {
    "idx": _load_idx,
    "npz": _load_npz,
    "cifar10": _load_cifar10,
}


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Subtracts a mean and divides by a standard deviation, one of each per input channel (axis 1).

    Parameters
    ----------
    mean, std : array_like (C,)
        Finite, `std` > 0; kept in float64.

    Raises
    ------
    ValueError
        Wrong shapes, values that are not finite, or `std` <= 0.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ValueError(
                "Normalizer: expected mean and std of one shape (C,), "
                f"got {self.mean.shape} and {self.std.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all()):
            raise ValueError("Normalizer: mean and std must be finite")
        if not (self.std > 0).all():
            raise ValueError(f"Normalizer: std must be positive, got {self.std.min()}")

    @classmethod
    def fit(cls, x: NDArray[Any]) -> Normalizer:
        """Mean and (population) standard deviation of `x`, which should be the training split.

        Parameters
        ----------
        x : array (N, C, *), integer or float

        Notes
        -----
        A constant channel gets std 1, so that it becomes 0.
        """
        if x.ndim < 2 or x.size == 0:
            raise ValueError(f"Normalizer.fit: x: expected non-empty (N, C, *), got {x.shape}")
        samples = x.reshape(len(x), x.shape[1], -1)
        step = max(1, _CHUNK_VALUES // samples[0].size)
        # Relative to the first value, a constant channel is exactly 0 and has exactly no variance.
        shift = samples[0, :, :1].astype(np.float64)

        def channel_mean(
            function: Callable[[NDArray[np.float64]], NDArray[np.float64]],
        ) -> NDArray[np.float64]:
            total = np.zeros(x.shape[1])
            for start in range(0, len(samples), step):
                total += function(samples[start : start + step] - shift).sum(axis=(0, 2))
            return total / (len(samples) * samples.shape[2])

        offset = channel_mean(lambda shifted: shifted)
        std = np.sqrt(channel_mean(lambda shifted: np.square(shifted - offset[:, np.newaxis])))
        return cls(shift[:, 0] + offset, np.where(std == 0, 1.0, std))

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Normalise `x` (N, C, *) into a new float32 array; ValueError if C differs."""
        if x.ndim < 2 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"Normalizer: x: expected shape (N, {len(self.mean)}, *), got {x.shape}"
            )
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        scaled = (x - self.mean.reshape(per_channel)) / self.std.reshape(per_channel)
        return scaled.astype(np.float32)

    def to_dict(self) -> dict[str, NDArray[np.float64]]:
        """``{"mean": ..., "std": ...}``, for a checkpoint."""
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_dict(cls, arrays: Mapping[str, NDArray[Any]]) -> Normalizer:
        """Inverse of `to_dict`; ValueError for missing or unknown keys and unusable values."""
        if set(arrays) != {"mean", "std"}:
            raise ValueError(f"Normalizer: expected keys mean and std, got {sorted(arrays)}")
        return cls(arrays["mean"], arrays["std"])


@dataclass(frozen=True)
class Augment:
    """Random crop and random horizontal flip of images, drawn anew for each image.

    Parameters
    ----------
    crop : int
        Pad each side with this many zeros (the mean, after normalisation), then cut out a window of
        the original size at a random place. 0: no crop.
    flip : bool
        Mirror left to right with probability 1/2.
    """

    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ValueError(f"Augment: crop: expected 0 or more, got {self.crop}")

    def __call__(self, x: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
        """Augment `x` (N, C, H, W), which stays unchanged; same shape and dtype.

        Raises
        ------
        ValueError
            `x` is not (N, C, H, W).
        """
        if x.ndim != 4:
            raise ValueError(f"Augment: x: expected images (N, C, H, W), got shape {x.shape}")
        n, _, height, width = x.shape
        if self.crop:
            margin = (self.crop, self.crop)
            padded = np.pad(x, ((0, 0), (0, 0), margin, margin))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
            top, left = generator.integers(0, 2 * self.crop, size=(2, n), endpoint=True)
            x = windows[np.arange(n), :, top, left]
        if self.flip:
            mirrored = generator.random((n, 1, 1, 1)) < 0.5
            x = np.where(mirrored, x[..., ::-1], x)
        return x


def num_batches(n: int, batch_size: int, last_batch: LastBatch = "merge") -> int:
    """Number of batches that `batches` makes of `n` samples.

    Parameters
    ----------
    n, batch_size : int
        At least 1.
    last_batch : {"merge", "keep", "drop"}
        What happens to the samples left after the full batches. "keep": they are a batch. "drop":
        they are left out. "merge": as "keep", but a single one joins the preceding batch, because
        batch normalisation cannot train on one sample.

    Raises
    ------
    ValueError
        Unknown `last_batch`, `batch_size` below 1, or no batch at all.
    TypeError
        If `batch_size` is no integer.
    """
    return _count("num_batches", n, batch_size, last_batch)


def _count(operation: str, n: int, batch_size: int, last_batch: LastBatch) -> int:
    if last_batch not in ("merge", "keep", "drop"):
        raise ValueError(
            f'{operation}: last_batch: expected "merge", "keep" or "drop", got {last_batch!r}'
        )
    batch_size = integer(operation, "batch_size", batch_size, 1)
    full, rest = divmod(n, batch_size)
    joins_preceding = last_batch == "merge" and rest == 1 and full > 0
    count = full if rest == 0 or last_batch == "drop" or joins_preceding else full + 1
    if count < 1:
        raise ValueError(
            f"{operation}: expected one batch or more, got none of {n} samples with "
            f"batch_size {batch_size}, last_batch {last_batch!r}"
        )
    return count


def batches(
    x: NDArray[Any],
    y: NDArray[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    augment: Augment | None = None,
    normalizer: Normalizer | None = None,
    last_batch: LastBatch = "merge",
) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
    """Iterate once over the data.

    Order and augmentation follow from (`seed`, `epoch`) alone, so that a resumed training sees what
    an uninterrupted one would have seen.

    Parameters
    ----------
    x : array_like (N, C, H, W) or (N, features)
    y : array_like (N,)
    batch_size : int
    shuffle : bool
    seed, epoch : int
        Not negative.
    augment : Augment, optional
        Applied after `normalizer`; needs (N, C, H, W).
    normalizer : Normalizer, optional
        Without it, values are only converted to float32.
    last_batch : {"merge", "keep", "drop"}
        See `num_batches`.

    Yields
    ------
    x_batch : array (B, ...), float32
    y_batch : array (B,), dtype of `y`
        Both are copies, C-contiguous and writeable.

    Raises
    ------
    ValueError, TypeError
        At the call: `x` and `y` differ in length, `seed` or `epoch` is negative or no integer, or
        as in `num_batches`.
    """
    x, y = np.asarray(x), np.asarray(y)
    if len(x) != len(y):
        raise ValueError(f"batches: y: expected {len(x)} labels, one per sample, got {len(y)}")
    count = _count("batches", len(x), batch_size, last_batch)
    seed, epoch = integer("batches", "seed", seed, 0), integer("batches", "epoch", epoch, 0)
    edges = [batch_size * number for number in range(count)]
    edges.append(batch_size * count if last_batch == "drop" else len(x))
    # A spawn key keeps (seed, epoch) pairs apart; default_rng([seed, epoch]) mixes up large seeds.
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = generator.permutation(len(x)) if shuffle else np.arange(len(x))

    def generate() -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
        for number in range(count):
            chosen = order[edges[number] : edges[number + 1]]
            x_batch = normalizer(x[chosen]) if normalizer else x[chosen].astype(np.float32)
            if augment:
                x_batch = augment(x_batch, generator)
            yield np.ascontiguousarray(x_batch), y[chosen]

    return generate()
