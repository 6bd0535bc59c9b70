"""Summarise what the benchmarks wrote, as the tables and the picture of docs/performance.md.

    python benchmarks/report.py cpp.json ops.json --write docs/performance.md --plot speed.png

The first file is of bnext_bench, the second of ops.py. --variants adds files of bnext_bench with
other options (--channels-last, --relu, --threads 1, another BNEXT_BACKEND). Tables replace what
stands between the markers ``<!-- NAME -->`` and ``<!-- end -->`` of the page; without --write they
are printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics

OPS = ("forward", "backward", "inference", "dropout")
LIMIT = "limit"
PASSES = "two passes"


def load(path: str) -> tuple[dict, dict[tuple[str, str], dict[str, float]]]:
    """Facts of the run, and for each (operation, case) the seconds of each contender.

    The fastest of those that only move the bytes is the contender "limit", of those that also make
    the sums that training needs, "two passes".
    """
    facts = json.loads(pathlib.Path(path).read_text())
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in facts.pop("rows"):
        times = table.setdefault((row["op"], row["case"]), {})
        name = row["contender"]
        name = next((group for group in (LIMIT, PASSES) if name.startswith(group)), name)
        times[name] = min(row["seconds"], times.get(name, float("inf")))
        if "bytes" in row:
            times["bytes"] = row["bytes"]
    return facts, table


def summary(values: dict[str, float]) -> str:
    """Geometric mean, and the smallest with its name."""
    if not values:
        return "-"
    worst = min(values, key=values.__getitem__)
    return f"{statistics.geometric_mean(values.values()):.2f} ({values[worst]:.2f}, {worst})"


def speed_table(facts: dict, table: dict, beyond: bool) -> list[str]:
    lines = [
        "| | share of the streaming limit | share of two passes | oneDNN nchw / ours "
        "| oneDNN, best layout / ours |",
        "|---|---|---|---|---|",
    ]
    for op in OPS:
        times = {
            case: t
            for (o, case), t in table.items()
            if o == op and (t["bytes"] > facts["cache_bytes"]) == beyond
        }
        peers = {c: [s for name, s in t.items() if "onednn" in name] for c, t in times.items()}
        cells = [
            summary({c: t[LIMIT] / t["bnext"] for c, t in times.items()}),
            summary({c: t[PASSES] / t["bnext"] for c, t in times.items() if PASSES in t}),
            summary(
                {c: t["onednn nchw"] / t["bnext"] for c, t in times.items() if "onednn nchw" in t}
            ),
            summary({c: min(p) / times[c]["bnext"] for c, p in peers.items() if p}),
        ]
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return lines


def variant_table(files: list[str]) -> list[str]:
    """Share of the limit, and the best of oneDNN's layouts, for other options; all shapes."""
    lines = [
        "| | " + " | ".join(OPS) + " |",
        "|---" * (len(OPS) + 1) + "|",
    ]
    for path in files:
        facts, table = load(path)
        what = [facts["layout"].upper(), facts["backend"], f"{facts['threads']} threads"]
        if facts["activation"] != "none":
            what.insert(1, facts["activation"])
        cells = []
        for op in OPS:
            times = [t for (o, _), t in table.items() if o == op]
            peers = [
                min(p) / t["bnext"]
                for t in times
                if (p := [s for name, s in t.items() if "onednn" in name])
            ]
            share = statistics.geometric_mean(t[LIMIT] / t["bnext"] for t in times)
            ratio = f", oneDNN {statistics.geometric_mean(peers):.2f}" if peers else ""
            cells.append(f"{share:.2f}{ratio}")
        lines.append(f"| {', '.join(what)} | " + " | ".join(cells) + " |")
    return lines


def peer_table(table: dict) -> list[str]:
    peers = [n for n in next(iter(table.values())) if n not in ("bnext", "memcpy")]
    lines = [
        "| | " + " | ".join(f"{p} / ours" for p in peers) + " |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for op in OPS:
        cells = [
            summary({c: t[p] / t["bnext"] for (o, c), t in table.items() if o == op and p in t})
            for p in peers
        ]
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return lines


def case_table(table: dict) -> list[str]:
    cases = list(dict.fromkeys(case for _, case in table))
    lines = ["| | " + " | ".join(OPS) + " |", "|---" * (len(OPS) + 1) + "|"]
    for case in cases:
        cells = []
        for op in OPS:
            t = table.get((op, case))
            cells.append(
                f"{t['bytes'] / t['bnext'] * 1e-9:.0f} ({t[LIMIT] / t['bnext']:.2f})" if t else ""
            )
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


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
    parser.add_argument("ops", help="JSON of ops.py")
    parser.add_argument("--variants", nargs="+", default=[], help="JSON of bnext_bench")
    parser.add_argument("--write", help="the page whose tables to replace")
    parser.add_argument("--plot", help="the picture to draw")
    options = parser.parse_args()

    (facts, cpp), (_, ops) = load(options.cpp), load(options.ops)
    tables = {
        "beyond": speed_table(facts, cpp, beyond=True),
        "within": speed_table(facts, cpp, beyond=False),
        "variants": variant_table(options.variants),
        "peers": peer_table(ops),
        "cases": case_table(cpp),
    }
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
