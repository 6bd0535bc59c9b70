"""Matrix products on bnext's threads: each thread works on its own piece with serial BLAS.

NumPy's BLAS has threads of its own, which would compete with ours for the cores; they are held
to one while ours run, if threadpoolctl is installed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np

from bnext._core import get_num_threads
from bnext.nn.module import Array

# Below this many multiplications a piece of work is not worth handing to a thread.
PIECE = 4_000_000
# More pieces than this balance no better, and a gradient is kept for each.
MAX_PIECES = 16


def pieces(count: int, work: int) -> list[range]:
    """Split `count` items with `work` multiplications in all into ranges.

    They follow from the arguments alone, so that sums over them do not depend on the number
    of threads.
    """
    parts = max(1, min(count, work // PIECE, MAX_PIECES))
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def run(task: Callable[[int, range], None], parts: list[range]) -> None:
    """Call ``task(i, parts[i])`` for each `i`, on up to `get_num_threads()` threads."""
    pending = list(enumerate(parts))

    def work() -> None:
        while True:
            try:
                item = pending.pop()
            except IndexError:
                return
            task(*item)

    helpers = min(get_num_threads(), len(parts)) - 1
    with _serial_blas():
        if helpers < 1:
            work()
            return
        futures = [_executor(helpers).submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            pending.clear()
            wait(futures)
        for future in futures:
            future.result()


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` for two matrices, the rows of `a` shared among the threads."""
    out = np.empty((len(a), b.shape[1]), a.dtype)

    def task(_: int, rows: range) -> None:
        part = slice(rows.start, rows.stop)
        np.matmul(a[part], b, out=out[part])

    run(task, pieces(len(a), a.size * b.shape[1]))
    return out


_local = threading.local()


def workspace(slot: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Uninitialised memory of this thread, the same for each call with this `slot`."""
    size = int(np.prod(shape)) * dtype.itemsize
    kept: dict[str, Array] = _local.__dict__
    if slot not in kept or kept[slot].size < size:
        kept[slot] = np.empty(size, np.uint8)
    return kept[slot][:size].view(dtype).reshape(shape)


# -- threads ---------------------------------------------------------------------------
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _executor(size: int) -> ThreadPoolExecutor:
    """A pool of at least `size` threads."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            # One that another thread is still using ends when it is no longer referenced.
            _pool = ThreadPoolExecutor(size, thread_name_prefix="bnext")
            _pool_size = size
        return _pool


class _BlasLimit:
    """How many calls want serial BLAS, and how to end that."""

    controller: Any = None
    users = 0
    limiter: Any = None


_limit = _BlasLimit()


@contextmanager
def _serial_blas() -> Iterator[None]:
    """Hold NumPy's BLAS to one thread while any thread is in here."""
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


def _forget_threads() -> None:
    """A child of fork has neither our threads nor the right to our locks."""
    global _lock, _pool, _pool_size
    _lock = threading.Lock()
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
