"""The benchmarks' scripts: what they compute from times, not the times."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


ops, report = script("ops"), script("report")


def cpp_file(path, dtype, times):
    """times: {(op, case): (bytes, {contender: seconds})}."""
    rows = [
        {"op": op, "case": case, "bytes": size, "contender": contender, "seconds": seconds}
        for (op, case), (size, contenders) in times.items()
        for contender, seconds in contenders.items()
    ]
    facts = {
        "threads": 2, "dtype": dtype, "layout": "nchw", "backend": "best", "cache_bytes": 100,
        "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(facts))
    return str(path)


def ops_file(path, dtype, times):
    rows = [
        {"op": op, "case": case, "contender": contender, "seconds": seconds}
        for (op, case), contenders in times.items()
        for contender, seconds in contenders.items()
    ]
    path.write_text(json.dumps({"threads": 2, "dtype": dtype, "rows": rows}))
    return str(path)


def cells(page, table, row):
    """What stands in a row of a table of the page."""
    block = page.split(f"<!-- {table} -->")[1].split("<!-- end -->")[0]
    (line,) = (line for line in block.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page that the report has filled from files of known times."""
    cpp = {
        (op, case): (size, {"bnext": 2, "limit a": 1.5, "limit b": 1, "onednn nchw": 4 + i})
        for op in report.OPS
        for i, (case, size) in enumerate([("large", 200), ("huge", 400), ("small", 90)])
    }
    for case, seconds in [("large", 2.2), ("huge", 8.8), ("small", 3)]:
        cpp["forward relu", case] = (cpp["forward", case][0], {"bnext": seconds})
    # Above the size of the cache only with its residual: still a small case.
    cpp["forward residual relu", "small"] = (135, {"bnext": 4, "limit a": 1.7})
    half = {("forward", "large"): (150, {"bnext": 1, "bnext float32": 1.5, "limit": 1})}
    times = {"forward": {"bnext": 1, "memcpy": 1, "PyTorch": 3}}
    peers = {(op, "large"): times["forward"] for op in (*report.OPS, "backward relu dropout")}
    path = tmp_path / "page.md"
    names = "beyond", "within", "variants", "fused", "dtypes", "peers", "fused peers", "cases"
    path.write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names))
    arguments = [
        cpp_file(tmp_path / "cpp.json", "float32", cpp),
        ops_file(tmp_path / "ops.json", "float32", peers),
        "--dtypes",
        cpp_file(tmp_path / "half.json", "bfloat16", half),
        "--write",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    report.main()
    return path.read_text()


def test_report_share_of_the_limit_is_the_fastest_streams(page):
    assert cells(page, "beyond", "forward")[0] == "0.50 (0.50, large)"
    assert cells(page, "beyond", "forward")[2] == "2.24 (2.00, large)"  # sqrt(4 / 2 * 5 / 2)
    assert cells(page, "within", "forward")[2] == "3.00 (3.00, small)"


def test_report_fused_is_relative_to_the_operation_alone(page):
    beyond, limit, within, limit_within, _ = cells(page, "fused", "forward relu")
    assert beyond == "2.20 (4.40, huge)"  # sqrt(1.1 * 4.4); the worst is the largest
    assert limit == "1.00 (1.00, large)"
    assert within == "1.50 (1.50, small)"
    residual = cells(page, "fused", "forward residual relu")
    assert residual == ["-", "-", "2.00 (2.00, small)", "1.70 (1.70, small)", "-"]
    assert limit_within == "1.00 (1.00, small)"


def test_report_dtypes_and_peers(page):
    assert cells(page, "dtypes", "forward") == ["1.50 (1.50, large)", "-"]
    assert cells(page, "peers", "backward") == ["3.00 (3.00, large)"]
    assert cells(page, "fused peers", "backward relu dropout") == ["3.00 (3.00, large)"]


def test_report_leaves_tables_without_data(page):
    assert "<!-- variants -->\nold\n<!-- end -->" in page
    assert page.count("old") == 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operation_is_measured(dtype, channels_last):
    options = argparse.Namespace(
        dtype=dtype, channels_last=channels_last, seconds=0, ops=ops.OPS + ops.FUSED
    )
    classes = ops.available(["bnext", "NumPy"], ops.dtype_of(dtype))
    rows = list(
        ops.measure("tiny", (16, 3, 7, 5), classes, options)
    )  # raises if NumPy differs, which has no bfloat16
    assert {(r["op"], r["contender"]) for r in rows} == {
        (op.name, contender) for op in options.ops for contender in (*classes, "memcpy")
    }


@pytest.mark.parametrize("op", ops.OPS + ops.FUSED, ids=lambda op: op.name)
def test_wrong_results_are_noticed(op):
    right = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    ops.check(op, "peer", right, right)
    wrong = right * np.float32(1.05)
    with pytest.raises(SystemExit, match=f"peer: {op.name}: wrong"):
        ops.check(op, "peer", wrong if op.kind != "backward" else wrong * 2, right)


def test_wrong_share_of_zeros_is_noticed():
    right = np.ones(100_000, np.float32)
    wrong = right.copy()
    wrong[::10] = 0
    with pytest.raises(SystemExit, match="dropout: wrong"):
        ops.check(ops.Op("dropout", dropout=0.5), "peer", wrong, right)


def test_operations_have_the_names_of_bnext_bench():
    assert [op.name for op in ops.OPS] == list(report.OPS)
    assert {op.name.partition(" ")[2] for op in ops.FUSED} == set(report.FUSIONS)
