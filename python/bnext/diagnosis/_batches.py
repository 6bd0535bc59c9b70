"""The batches that a diagnosis looks at, from whatever the user has."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnext.data import Dataset, Normalizer, num_batches
from bnext.nn import _check


class Batches(NamedTuple):
    """Some batches, and the sizes of all of them.

    Attributes
    ----------
    items : list of (x, y)
        y is a NumPy array, or None without labels.
    batch_size, last : int
        Samples in a batch, and in the last one of an epoch.
    """

    items: list[tuple[Any, Any]]
    batch_size: int
    last: int

    @property
    def samples(self) -> int:
        return sum(len(x) for x, _ in self.items)

    @property
    def probe(self) -> Any:
        """Inputs to look at the network with: 256 at most, and 2 at least."""
        first = self.items[0][0]
        if len(first) > 1:
            return first[:256]
        alike = [x for x, _ in self.items if x.shape[1:] == first.shape[1:]][:256]
        alike = alike if len(alike) > 1 else [first, first]
        join = np.concatenate if isinstance(first, np.ndarray) else sys.modules["torch"].cat
        return join(alike)

    @property
    def labelled(self) -> bool:
        return bool(self.items) and all(y is not None for _, y in self.items)


def sizes(n: int, batch_size: int, last_batch: Any) -> tuple[int, int]:
    """Samples in a batch and in the last one."""
    if n < batch_size:
        return n, n
    count = num_batches(n, batch_size, last_batch)
    last = n - (count - 1) * batch_size
    return batch_size, batch_size if last_batch == "drop" else last


def collect(
    data: Any,
    *,
    batch_size: int | None,
    shuffle: bool,
    last_batch: Any,
    samples: int,
    normalizer: Normalizer | None,
    seed: int,
    where: str = "data",
) -> Batches:
    """Some `samples` samples of `data`, in batches as training has them."""
    if isinstance(data, Dataset):
        x, y = (data.x_test, data.y_test) if where == "validation" else (data.x_train, data.y_train)
    elif _is_array(data):
        x, y = data, None
    elif isinstance(data, tuple) and len(data) == 2 and _is_array(data[0]):
        x, y = data
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | dict):
        return _of_loader(data, batch_size, last_batch, samples, normalizer, where)
    else:
        raise TypeError(
            f"doctor: {where}: expected arrays x or (x, y), a Dataset, or an iterable of batches, "
            f"got {type(data).__name__}"
        )
    n = len(x)
    y = None if y is None else _on_host(y)
    if y is not None and y.shape[:1] != (n,):
        raise ValueError(
            f"doctor: {where}: expected {n} labels, one for each sample, got shape {y.shape}"
        )
    if n < 1:
        raise ValueError(f"doctor: {where}: expected one sample or more, got none")
    batch_size = 64 if batch_size is None else batch_size
    usual, last = sizes(n, batch_size, last_batch)
    order = np.random.default_rng(seed).permutation(n) if shuffle else np.arange(n)
    # The rest of the samples is no batch of training, but tells as much about validation.
    count = -(-n // usual) if where == "validation" else n // usual
    starts = usual * np.arange(count)
    if count * usual > samples:  # from everywhere, should the order mean something
        kept = max(1, samples // usual)
        starts = starts[np.arange(kept) * count // kept]
    items = []
    for start in starts:
        chosen = order[start : start + usual]
        items.append((_prepared(x[chosen], normalizer), None if y is None else y[chosen]))
    return Batches(items, usual, last)


def _of_loader(
    data: Any,
    batch_size: int | None,
    last_batch: Any,
    samples: int,
    normalizer: Normalizer | None,
    where: str,
) -> Batches:
    items: list[tuple[Any, Any]] = []
    seen = 0
    iterator = iter(data)
    for batch in iterator:
        x, y = (
            (batch[0], batch[1])
            if isinstance(batch, tuple | list) and len(batch) > 1
            else (
                batch[0] if isinstance(batch, tuple | list) and batch else batch,
                None,
            )
        )
        if not _is_array(x):
            raise TypeError(
                f"doctor: {where}: expected batches that are arrays, or begin with the input as "
                f"one, got {type(x).__name__}"
            )
        if y is not None and not (_is_array(y) and len(y) == len(x)):
            raise ValueError(f"doctor: {where}: expected labels, one for each of {len(x)} samples")
        items.append((_prepared(x, normalizer), None if y is None else _on_host(y)))
        seen += len(x)
        if seen >= samples:
            break
    if not seen:
        raise ValueError(f"doctor: {where}: expected one batch or more with samples, got none")
    lengths = [len(x) for x, _ in items]
    whole = seen < samples or not any(True for _ in itertools.islice(iterator, 1))
    size = getattr(data, "batch_size", None) or batch_size or max(lengths)
    total = None
    if hasattr(data, "dataset") and hasattr(data.dataset, "__len__"):
        total = len(data.dataset)
    if total and isinstance(size, int):
        if hasattr(data, "drop_last"):
            last_batch = "drop" if data.drop_last else "keep"
        return Batches(items, *sizes(total, size, last_batch))
    return Batches(items, max(lengths), lengths[-1] if whole else max(lengths))


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and value.dim() > 0


def _prepared(x: Any, normalizer: Normalizer | None) -> Any:
    return x if normalizer is None else normalizer(_on_host(x))


def _on_host(value: Any) -> NDArray[Any]:
    """An array, tensor on any device, or list, as an array of NumPy."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def whole(name: str, value: Any, least: int) -> int:
    return _check.integer("doctor", name, value, least)
