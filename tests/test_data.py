"""Data sets, damaged files, normalisation, augmentation and batches."""

from __future__ import annotations

import gzip
import io
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnext import data

RNG = np.random.default_rng(0)
X_TRAIN = RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8)
Y_TRAIN = np.array([0, 1, 2, 0, 1, 2, 2], dtype=np.uint8)
X_TEST = RNG.integers(0, 256, (3, 5, 4), dtype=np.uint8)
Y_TEST = np.array([2, 0, 1], dtype=np.uint8)
NPZ = {"x_train": X_TRAIN, "y_train": Y_TRAIN, "x_test": X_TEST, "y_test": Y_TEST}


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">I{array.ndim}i", 0x0800 + array.ndim, *array.shape)
    return header + array.tobytes()


IDX = {
    "train-images-idx3-ubyte": idx_bytes(X_TRAIN),
    "train-labels-idx1-ubyte": idx_bytes(Y_TRAIN),
    "t10k-images-idx3-ubyte": idx_bytes(X_TEST),
    "t10k-labels-idx1-ubyte": idx_bytes(Y_TEST),
}


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def npz_bytes(**changes: np.ndarray | None) -> bytes:
    stream = io.BytesIO()
    arrays = {key: array for key, array in {**NPZ, **changes}.items() if array is not None}
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy_bytes(shape: str, descr: str = "|u1", content: bytes = b"\0" * 8) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def npz_with_raw_x_train(member: bytes) -> bytes:
    stream = io.BytesIO(npz_bytes(x_train=None))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("x_train.npy", member)
    return stream.getvalue()


def corrupt_npz_member() -> bytes:
    content = npz_bytes()
    position = content.index(X_TRAIN.tobytes())
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def cifar_records(labels: list[int]) -> tuple[bytes, np.ndarray]:
    pixels = RNG.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    records = zip(labels, pixels, strict=True)
    return b"".join(bytes([label]) + image.tobytes() for label, image in records), pixels


CIFAR_TRAIN = [cifar_records([2 * number, 2 * number + 1]) for number in range(5)]
CIFAR_TEST = cifar_records([9, 0, 4])
CIFAR = {
    **{f"data_batch_{number}.bin": raw for number, (raw, _) in enumerate(CIFAR_TRAIN, start=1)},
    "test_batch.bin": CIFAR_TEST[0],
}


def assert_is_sample_data(dataset: data.Dataset) -> None:
    for loaded, expected in ((dataset.x_train, X_TRAIN), (dataset.x_test, X_TEST)):
        np.testing.assert_array_equal(loaded, expected[:, np.newaxis])
    np.testing.assert_array_equal(dataset.y_train, Y_TRAIN)
    np.testing.assert_array_equal(dataset.y_test, Y_TEST)
    assert dataset.y_train.dtype == dataset.y_test.dtype == np.int64
    assert (dataset.num_classes, dataset.input_shape) == (3, (1, 5, 4))


# Loading


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_round_trip(tmp_path: Path, separator: str, compressed: bool) -> None:
    for name, content in IDX.items():
        name = name.replace("-idx", f"{separator}idx") + (".gz" if compressed else "")
        (tmp_path / name).write_bytes(gzip.compress(content) if compressed else content)
    dataset = data.load(f"idx:{tmp_path}")
    assert_is_sample_data(dataset)
    assert dataset.x_train.dtype == np.uint8
    assert dataset.name == f"idx:{tmp_path}"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("dtype", "loaded_dtype"),
    [("u1", "u1"), ("i8", "f4"), ("f2", "f4"), (">f4", "f4"), ("f8", "f4")],
)
def test_npz_round_trip(
    tmp_path: Path, save: Callable[..., None], dtype: str, loaded_dtype: str
) -> None:
    arrays = {key: a.astype(dtype) if key[0] == "x" else a for key, a in NPZ.items()}
    save(tmp_path / "set.npz", **arrays)
    dataset = data.load(f"npz:{tmp_path / 'set.npz'}")
    assert_is_sample_data(dataset)
    assert dataset.x_train.dtype == dataset.x_test.dtype == np.dtype(loaded_dtype)
    assert dataset.x_train.dtype.isnative


