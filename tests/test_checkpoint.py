"""Checkpoint files: what comes back, what is refused, and what survives a crash."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bnext import checkpoint
from bnext.checkpoint import CheckpointError

safetensors = pytest.importorskip("safetensors.numpy", reason="pip install bnext[train]")

DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", ">f4", ">i8"]
METADATA = {"number": 0.1, "list": [1, None, True], "text": 'ü "quoted" \n', "empty": {}}


def sample():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.normal(size=(3, 4)).astype(np.float32),
        "counter": np.array(7, np.int64),
        "empty": np.zeros((0, 5), np.float16),
        "flags": np.array([True, False]),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.fixture
def content(path):
    checkpoint.save(path, sample(), METADATA)
    return path.read_bytes()


def assert_holds(path, arrays, metadata):
    loaded, loaded_metadata = checkpoint.load(path)
    assert loaded_metadata == metadata
    assert loaded.keys() == arrays.keys()
    for key, array in arrays.items():
        native = array.astype(array.dtype.newbyteorder("="))
        np.testing.assert_array_equal(loaded[key], native, err_msg=key, strict=True)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 0, 2), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(path, dtype, shape):
    array = np.asarray(np.random.default_rng(0).integers(0, 128, size=shape)).astype(dtype)
    checkpoint.save(path, {"a": array}, METADATA)
    assert_holds(path, {"a": array}, METADATA)


def test_layouts_and_names(path):
    block = np.arange(24.0).reshape(2, 3, 4)
    arrays = {
        "fortran": np.asfortranarray(block),
        "transposed": block.T,
        "strided": block[:, ::2, 1:3],
        "backwards": block[::-1],
        "repeated": np.broadcast_to(np.float32(2), (3, 2)),
        "special": np.array([np.nan, np.inf, -0.0, 5e-324]),
        "a/b.c ü": block,
        "": block[0],
    }
    checkpoint.save(str(path), arrays, {})
    assert_holds(path, arrays, {})
    assert np.signbit(checkpoint.load(path)[0]["special"][2])


def test_nothing_to_keep(path):
    checkpoint.save(path, {}, {})
    assert_holds(path, {}, {})


def test_what_is_loaded_may_be_changed(path, content):
    arrays, _ = checkpoint.load(path)
    arrays["matrix"] += 1
    assert_holds(path, sample(), METADATA)


def test_the_file_is_plain_safetensors(path, content):
    np.testing.assert_array_equal(safetensors.load_file(path)["matrix"], sample()["matrix"])


# Damaged files


def assert_refused(path, content, message=None):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as info:
        checkpoint.load(path)
    assert str(info.value).startswith(f"{path}: ")


def test_truncated_anywhere(path, content):
    for length in range(len(content)):
        assert_refused(path, content[:length], "corrupt")


@pytest.mark.parametrize("mask", [0x01, 0x10, 0x80, 0xFF])
def test_one_byte_changed_anywhere(path, content, mask):
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= mask
        assert_refused(path, changed)


def test_bytes_added_or_doubled(path, content):
    for extra in (b"\0", b"\n", content):
        assert_refused(path, content + extra, "corrupt")


def rewritten(arrays, **changes):
    """A file whose header says something else than `checkpoint.save` would."""
    header = {"format": "bnext", "version": "1", "crc32": "00000000", "document": "{}"}
    header = {key: value for key, value in {**header, **changes}.items() if value is not None}
    return safetensors.save(arrays, metadata=header)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "corrupt or no checkpoint"),
        (b"\0" * 100, "corrupt or no checkpoint"),
        (b"\xff" * 100, "corrupt or no checkpoint"),
        (b"PK\x03\x04" + b"\0" * 100, "corrupt or no checkpoint"),
        (json.dumps(METADATA).encode(), "corrupt or no checkpoint"),
        (safetensors.save({"a": np.ones(3)}), "a safetensors file, but not a checkpoint of bnext"),
        (rewritten({}, format="other"), "a safetensors file, but not a checkpoint of bnext"),
        (rewritten({}, format=None), "a safetensors file, but not a checkpoint of bnext"),
        (rewritten({}, version="2"), "checkpoint format 2; this version .* up to format 1"),
        (rewritten({}, version="10"), "checkpoint format 10; this version .* up to format 1"),
        (rewritten({}, version="0"), "checkpoint format 0; this version .* up to format 1"),
        (rewritten({}, version="one"), "checkpoint format one; this version"),
        (rewritten({}, version=None), "checkpoint format unknown; this version"),
        (rewritten({}, crc32=None), "corrupt: the content does not match its checksum"),
        (rewritten({}, document=None), "corrupt: the content does not match its checksum"),
        (rewritten({"a": np.ones(3)}), "corrupt: the content does not match its checksum"),
    ],
    ids=lambda value: "file" if isinstance(value, bytes) else value[:30],
)
def test_files_of_another_kind(path, content, message):
    assert_refused(path, content, message)


def test_the_checksum_covers_values_names_dtypes_shapes_and_metadata(path):
    """Each of these files is a valid safetensors file with the checksum of another content."""
    array = np.arange(6, dtype=np.int32)
    checkpoint.save(path, {"a": array}, {})
    with safetensors.safe_open(path, framework="numpy") as file:
        header = file.metadata()
    for arrays, changes in (
        ({"a": array[::-1].copy()}, {}),
        ({"b": array}, {}),
        ({"a": array.view(np.uint32)}, {}),
        ({"a": array.reshape(2, 3)}, {}),
        ({}, {}),
        ({"a": array}, {"document": '{"x": 1}'}),
    ):
        assert_refused(path, safetensors.save(arrays, {**header, **changes}), "its checksum")
    path.write_bytes(safetensors.save({"a": array}, header))
    assert_holds(path, {"a": array}, {})


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "F33"])
def test_dtypes_that_numpy_may_not_know(path, dtype):
    header = {
        "__metadata__": {"format": "bnext", "version": "1", "crc32": "00000000", "document": "{}"},
        "a": {"dtype": dtype, "shape": [8], "data_offsets": [0, 16]},
    }
    for size in (4, 8, 16, 64):
        header["a"]["data_offsets"][1] = size
        text = json.dumps(header).encode()
        assert_refused(path, len(text).to_bytes(8, "little") + text + bytes(size), "corrupt")


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(path):
    assert_refused(path, pickle.dumps(_Trap()))
    np.savez(path.with_suffix(".npz"), a=np.array([_Trap()], object))
    assert_refused(path, path.with_suffix(".npz").read_bytes())
    with pytest.raises(TypeError):
        checkpoint.save(path, {"a": np.array([_Trap()], object)}, {})


@pytest.mark.parametrize("name", ["missing.safetensors", "folder", "folder/missing", "."])
def test_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("call", [lambda p: checkpoint.save(p, {}, {}), checkpoint.load])
def test_without_safetensors_the_extra_is_named(monkeypatch, path, content, call):
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'a checkpoint needs safetensors: .*"bnext\[train\]"'):
        call(path)
    assert path.read_bytes() == content


# Writing


def files(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_save_replaces(path, content):
    arrays = {"other": np.ones(3)}
    checkpoint.save(path, arrays, {})
    assert_holds(path, arrays, {})
    assert files(path.parent) == [path.name]


def test_a_leftover_of_a_crash_does_no_harm(path, content):
    leftover = path.with_name(path.name + ".tmp")
    leftover.write_bytes(b"part")
    assert_holds(path, sample(), METADATA)
    checkpoint.save(path, {}, {})
    assert_holds(path, {}, {})
    assert files(path.parent) == [path.name]


class _FullDisk:
    """A file that takes a few bytes and then no more."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[:10])
        raise self.error


