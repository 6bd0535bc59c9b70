"""Runs experiments: in processes, each run once, results kept as they come."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

import bnext
from bnext import _core, _extras
from bnext import data as datasets
from bnext.data import Dataset
from bnext.study import experiments
from bnext.study.experiment import Arm, Experiment, Results, Scale, Settings

__all__ = ["Record", "RunError", "code_version", "execute", "results"]

Record = dict[str, Any]
"""One finished run: key, experiment, arm, seed, settings, data, version, metrics, seconds."""

# What a run does not depend on: it may change without making finished runs worthless.
_NOT_IN_RUNS = (
    "__main__.py",
    "_extras.py",
    "checkpoint.py",
    "cli.py",
    "train.py",
    "study/__init__.py",
    "study/anchors.py",
    "study/claims.py",
    "study/command.py",
    "study/plots.py",
    "study/report.py",
    "study/runner.py",
    "study/statistics.py",
)
# Parts of an experiment's file that judge and draw, or that say what runs there are.
_NOT_OF_A_RUN = {"arms", "contrasts", "plot", "EXPERIMENT"}


class RunError(RuntimeError):
    """A run failed; the message says which and why."""


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    key: str
    experiment: str
    arm: str
    seed: int
    settings: Settings


# -- what a run depends on ---------------------------------------------------------------
def _meaning(path: Path, without: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """The code of a file, whatever its comments, docstrings and layout."""
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [node for node in tree.body if not _names(node) & without]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


@cache
def code_version(experiment: str) -> str:
    """A digest of all code that decides the results of the runs of an experiment.

    The compiled core, the layers and what trains them, the parts that experiments share, and the
    experiment's own file without what judges and draws. Comments and layout do not count.
    """
    package = Path(bnext.__file__).parent
    folders = [package, package / "nn", package / "study"]
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    sha = hashlib.sha256(Path(_core.__file__).read_bytes())
    for path in files:
        name = path.relative_to(package).as_posix()
        if name not in _NOT_IN_RUNS:
            without = {"judge", "combined", "LEVEL"} if name == "study/experiment.py" else set()
            sha.update(f"{name}\n{_meaning(path, without)}\n".encode())
    own = experiments.module_of(experiments.registry()[experiment])
    spec = importlib.util.find_spec(own)
    assert spec is not None
    assert spec.origin is not None
    sha.update(_meaning(Path(spec.origin), _NOT_OF_A_RUN).encode())
    return sha.hexdigest()[:16]


def jobs(
    chosen: Sequence[Experiment], scale: Scale, seeds: Sequence[int], digest: str
) -> list[Job]:
    """All runs, seed by seed: whenever it stops, there are all arms of the first seeds."""
    return [
        Job(_key(experiment.name, settings, seed, digest), experiment.name, arm, seed, settings)
        for seed in seeds
        for experiment in chosen
        for arm, settings in experiment.arms(scale).items()
    ]


def _key(experiment: str, settings: Settings, seed: int, digest: str) -> str:
    identity = [experiment, dict(settings), seed, digest, code_version(experiment)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


# -- kept results ------------------------------------------------------------------------
class Store:
    """Finished runs, one JSON object a line. A line that a kill cut short is no run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        text = path.read_bytes() if path.exists() else b""
        for line in text.split(b"\n"):
            try:
                record = json.loads(line)
                self.records.setdefault(record["key"], record)
            except (ValueError, TypeError, KeyError):
                continue
        self._torn = bool(text) and not text.endswith(b"\n")

    def add(self, record: Record) -> None:
        """Append to the file at once."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + line if self._torn else line)
        self._torn = False
        self.records[record["key"]] = record


# -- the processes -----------------------------------------------------------------------
_dataset: Dataset | None = None

_ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    )
}


def _start_worker(spec: str, digest: str) -> None:
    global _dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    bnext.set_num_threads(1)
    _dataset = datasets.load(spec)
    if _dataset.digest != digest:
        raise RunError(f"{spec} has changed since the study began")
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    """A parent that is killed tells nobody; its workers would wait for work forever."""
    wait([sentinel])
    os._exit(1)


def _work(job: Job) -> tuple[dict[str, Any], float]:
    assert _dataset is not None
    return measure(job, _dataset)


def measure(job: Job, dataset: Dataset) -> tuple[dict[str, Any], float]:
    """Do one run; metrics and the processor time it took."""
    started = time.process_time()
    experiment = experiments.registry()[job.experiment]
    metrics = experiment.run(job.settings, dataset, job.seed)
    found = {name: _plain(value) for name, value in metrics.items()}
    return found, time.process_time() - started


def _plain(value: Any) -> Any:
    """For JSON; what is not finite is no value."""
    if isinstance(value, Sequence | np.ndarray):
        return [_plain(item) for item in value]
    if value is None or not math.isfinite(value):
        return None
    return float(value)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Processes started inside see these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def execute(
    chosen: Sequence[Experiment],
    dataset: Dataset,
    scale: Scale,
    *,
    seeds: int,
    out: Path,
    processes: int | None = None,
    progress: bool | None = None,
    log: Callable[[str], object] = print,
) -> list[Record]:
    """Do all runs that are not yet in ``out/runs.jsonl``; return all that belong to the study.

    Runs of other code, data or settings stay in the file and are not returned.

    Raises
    ------
    RunError
        If a run fails. Those finished are kept.
    KeyboardInterrupt
        Likewise.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / "runs.jsonl")
    wanted = jobs(chosen, scale, range(seeds), dataset.digest)
    left = [job for job in wanted if job.key not in store.records]
    log(
        f"{dataset.name}: {len(wanted)} runs of {len(chosen)} experiments, {seeds} seeds; "
        f"{len(wanted) - len(left)} are done already"
    )
    processes = min(processes or os.cpu_count() or 1, max(1, len(left)))
    if left:
        with _bar(len(left), progress) as bar, closing(_all(left, dataset, processes)) as done:
            for job, (metrics, seconds) in done:
                store.add(
                    {
                        "key": job.key,
                        "experiment": job.experiment,
                        "arm": job.arm,
                        "seed": job.seed,
                        "settings": dict(job.settings),
                        "data": dataset.digest,
                        "version": code_version(job.experiment),
                        "metrics": metrics,
                        "seconds": round(seconds, 4),
                    }
                )
                if bar is not None:
                    bar.set_postfix_str(job.experiment, refresh=False)
                    bar.update()
    return [store.records[job.key] for job in wanted]