@pytest.mark.parametrize("sample_shape", [(6,), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_keeps_features_and_channels(
    tmp_path: Path, sample_shape: tuple[int, ...], order: str
) -> None:
    x_train, x_test = RNG.normal(size=(7, *sample_shape)), RNG.normal(size=(3, *sample_shape))
    path = tmp_path / "set.npz"
    np.savez(path, x_train=np.asarray(x_train, order=order), y_train=Y_TRAIN,
             x_test=np.asarray(x_test, order=order), y_test=Y_TEST)  # fmt: skip
    dataset = data.load(f"npz:{path}")
    np.testing.assert_array_equal(dataset.x_train, x_train.astype(np.float32))
    np.testing.assert_array_equal(dataset.x_test, x_test.astype(np.float32))
    assert dataset.x_train.flags.c_contiguous
    assert dataset.input_shape == sample_shape


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
def test_cifar10_round_trip(tmp_path: Path, folder: str) -> None:
    write_files(tmp_path / folder, CIFAR)
    dataset = data.load(f"cifar10:{tmp_path}")
    np.testing.assert_array_equal(dataset.x_train, np.concatenate([x for _, x in CIFAR_TRAIN]))
    np.testing.assert_array_equal(dataset.x_test, CIFAR_TEST[1])
    assert dataset.y_train.tolist() == list(range(10))
    assert dataset.y_test.tolist() == [9, 0, 4]
    assert (dataset.num_classes, dataset.input_shape) == (10, (3, 32, 32))


def test_digits_split_is_complete_disjoint_stratified_and_fixed() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    dataset = data.load("digits")
    assert dataset.x_train.shape == (1437, 1, 8, 8)
    assert dataset.x_test.shape == (360, 1, 8, 8)
    assert dataset.x_train.dtype == np.float32

    original = datasets.load_digits()

    def by_image(images: np.ndarray, labels: np.ndarray) -> dict[bytes, int]:
        return {x.astype("f4").tobytes(): int(y) for x, y in zip(images, labels, strict=True)}

    # All 1,797 images differ, so an image identifies its sample.
    everything = by_image(original.images, original.target)
    train = by_image(dataset.x_train, dataset.y_train)
    test = by_image(dataset.x_test, dataset.y_test)
    assert len(everything) == 1797
    assert not train.keys() & test.keys()
    assert train | test == everything

    per_class = np.bincount(original.target)
    assert np.abs(np.bincount(dataset.y_test) - per_class / 5).max() < 1
    # Another split would make results incomparable with earlier ones.
    assert dataset.digest == "ce1555d0b9106b7d4dadb1411443696644b97d739019a55c6959efdfea349061"


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "bnext\[train\]"'):
        data.load("digits")


def test_fashion_mnist() -> None:
    try:
        dataset = data.load("fashion-mnist")
    except data.DataError as error:
        pytest.skip(str(error))
    assert dataset.x_train.shape == (60_000, 1, 28, 28)
    assert dataset.x_test.shape == (10_000, 1, 28, 28)
    assert dataset.x_train.dtype == np.uint8
    assert np.bincount(dataset.y_train).tolist() == [6000] * 10
    assert np.bincount(dataset.y_test).tolist() == [1000] * 10
    assert dataset.y_train[:5].tolist() == [9, 0, 0, 3, 0]
    # The published statistics of the training pixels in [0, 1].
    normalizer = data.Normalizer.fit(dataset.x_train)
    np.testing.assert_allclose(normalizer.mean / 255, [0.2860], atol=5e-5)
    np.testing.assert_allclose(normalizer.std / 255, [0.3530], atol=5e-5)


@pytest.mark.parametrize("folder", [".", "fashion-mnist"])
def test_fashion_mnist_is_first_searched_in_the_users_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    write_files(tmp_path / folder, IDX)
    monkeypatch.setenv("BNEXT_DATA_DIR", str(tmp_path))
    assert_is_sample_data(data.load("fashion-mnist"))


def test_missing_fashion_mnist_says_where_it_looked_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNEXT_DATA_DIR", str(tmp_path / "mine"))
    monkeypatch.setattr(data, "_FASHION_MNIST_SYSTEM_DIR", tmp_path / "system")
    with pytest.raises(data.DataError) as caught:
        data.load("fashion-mnist")
    mine, system = tmp_path / "mine", tmp_path / "system"
    assert f"not found in {mine}, {mine / 'fashion-mnist'}, {system};" in str(caught.value)
    assert "apt install dataset-fashion-mnist" in str(caught.value)
    assert "BNEXT_DATA_DIR" in str(caught.value)


@pytest.mark.parametrize("spec", ["", "mnist", "digits:x", "idx:", "npz", "csv:file"])
def test_unknown_spec_lists_the_known_ones(spec: str) -> None:
    known = "known: digits, fashion-mnist, idx:DIR, npz:FILE, cifar10:DIR"
    with pytest.raises(data.DataError, match=known) as caught:
        data.load(spec)
    assert repr(spec) in str(caught.value)


def test_digest_names_the_contents(tmp_path: Path) -> None:
    first = data.load(f"idx:{write_files(tmp_path / 'first', IDX)}")
    second = data.load(f"idx:{write_files(tmp_path / 'second', IDX)}")
    (tmp_path / "changed.npz").write_bytes(npz_bytes(y_test=np.array([2, 1, 1])))
    changed = data.load(f"npz:{tmp_path / 'changed.npz'}")
    assert len(first.digest) == 64
    assert first.digest == second.digest != changed.digest
    with pytest.raises(ValueError, match="read-only"):
        first.x_train[0] = 0


# Bad files

TRAIN_X, TRAIN_Y, TEST_X, TEST_Y = IDX
GZIPPED = gzip.compress(IDX[TRAIN_X], mtime=0)  # names of tests, which must not change
UNKNOWN_TYPE = b"\0\0\x0d\x03"
HUGE = 2**31 - 1


def idx_sizes(*sizes: int) -> bytes:
    return struct.pack(">I3i", 0x0803, *sizes) + X_TRAIN.tobytes()


BAD_IDX = [  # file, content, reason
    (TRAIN_X, b"", "too short: expected an IDX header of 16 bytes, got 0"),
    (TRAIN_Y, b"\0\0\x08\x01\0", "too short: expected an IDX header of 8 bytes, got 5"),
    (TRAIN_X, UNKNOWN_TYPE + IDX[TRAIN_X][4:], "magic: expected 0x00000803 (uint8, 3 dimensions)"),
    (TRAIN_X, UNKNOWN_TYPE + IDX[TRAIN_X][4:], "got 0x00000d03"),
    (TRAIN_Y, IDX[TRAIN_X], "magic: expected 0x00000801 (uint8, 1 dimensions), got 0x00000803"),
    (TRAIN_X, IDX[TRAIN_X][:-1], "too short: the header gives shape (7, 5, 4)"),
    (TRAIN_X, IDX[TRAIN_X][:-1], "expected 140 bytes of data, got 139"),
    (TEST_Y, IDX[TEST_Y] + b"\0", "too long: the header gives shape (3,)"),
    (TRAIN_X, idx_sizes(-7, 5, -4), "empty or negative size: the header gives shape (-7, 5, -4)"),
    (TRAIN_X, idx_sizes(HUGE, HUGE, HUGE), f"too short: the header gives shape ({HUGE}, {HUGE}"),
    (TEST_X, idx_bytes(X_TEST[:0]), "empty or negative size: the header gives shape (0, 5, 4)"),
    (TRAIN_Y, idx_bytes(Y_TRAIN[:6]), "expected 7 labels, one for each sample of"),
    (TEST_X, idx_bytes(X_TEST[:, 1:]), "expected samples of shape (1, 5, 4)"),
    (TEST_Y, idx_bytes(Y_TEST + np.uint8(1)), "label 3 out of range: the training labels are 0"),
    (TRAIN_X + ".gz", IDX[TRAIN_X], "not a readable gzip file (BadGzipFile"),
    (TRAIN_X + ".gz", GZIPPED[:-9], "not a readable gzip file (EOFError"),
    (TRAIN_X + ".gz", GZIPPED[:10] + b"\xff" * 60, "not a readable gzip file (error: Error -3"),
    (
        TRAIN_X + ".gz",
        gzip.compress(IDX[TRAIN_X][:-2], mtime=0),
        "too short: the header gives shape",
    ),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_IDX)
def test_bad_idx_file(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    write_files(tmp_path, IDX)
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    assert_rejected(f"idx:{tmp_path}", f"{tmp_path / name}: ", reason)


BAD_NPZ = [  # member or "" for the file itself, content, reason
    ("", b"x_train", "not a readable npz file (BadZipFile"),
    ("", npy_bytes("(2, 4)"), "not a readable npz file (BadZipFile"),
    ("", npz_bytes()[:-30], "not a readable npz file (BadZipFile"),
    ("", npz_bytes(y_test=None, x_test=None), "missing x_test, y_test: expected x_train, y_train"),
    ("x_train", corrupt_npz_member(), "not a readable npz member (BadZipFile: Bad CRC-32"),
    (
        "x_train",
        npz_with_raw_x_train(b"this is no array"),
        "npz member (ValueError: the magic string",
    ),
    ("x_train", npz_with_raw_x_train(npy_bytes("(7, 5")), "not a readable npz member"),
    ("x_train", npz_with_raw_x_train(npy_bytes("(10**9, 1)")), "not a readable npz member"),
    ("x_train", npz_with_raw_x_train(npy_bytes(f"({10**15}, 9)")), "too short: the header gives"),
    ("x_train", npz_with_raw_x_train(npy_bytes("(-2, -4)")), "empty or negative size"),
    ("x_train", npz_with_raw_x_train(npy_bytes("(7, 1)")), "expected 7 bytes of data, got 8"),
    ("x_train", npz_bytes(x_train=np.array([[{}], [{}]])), "holds Python objects (dtype object)"),
    ("y_test", npz_bytes(y_test=np.array([0, 1, None])), "holds Python objects (dtype object)"),
    ("x_test", npz_bytes(x_test=X_TEST * 1j), "expected integers or floats, got dtype complex128"),
    ("x_train", npz_bytes(x_train=np.float32(1)), "expected 2 or 3 or 4 dimensions, got shape ()"),
    ("x_train", npz_bytes(x_train=np.full(X_TRAIN.shape, np.nan)), "NaN or Inf"),
    ("x_test", npz_bytes(x_test=np.full(X_TEST.shape, np.inf)), "NaN or Inf"),
    ("x_test", npz_bytes(x_test=np.full(X_TEST.shape, 1e39)), "NaN or Inf (as float32)"),
    ("x_test", npz_bytes(x_test=X_TEST[:0], y_test=Y_TEST[:0]), "empty or negative size"),
    ("x_test", npz_bytes(x_test=X_TEST[:, 1:]), "expected samples of shape (1, 5, 4)"),
    ("y_train", npz_bytes(x_train=X_TRAIN[:6]), "expected 6 labels, one for each sample of"),
    ("y_train", npz_bytes(y_train=Y_TRAIN[:, np.newaxis]), "1 dimensions, got shape (7, 1)"),
    ("y_train", npz_bytes(y_train=Y_TRAIN / 1.0), "expected integers, got dtype float64"),
    ("y_train", npz_bytes(y_train=Y_TRAIN + np.uint64(2**63)), f"label {2**63 + 2} out of range"),
    ("y_test", npz_bytes(y_test=Y_TEST.astype("i8") - 1), "negative label -1"),
    ("y_test", npz_bytes(y_test=np.array([0, 3, 1])), "label 3 out of range: the training labels"),
]


@pytest.mark.parametrize(("member", "content", "reason"), BAD_NPZ)
def test_bad_npz_file(tmp_path: Path, member: str, content: bytes, reason: str) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    assert_rejected(f"npz:{path}", f"{path}: {member}", reason)


BAD_CIFAR = [
    ("data_batch_3.bin", b"", "expected one or more records of 3073 bytes, got 0 bytes"),
    ("test_batch.bin", CIFAR["test_batch.bin"][:-1], "of 3073 bytes, got 9218 bytes"),
    ("data_batch_5.bin", cifar_records([1, 10])[0], "label 10 out of range: expected 0 to 9"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_CIFAR)
def test_bad_cifar10_file(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    write_files(tmp_path, {**CIFAR, name: content})
    assert_rejected(f"cifar10:{tmp_path}", f"{tmp_path / name}: ", reason)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, {TRAIN_X: IDX[TRAIN_X], "data_batch_1.bin": CIFAR["data_batch_1.bin"]})
    spellings = f"{TRAIN_Y}, {TRAIN_Y}.gz, train-labels.idx1-ubyte, train-labels.idx1-ubyte.gz"
    assert_rejected(
        f"idx:{tmp_path}", f"{tmp_path}: ", f"no such file: expected one of {spellings}"
    )
    assert_rejected(f"npz:{tmp_path / 'no.npz'}", f"{tmp_path / 'no.npz'}: ", "no such file")
    assert_rejected(f"cifar10:{tmp_path}", f"{tmp_path / 'data_batch_2.bin'}: ", "no such file")
    assert_rejected(f"npz:{tmp_path}", f"{tmp_path}: ", "not a readable npz file (")


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return Path.touch, (tmp_path / "executed",)

    path = tmp_path / "set.npz"
    path.write_bytes(npz_bytes(x_train=np.array([[Payload()]], dtype=object)))
    assert_rejected(f"npz:{path}", f"{path}: x_train: ", "not unpickled")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["idx", "npz"])
def test_random_damage_gives_data_error_or_loads(tmp_path: Path, kind: str) -> None:
    chance = random.Random(1)
    write_files(tmp_path, IDX)
    if kind == "idx":
        (tmp_path / TRAIN_X).unlink()
        spec, path, content = f"idx:{tmp_path}", tmp_path / (TRAIN_X + ".gz"), GZIPPED
    else:
        path, content = tmp_path / "set.npz", npz_bytes()
        spec = f"npz:{path}"
    messages = []
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 2, 5])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        try:
            data.load(spec)
        except data.DataError as error:
            messages.append(str(error))
    assert len(messages) > 150
    assert all(str(path) in message and "\n" not in message for message in messages)


def assert_rejected(spec: str, where: str, reason: str) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load(spec)
    message = str(caught.value)
    assert message.startswith(where)
    assert reason in message
    assert "\n" not in message


# Normalizer


def test_normalizer_uses_the_given_split_only_and_standardises_it() -> None:
    train = RNG.normal([1e4, -3.0, 0.5], [1.0, 2.0, 0.1], (50, 4, 6, 3)).transpose(0, 3, 1, 2)
    train = train.astype(np.float32)
    normalizer = data.Normalizer.fit(train)
    exact = train.astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, exact.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(normalizer.std, exact.std((0, 2, 3)), rtol=1e-10)

    normalized = normalizer(train)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized.mean((0, 2, 3), dtype="f8"), 0, atol=1e-6)
    np.testing.assert_allclose(normalized.std((0, 2, 3), dtype="f8"), 1, rtol=1e-6)
    # Other data is scaled by the training statistics, not by its own.
    other = np.full((1, 3, 1, 1), 7.0, np.float32)
    expected = (7 - exact.mean((0, 2, 3))) / exact.std((0, 2, 3))
    np.testing.assert_allclose(normalizer(other)[0, :, 0, 0], expected, rtol=1e-6)