def fail_in(monkeypatch, step, error):
    def fail(*_):
        raise error

    if step == "write":
        monkeypatch.setattr(
            checkpoint, "open", lambda *args: _FullDisk(open(*args), error), raising=False
        )
    else:
        monkeypatch.setattr(checkpoint.os, step, fail)


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file(monkeypatch, path, step, error, existed):
    if existed:
        checkpoint.save(path, sample(), METADATA)
    before = files(path.parent)
    fail_in(monkeypatch, step, error)
    with pytest.raises(type(error)) as info:
        checkpoint.save(path, {"new": np.ones(3)}, {})
    monkeypatch.undo()
    assert info.value is error
    assert files(path.parent) == before
    if existed:
        assert_holds(path, sample(), METADATA)


def test_arrays_or_metadata_that_cannot_be_written_keep_the_old_file(path, content):
    for arrays, metadata, error, message in (
        ({}, {"a": object()}, TypeError, "object is not JSON serializable"),
        *(
            ({"a": bad}, {}, TypeError, "checkpoint.save: arrays: ")
            for bad in (np.zeros(2, "M8[s]"), np.zeros(2, complex), "text", [None])
        ),
        ({"a": [[1], [1, 2]]}, {}, ValueError, "checkpoint.save: 'a': expected an array"),
        ({"__metadata__": np.ones(2)}, {}, ValueError, "arrays: expected other keys than '__meta"),
    ):
        with pytest.raises(error, match=message):
            checkpoint.save(path, arrays, metadata)
        assert path.read_bytes() == content
        assert files(path.parent) == [path.name]


def test_lists_will_do(path):
    checkpoint.save(path, {"a": [1.0, 2.0]}, METADATA)
    assert_holds(path, {"a": np.array([1.0, 2.0])}, METADATA)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "missing" / "a.safetensors", {}, {})
    assert files(tmp_path) == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="permissions of folders do not bind root, and Windows has others",
)
def test_folder_that_is_read_only(path, content):
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            checkpoint.save(path, {}, {})
    finally:
        path.parent.chmod(0o700)
    assert_holds(path, sample(), METADATA)


def test_path_that_is_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a"):
        checkpoint.save(tmp_path / "a", {}, {})
    assert files(tmp_path) == ["a"]


WRITER = """
import itertools, sys, time
import numpy as np
from bnext import checkpoint

class Slow:
    def __init__(self, *args):
        self.file = open(*args)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def __getattr__(self, name):
        return getattr(self.file, name)
    def write(self, content):
        for start in range(0, len(content), 40_000):
            self.file.write(content[start : start + 40_000])
            self.file.flush()
            time.sleep(0.001)

path, slow = sys.argv[1:]
if slow == "True":
    checkpoint.open = Slow
for version in itertools.count():
    arrays = {"a": np.full(100_000, version, np.float32), "b": np.full(7, version)}
    checkpoint.save(path, arrays, {"version": version})
    if version == 0:
        print("ready", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("slow", [False, True])
def test_killed_while_it_writes(path, slow):
    rng = np.random.default_rng()
    versions = []
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(path), str(slow)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.02, 0.3))
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
        arrays, metadata = checkpoint.load(path)
        versions.append(metadata["version"])
        assert (arrays["a"] == versions[-1]).all()
        assert (arrays["b"] == versions[-1]).all()
        assert set(files(path.parent)) <= {path.name, path.name + ".tmp"}
    assert max(versions) > 0, "never killed after the first version"