def _all(
    left: Sequence[Job], dataset: Dataset, processes: int
) -> Generator[tuple[Job, tuple[dict[str, Any], float]], None, None]:
    # "spawn" everywhere: a child by fork inherits locks of threads that it has not.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with _environment(_ONE_THREAD):
        pool = ProcessPoolExecutor(
            processes, context, initializer=_start_worker, initargs=(dataset.name, dataset.digest)
        )
        try:
            futures: dict[Future[tuple[dict[str, Any], float]], Job] = {
                pool.submit(_work, job): job for job in left
            }
            for future in as_completed(futures):
                job = futures[future]
                try:
                    found = future.result()
                except Exception as error:
                    raise RunError(
                        f"{job.experiment}, {job.arm}, seed {job.seed}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                yield job, found
        except BaseException:
            # Ctrl-C or a failed run: what is under way would only be waited for.
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _bar(total: int, progress: bool | None) -> Any:
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return nullcontext()
    tqdm = _extras.require("tqdm", "the progress bar", extra="study")
    # Runs differ in length, so the estimate is of the average over all so far.
    return tqdm.tqdm(total=total, unit="run", smoothing=0)


def results(experiment: Experiment, records: Sequence[Record], scale: Scale) -> Results:
    """The records of an experiment, by arm and in the order of the seeds."""
    own = [record for record in records if record["experiment"] == experiment.name]
    seeds = sorted({record["seed"] for record in own})
    by_run = {(record["arm"], record["seed"]): record["metrics"] for record in own}
    return Results(
        (
            Arm(label, settings, [by_run[label, seed] for seed in seeds])
            for label, settings in experiment.arms(scale).items()
        ),
        seeds,
    )