def test_normalizer_in_chunks_is_exact_for_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CHUNK_VALUES", 50)  # two samples, so that the last chunk is short
    normalizer = data.Normalizer.fit(X_TRAIN[:, np.newaxis])
    np.testing.assert_allclose(normalizer.mean, [X_TRAIN.mean()], rtol=1e-14)
    np.testing.assert_allclose(normalizer.std, [X_TRAIN.std()], rtol=1e-14)


def test_constant_channel_becomes_exactly_zero() -> None:
    x = RNG.normal(size=(1000, 2)).astype(np.float32)
    x[:, 1] = 0.1  # no multiple of a power of two: sums of it round
    normalizer = data.Normalizer.fit(x)
    assert normalizer.std[1] == 1
    assert not normalizer(x)[:, 1].any()


def test_normalizer_survives_a_checkpoint() -> None:
    normalizer = data.Normalizer.fit(X_TRAIN[:, np.newaxis])
    stream = io.BytesIO()
    np.savez(stream, **normalizer.to_dict())
    stream.seek(0)
    restored = data.Normalizer.from_dict(np.load(stream))
    x = X_TEST[:, np.newaxis]
    np.testing.assert_array_equal(restored(x), normalizer(x), strict=True)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"mean": [0.0]}, r"expected keys mean and std, got \['mean'\]"),
        ({"mean": [0.0], "std": [1.0], "eps": [1.0]}, "expected keys"),
        ({"mean": [0.0], "std": [1.0, 1.0]}, r"one shape \(C,\), got \(1,\) and \(2,\)"),
        ({"mean": [np.nan], "std": [1.0]}, "finite"),
        ({"mean": [0.0], "std": [0.0]}, "std must be positive, got 0.0"),
    ],
)
def test_unusable_normalizer_is_named(arrays: dict[str, list[float]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        data.Normalizer.from_dict(arrays)


def test_normalizer_rejects_other_channel_counts() -> None:
    normalizer = data.Normalizer.fit(np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"expected shape \(N, 3, \*\), got \(2, 1, 4\)"):
        normalizer(np.ones((2, 1, 4)))
    with pytest.raises(ValueError, match=r"non-empty \(N, C, \*\), got \(0, 3\)"):
        data.Normalizer.fit(np.ones((0, 3)))


# Augment

IMAGES = RNG.normal(size=(64, 2, 6, 5)).astype(np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_flip_mirrors_about_half_of_the_images() -> None:
    flipped = data.Augment(flip=True)(IMAGES, rng())
    mirrored = (flipped == IMAGES[..., ::-1]).all((1, 2, 3))
    unchanged = (flipped == IMAGES).all((1, 2, 3))
    assert (mirrored ^ unchanged).all()
    assert 16 < mirrored.sum() < 48


def test_crop_shifts_each_image_and_pads_with_zeros() -> None:
    crop = 2
    cropped = data.Augment(crop=crop)(IMAGES, rng())
    assert cropped.shape == IMAGES.shape
    assert cropped.dtype == np.float32
    seen = set()
    for image, original in zip(cropped, IMAGES, strict=True):
        padded = np.zeros((2, 6 + 2 * crop, 5 + 2 * crop), np.float32)
        padded[:, crop:-crop, crop:-crop] = original
        places = [(top, left) for top in range(2 * crop + 1) for left in range(2 * crop + 1)]
        found = [(t, lf) for t, lf in places if (padded[:, t : t + 6, lf : lf + 5] == image).all()]
        assert len(found) == 1
        seen.add(found[0])
    # 64 draws from 25 places; both ends of both directions are reached.
    assert len(seen) > 15
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(2 * crop + 1))


def test_augment_follows_from_the_generator_and_keeps_its_input() -> None:
    augment = data.Augment(crop=1, flip=True)
    before = IMAGES.copy()
    first, again, other = augment(IMAGES, rng(1)), augment(IMAGES, rng(1)), augment(IMAGES, rng(2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(IMAGES, before)


def test_augment_without_anything_to_do_is_the_identity() -> None:
    np.testing.assert_array_equal(data.Augment()(IMAGES, rng()), IMAGES)


def test_augment_names_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\), got shape \(4, 64\)"):
        data.Augment(flip=True)(np.ones((4, 64)), rng())
    with pytest.raises(ValueError, match="crop: expected 0 or more, got -1"):
        data.Augment(crop=-1)


# batches


def sample_ids(n: int, batch_size: int, **options: Any) -> list[list[int]]:
    """Batches of samples whose label and only feature are the sample's number."""
    ids = np.arange(n)
    result = []
    for x, y in data.batches(ids[:, np.newaxis], ids, batch_size, **options):
        np.testing.assert_array_equal(x[:, 0], y)  # x and y stay together
        assert x.dtype == np.float32
        result.append(y.tolist())
    return result


@pytest.mark.parametrize(
    ("n", "batch_size", "last_batch", "sizes"),
    [
        (9, 4, "merge", [4, 5]),
        (9, 4, "keep", [4, 4, 1]),
        (9, 4, "drop", [4, 4]),
        (10, 4, "merge", [4, 4, 2]),
        (10, 4, "drop", [4, 4]),
        (8, 4, "merge", [4, 4]),
        (3, 4, "merge", [3]),
        (1, 4, "merge", [1]),
        (3, 1, "merge", [1, 1, 1]),
        (4, 3, "merge", [4]),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_cover_the_data_once(
    n: int, batch_size: int, last_batch: Any, sizes: list[int], shuffle: bool
) -> None:
    result = sample_ids(n, batch_size, last_batch=last_batch, shuffle=shuffle)
    assert [len(batch) for batch in result] == sizes
    assert data.num_batches(n, batch_size, last_batch) == len(sizes)
    flat = [number for batch in result for number in batch]
    assert len(set(flat)) == len(flat)
    if not shuffle:
        assert flat == list(range(sum(sizes)))
    elif last_batch != "drop":
        assert sorted(flat) == list(range(n))


def test_order_follows_from_seed_and_epoch() -> None:
    orders = {}
    for seed in (0, 1, 2**32):
        for epoch in (0, 1):
            order = sample_ids(50, 8, shuffle=True, seed=seed, epoch=epoch)
            assert order == sample_ids(50, 8, shuffle=True, seed=seed, epoch=epoch)
            orders[seed, epoch] = str(order)
    assert len(set(orders.values())) == 6


def test_augmented_batches_are_reproducible_and_differ_between_epochs() -> None:
    def epoch(number: int) -> list[np.ndarray]:
        options = {"shuffle": True, "seed": 3, "augment": data.Augment(crop=1, flip=True)}
        return [x for x, _ in data.batches(IMAGES, np.arange(64), 10, epoch=number, **options)]

    for first, again in zip(epoch(5), epoch(5), strict=True):
        np.testing.assert_array_equal(first, again)
    assert any((a != b).any() for a, b in zip(epoch(5), epoch(6), strict=True))


def test_batches_normalise_before_they_augment() -> None:
    """Padding is the mean, so a constant image stays constant wherever it is cropped."""
    x = np.full((8, 1, 4, 4), 100, np.uint8)
    y = np.zeros(8, np.int64)
    normalizer = data.Normalizer(np.array([100.0]), np.array([50.0]))
    for batch, _ in data.batches(x, y, 4, normalizer=normalizer, augment=data.Augment(crop=2)):
        assert not batch.any()
    [(scaled, _)] = data.batches(x * 2, y, 8, normalizer=normalizer)
    np.testing.assert_array_equal(scaled, np.full(x.shape, 2, np.float32), strict=True)
    [(raw, _)] = data.batches(x, y, 8)
    np.testing.assert_array_equal(raw, x.astype(np.float32), strict=True)


def test_a_batch_may_be_changed_without_changing_the_data() -> None:
    images, labels = IMAGES.copy(), np.arange(64)
    for x, y in data.batches(images, labels, 64, augment=data.Augment(flip=True)):
        assert x.flags.c_contiguous
        x[:], y[:] = 0, 0
    for x, y in data.batches(images, labels, 64):
        x[:], y[:] = 0, 0
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, np.arange(64))


@pytest.mark.parametrize(
    ("n_labels", "batch_size", "last_batch", "reason"),
    [
        (5, 2, "merge", "batches: y: expected 6 labels, one per sample, got 5"),
        (6, 0, "merge", "batches: batch_size: expected 1 or more, got 0"),
        (6, 2, "wrap", "batches: last_batch: expected .* got 'wrap'"),
        (6, 7, "drop", "batches: expected one batch or more, got none of 6 samples with batch_si"),
    ],
)
def test_unusable_arguments_are_named_at_the_call(
    n_labels: int, batch_size: int, last_batch: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        data.batches(np.ones((6, 1)), np.ones(n_labels), batch_size, last_batch=last_batch)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"seed": -1}, ValueError, "batches: seed: expected 0 or more, got -1"),
        ({"epoch": -1}, ValueError, "batches: epoch: expected 0 or more, got -1"),
        ({"batch_size": 2.5}, TypeError, "batches: batch_size: expected an integer, got 2.5"),
    ],
)
def test_numbers_are_checked_at_the_call(
    options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        data.batches(np.ones((6, 1)), np.ones(6), **{"batch_size": 2, **options})


def test_lists_will_do() -> None:
    normalizer = data.Normalizer([1.0], [2.0])
    ((x, y),) = data.batches([[1.0], [3.0]], [0, 1], 2, normalizer=normalizer)
    np.testing.assert_array_equal(x, [[0], [1]])
    np.testing.assert_array_equal(y, [0, 1])


def test_number_of_batches_names_itself() -> None:
    with pytest.raises(ValueError, match="num_batches: batch_size: expected 1 or more, got 0"):
        data.num_batches(6, 0)
