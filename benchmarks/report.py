"""Summarise what the benchmarks wrote, as the tables and the picture of docs/performance.md.

    python benchmarks/report.py cpp.json ops.json --write docs/performance.md --plot speed.png

The first file is of bnext_bench, the second of ops.py, both of float32 and with --fused. --variants
adds files of bnext_bench with other options (--channels-last, --threads 1, another BNEXT_BACKEND),
--dtypes files of bnext_bench and --dtype-ops files of ops.py with another --dtype. Tables replace
what stands between the markers ``<!-- NAME -->`` and ``<!-- end -->`` of the page; those that these
files do not tell of stay as they are. Without --write they are printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
from collections.abc import Callable

OPS = ("forward", "backward", "inference", "dropout")
# What follows an operation's name; a number is a probability of dropout other than 0.5.
FUSIONS = ("0.1", "relu", "relu dropout", "relu dropout 0.1", "residual relu")
LIMIT = "limit"
PASSES = "two passes"

# For each (operation, case) the seconds of each contender, and the bytes that have to move.
Table = dict[tuple[str, str], dict[str, float]]


def load(path: str) -> tuple[dict, Table]:
    """Facts of the run, and its times.

    The fastest of those that only move the bytes is the contender "limit", of those that also make
    the sums that training needs, "two passes". What is fused with an operation has the limits of
    that if it moves no more.
    """
    facts = json.loads(pathlib.Path(path).read_text())
    table: Table = {}
    for row in facts.pop("rows"):
        times = table.setdefault((row["op"], row["case"]), {})
        name = row["contender"]
        name = next((group for group in (LIMIT, PASSES) if name.startswith(group)), name)
        times[name] = min(row["seconds"], times.get(name, float("inf")))
        if "bytes" in row:
            times["bytes"] = row["bytes"]
    for (op, case), times in table.items():
        alone = table[op.split()[0], case]
        if times.get("bytes") == alone.get("bytes"):
            for name in (LIMIT, PASSES):
                if name in alone:
                    times.setdefault(name, alone[name])
    return facts, table


def operations(*tables: Table) -> list[str]:
    """What was timed, each operation alone and then what was fused with it."""
    found = {op for table in tables for op, _ in table}
    return [op for kind in OPS for op in (kind, *(f"{kind} {f}" for f in FUSIONS)) if op in found]


def ratios(
    table: Table, op: str, above: Callable[[str, dict], float | None], below: str = "bnext"
) -> dict[str, float]:
    """above(case, times) / times[below] of each case for which there is one."""
    found = {case: (above(case, t), t[below]) for (o, case), t in table.items() if o == op}
    return {case: a / b for case, (a, b) in found.items() if a is not None}


def of(name: str) -> Callable[[str, dict], float | None]:
    return lambda case, times: times.get(name)


def best_onednn(case: str, times: dict) -> float | None:
    return min((s for name, s in times.items() if "onednn" in name), default=None)


def where(facts: dict, table: Table, beyond: bool) -> Table:
    """The part of a table in which the arrays of the operation alone exceed the caches, or do not.

    So what is fused with it, which may move more, is of the same shapes.
    """
    return {
        (op, case): times
        for (op, case), times in table.items()
        if (table[op.split()[0], case]["bytes"] > facts["cache_bytes"]) == beyond
    }


def summary(values: dict[str, float], worst=min) -> str:
    """Geometric mean, and the worst with its name."""
    if not values:
        return "-"
    case = worst(values, key=values.__getitem__)
    return f"{statistics.geometric_mean(values.values()):.2f} ({values[case]:.2f}, {case})"


def lines_of(titles: list[str], rows: dict[str, list[str]]) -> list[str]:
    """A table in Markdown; none without rows."""
    if not rows:
        return []
    head = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    return head + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


# What a column is of: its title, and what `ratios` needs.
Column = tuple[str, Table, Callable[[str, dict], float | None]]


def ratio_lines(ops: list[str], columns: list[Column]) -> list[str]:
    """A table of contenders' times in units of ours, a row for each operation."""
    rows = {op: [summary(ratios(table, op, above)) for _, table, above in columns] for op in ops}
    return lines_of([title for title, _, _ in columns], rows)


def speed_table(facts: dict, table: Table, beyond: bool) -> list[str]:
    part = where(facts, table, beyond)
    columns: list[Column] = [
        ("share of the streaming limit", part, of(LIMIT)),
        ("share of two passes", part, of(PASSES)),
        ("oneDNN nchw / ours", part, of("onednn nchw")),
        ("oneDNN, best layout / ours", part, best_onednn),
    ]
    return ratio_lines(list(OPS), columns)


def variant_table(files: list[str]) -> list[str]:
    """For other options: share of the limit and best of oneDNN's layouts, beyond caches, within."""
    rows = {}
    for path in files:
        facts, table = load(path)
        parts = [where(facts, table, beyond) for beyond in (True, False)]

        def both(
            op: str, above: Callable[[str, dict], float | None], parts: list[Table] = parts
        ) -> str:
            found = [ratios(part, op, above).values() for part in parts]
            return ", ".join(f"{statistics.geometric_mean(f):.2f}" for f in found if f)

        what = ", ".join([facts["layout"].upper(), facts["backend"], f"{facts['threads']} threads"])
        rows[f"{what}: share of the limit"] = [both(op, of(LIMIT)) for op in OPS]
        rows[f"{what}: oneDNN / ours"] = [both(op, best_onednn) or "-" for op in OPS]
    return lines_of(list(OPS), rows)


