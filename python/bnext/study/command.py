"""``bnext study``: the command line."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bnext import _extras
from bnext import data as datasets
from bnext.data import DataError, Dataset
from bnext.study import experiments, report, runner
from bnext.study.experiment import FULL, QUICK, Experiment

__all__ = ["add_options", "main"]

_EXAMPLES = """\
examples:
  bnext study --quick                     all experiments on 8x8 digits, minutes
  bnext study                             the same on Fashion-MNIST if it is there, an hour or two
  bnext study --list                      what there is
  bnext study --quick --only depth        one experiment
  bnext study --data npz:mine.npz         on your own data

A study that was stopped continues when the command is repeated; finished runs are kept in
OUT/runs.jsonl.
"""


def add_options(
    parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]]
) -> None:
    """The options of ``bnext study``; ``whole(least)`` reads whole numbers."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--list", action="store_true", help="show the experiments and end")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="run this experiment only; may be given several times",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small: on digits unless --data says otherwise"
    )
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="see bnext train --help (default: fashion-mnist if it is there, digits otherwise)",
    )
    parser.add_argument(
        "--seeds",
        type=whole(6),
        metavar="N",
        help=f"repetitions, 6 or more (default: {QUICK.seeds} if quick, {FULL.seeds} otherwise)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: study/DATA-SCALE)"
    )
    parser.add_argument(
        "--jobs", type=whole(1), metavar="N", help="processes (default: one for each processor)"
    )
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar (default: on a terminal)",
    )


def main(args: argparse.Namespace) -> int:
    """Run ``bnext study`` with parsed options; return the exit status."""
    known = experiments.registry()
    if args.list:
        width = max(map(len, known))
        for experiment in known.values():
            print(f"{experiment.number:>2}  {experiment.name:<{width}}  {experiment.question}")
        return 0
    chosen = _chosen(args.only, known)
    for module in ("scipy", "matplotlib"):  # now, not after an hour
        _extras.require(module, "bnext study", extra="study")
    scale = QUICK if args.quick else FULL
    dataset = _dataset(args.data, args.quick)
    seeds = args.seeds or scale.seeds
    out = args.out or Path("study") / f"{_file_name(dataset.name)}-{scale.name}"
    started = time.perf_counter()
    try:
        records = runner.execute(
            chosen,
            dataset,
            scale,
            seeds=seeds,
            out=out,
            processes=args.jobs,
            progress=args.progress,
            log=_say,
        )
    except KeyboardInterrupt:
        print(
            f"\nbnext: interrupted; finished runs are kept in {out}: repeat the command to "
            "continue",
            file=sys.stderr,
        )
        return 130
    except runner.RunError as error:
        print(f"bnext: error: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["bnext", "study", *(["--quick"] if args.quick else [])])
    command += f" --data {shlex.quote(dataset.name)} --seeds {seeds}"
    for name in args.only or ():
        command += f" --only {name}"
    found = report.study(chosen, records, dataset, scale, command)
    path = report.write(found, out)
    _say(f"{len(records)} runs in {time.perf_counter() - started:.0f} s; report: {path}")
    return 0


def _chosen(names: list[str] | None, known: dict[str, Experiment]) -> list[Experiment]:
    for name in names or ():
        if name not in known:
            raise ValueError(f"--only: unknown experiment {name!r}; known: {', '.join(known)}")
    return [item for item in known.values() if not names or item.name in names]


def _dataset(spec: str | None, quick: bool) -> Dataset:
    if spec is not None:
        return datasets.load(spec)
    if quick:
        return datasets.load("digits")
    try:
        return datasets.load("fashion-mnist")
    except DataError as error:
        _say(f"{error}; using digits")
        return datasets.load("digits")


def _file_name(spec: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in spec).strip("-")


def _say(line: str) -> None:
    print(line, flush=True)
