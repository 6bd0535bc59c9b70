"""Matrix products on bnext's threads: each thread works on its own piece with serial BLAS.

NumPy's BLAS has threads of its own, which would compete with ours for the processors; they are
held to one while ours run, if threadpoolctl is installed.
"""

from __future__ import annotations

import contextvars
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bnext import _core
from bnext.nn.module import Array

# Fewer multiplications than this are not worth a thread.
_PIECE = 4_000_000
# More pieces balance no better on the usual number of threads, and each has a gradient to sum.
_MAX_PIECES = 8
# Bytes up to which a workspace keeps an array.
_KEPT = 1 << 24


class Workspace:
    """Memory that one task has to itself, and a later one uses again."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def __call__(self, slot: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialized array, in the same memory for each call with this `slot`."""
        size = math.prod(shape) * dtype.itemsize
        if size > _KEPT:
            return np.empty(shape, dtype)
        if slot not in self._kept or self._kept[slot].size < size:
            self._kept[slot] = np.empty(size, np.uint8)
        return self._kept[slot][:size].view(dtype).reshape(shape)


# Those not in use: no more of them than there ever were threads at work at once.
_workspaces: list[Workspace] = []


def pieces(count: int, work: int) -> list[range]:
    """Split `count` items with `work` multiplications in all into ranges.

    They follow from the arguments alone, so that sums over them do not depend on the number
    of threads.
    """
    parts = max(1, min(count, work // _PIECE, _MAX_PIECES))
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def run(task: Callable[[int, range, Workspace], None], parts: list[range]) -> None:
    """Call ``task(i, parts[i], workspace)`` for each `i`, on up to `get_num_threads()` threads."""
    # Each thread sees the caller's context, in which NumPy keeps what `np.errstate` sets.
    contexts = [contextvars.copy_context() for _ in parts]

    def call(i: int) -> None:
        try:
            workspace = _workspaces.pop()
        except IndexError:
            workspace = Workspace()
        try:
            contexts[i].run(task, i, parts[i], workspace)
        finally:
            _workspaces.append(workspace)

    with serial():
        _core.run_tasks(call, len(parts))


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` for two matrices, the rows of `a` shared among the threads."""
    out = np.empty((len(a), b.shape[1]), a.dtype)

    def task(_: int, rows: range, workspace: Workspace) -> None:
        part = slice(rows.start, rows.stop)
        np.matmul(a[part], b, out=out[part])

    run(task, pieces(len(a), a.size * b.shape[1]))
    return out


def add(a: Array, b: Array) -> Array:
    """``a + b`` for two arrays of one shape, the first axis shared among the threads."""
    out = np.empty(a.shape, np.result_type(a, b))

    def task(_: int, rows: range, workspace: Workspace) -> None:
        part = slice(rows.start, rows.stop)
        np.add(a[part], b[part], out=out[part])

    # An addition costs memory traffic rather than arithmetic.
    run(task, pieces(len(a), 16 * a.size))
    return out


# -- threads of BLAS -------------------------------------------------------------------
class _BlasLimit:
    """How many calls want serial BLAS, and how to end that."""

    controller: Any = None
    users = 0
    limiter: Any = None


_lock = threading.Lock()
_limit = _BlasLimit()


@contextmanager
def serial() -> Iterator[None]:
    """Hold NumPy's BLAS to one thread while any thread is in here.

    After a product of its own threads those spin for tens of milliseconds, and ours wait for a
    processor.
    """
    with _lock:
        if _limit.users == 0:
            if _limit.controller is None:
                _limit.controller = _find_blas()
            _limit.limiter = _limit.controller.limit(limits=1) if _limit.controller else None
        _limit.users += 1
    try:
        yield
    finally:
        with _lock:
            _limit.users -= 1
            if _limit.users == 0 and _limit.limiter is not None:
                _limit.limiter.restore_original_limits()


def _find_blas() -> Any:
    """threadpoolctl's handle on the BLAS libraries loaded, or False without threadpoolctl."""
    try:
        import threadpoolctl
    except ImportError:
        return False
    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def _forget_other_threads() -> None:
    """A child of fork does not have them; one may have held the lock."""
    global _lock
    _lock = threading.Lock()
    _limit.users = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