def fused_table(facts: dict, table: Table) -> list[str]:
    """Time in units of the operation alone, and of the limits: what the added bytes cost."""

    def cells(op: str) -> list[str]:
        alone = op.split()[0]

        def cost(name: str, beyond: bool) -> dict[str, float]:
            part = where(facts, table, beyond)
            inverse = ratios(part, op, lambda case, t: table[alone, case][name], below=name)
            return {case: 1 / ratio for case, ratio in inverse.items()}

        return [
            summary(cost("bnext", True), max),
            summary(cost(LIMIT, True), max),
            summary(cost("bnext", False), max),
            summary(cost(LIMIT, False), max),
            summary(ratios(table, op, best_onednn)),
        ]

    titles = [
        "beyond the cache: time / alone",
        "its limit / alone",
        "within: time / alone",
        "its limit / alone",
        "oneDNN, best layout / ours",
    ]
    return lines_of(titles, {op: cells(op) for op in operations(table) if op not in OPS})


def dtype_table(files: list[str]) -> list[str]:
    """Time of float32 in the same run, in units of that of another dtype."""
    columns: list[Column] = []
    for path in files:
        facts, table = load(path)
        for beyond, name in ((True, "beyond"), (False, "within")):
            part = where(facts, table, beyond)
            columns.append((f"{facts['dtype']}, {name} the cache", part, of("bnext float32")))
    return ratio_lines(operations(*(table for _, table, _ in columns)), columns)


def peer_table(files: list[str], wanted: Callable[[str], bool]) -> list[str]:
    """Time of peers in units of ours."""
    columns: list[Column] = []
    for path in files:
        facts, table = load(path)
        prefix = "" if facts["dtype"] == "float32" else facts["dtype"] + ", "
        names = {n: None for t in table.values() for n in t if n not in ("bnext", "memcpy")}
        columns += [(f"{prefix}{name} / ours", table, of(name)) for name in names]
    ops = operations(*(table for _, table, _ in columns))
    return ratio_lines([op for op in ops if wanted(op)], columns)


def case_table(table: Table) -> list[str]:
    rows = {}
    for case in dict.fromkeys(case for _, case in table):
        cells = []
        for op in OPS:
            t = table.get((op, case))
            cells.append(
                f"{t['bytes'] / t['bnext'] * 1e-9:.0f} ({t[LIMIT] / t['bnext']:.2f})" if t else ""
            )
        rows[case] = cells
    return lines_of(list(OPS), rows)


def plot(cpp: dict, ops: dict, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    cases = list(dict.fromkeys(case for _, case in cpp))
    for axes, op in zip(figure.subplots(2, 2, sharex=True).flat, OPS, strict=True):
        series: dict[str, list[float]] = {}
        for position, case in enumerate(cases):
            for table in (cpp, ops):
                times = table.get((op, case), {})
                for name, seconds in times.items():
                    if name in ("bytes", "bnext", "memcpy", PASSES):
                        continue
                    points = series.setdefault(name, [float("nan")] * len(cases))
                    points[position] = seconds / times["bnext"]
        for name, points in sorted(series.items()):
            style = "k--" if name == LIMIT else "."
            axes.plot(points, style, label="streaming limit" if name == LIMIT else name)
        axes.axhline(1, color="black", linewidth=2, label="bnext")
        axes.set_yscale("log")
        axes.set_ylabel("time / time of bnext")
        axes.set_title(op)
        axes.set_xticks(range(len(cases)), cases, rotation=90, fontsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cpp", help="JSON of bnext_bench")
    parser.add_argument("ops", nargs="?", help="JSON of ops.py; without, its tables stay")
    parser.add_argument("--variants", nargs="+", default=[], help="JSON of bnext_bench")
    parser.add_argument("--dtypes", nargs="+", default=[], help="JSON of bnext_bench")
    parser.add_argument("--dtype-ops", nargs="+", default=[], help="JSON of ops.py")
    parser.add_argument("--write", help="the page whose tables to replace")
    parser.add_argument("--plot", help="the picture to draw")
    options = parser.parse_args()

    facts, cpp = load(options.cpp)
    ops_files = [options.ops] if options.ops else []
    ops = load(options.ops)[1] if options.ops else {}
    tables = {
        "beyond": speed_table(facts, cpp, beyond=True),
        "within": speed_table(facts, cpp, beyond=False),
        "variants": variant_table(options.variants),
        "fused": fused_table(facts, cpp),
        "dtypes": dtype_table(options.dtypes),
        "peers": peer_table(ops_files, lambda op: op in OPS),
        "fused peers": peer_table(ops_files, lambda op: op not in OPS),
        "dtype peers": peer_table(options.dtype_ops, lambda op: True),
        "cases": case_table(cpp),
    }
    tables = {name: lines for name, lines in tables.items() if lines}
    if options.plot:
        plot(cpp, ops, options.plot)
    if options.write:
        page = pathlib.Path(options.write)
        text = page.read_text()
        for name, lines in tables.items():
            block = f"<!-- {name} -->\n" + "\n".join(lines) + "\n<!-- end -->"
            text, count = re.subn(f"<!-- {name} -->.*?<!-- end -->", block, text, flags=re.S)
            if count != 1:
                raise SystemExit(f"{page}: expected one block of {name}, found {count}")
        page.write_text(text)
    else:
        for name, lines in tables.items():
            print(f"{name}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
