"""Checkpoints: named arrays and a JSON document in one safetensors file, written atomically."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bnext import _extras
from bnext.nn import _check
from bnext.nn.module import Array

__all__ = ["CheckpointError", "load", "save", "write_atomically"]

_VERSION = 1
"""Of the layout below; raised when an older bnext could no longer read what is written."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, not one of ours, or does not fit the model."""


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the file at `path` by `content`, or leave it as it was.

    Whenever the process or the machine dies, `path` holds either the old or the new
    content, never a part. A leftover ``<path>.tmp`` is harmless: the next write to `path`
    replaces it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    # The new name is safe only once the folder is; Windows cannot open folders.
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _checksum(arrays: Mapping[str, Array], document: str) -> str:
    """CRC-32 over all that is stored; the safetensors format itself has no checksum."""
    crc = zlib.crc32(document.encode())
    for key in sorted(arrays):
        array = arrays[key]
        crc = zlib.crc32(f"{key} {array.dtype.str} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def save(
    path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, Any]
) -> None:
    """Write `arrays` and `metadata` to `path`, atomically (see `write_atomically`).

    Parameters
    ----------
    path : path-like
    arrays : mapping of str to array_like
        Of any shape, 0-dimensional ones included, and any number type safetensors knows.
        "__metadata__" is no key: the format has it.
    metadata : mapping
        Anything `json.dumps` takes.

    Raises
    ------
    ValueError, TypeError
        For keys and dtypes that safetensors has not.
    OSError
        If the file cannot be written; what was at `path` before is still there.
    ImportError
        Without safetensors.
    """
    safetensors = _extras.require("safetensors", "saving a checkpoint")
    safetensors_numpy = _extras.require("safetensors.numpy", "saving a checkpoint")
    if "__metadata__" in arrays:
        raise ValueError("checkpoint.save: arrays: expected other keys than '__metadata__'")
    arrays = {
        key: np.asarray(_check.native("checkpoint.save", repr(key), array), order="C")
        for key, array in arrays.items()
    }
    document = json.dumps(metadata)
    header = {"format": "bnext", "version": str(_VERSION), "document": document}
    try:
        header["crc32"] = _checksum(arrays, document)
        content = safetensors_numpy.save(arrays, metadata=header)
    except (safetensors.SafetensorError, TypeError) as error:
        raise TypeError(f"checkpoint.save: arrays: {error}") from error
    write_atomically(path, content)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read the arrays and the metadata that `save` wrote to `path`; nothing is unpickled.

    Raises
    ------
    CheckpointError
        If there is no file, or it is truncated, corrupt, not written by `save`, or in a
        newer format.
    ImportError
        Without safetensors.
    """
    safetensors = _extras.require("safetensors", "reading a checkpoint")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            _check_format(path, header)
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    # AttributeError, TypeError: a damaged dtype that safetensors knows and NumPy does not.
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated, corrupt or no checkpoint ({error})") from error
    document = header.get("document")
    if document is None or _checksum(arrays, document) != header.get("crc32"):
        raise CheckpointError(f"{path}: corrupt: the content does not match its checksum")
    return arrays, json.loads(document)


def _check_format(path: Path, header: Mapping[str, str]) -> None:
    if header.get("format") != "bnext":
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of bnext")
    version = header.get("version", "")
    if not version.isdecimal() or not 1 <= int(version) <= _VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version or 'unknown'}; "
            f"this version of bnext reads up to format {_VERSION}"
        )
