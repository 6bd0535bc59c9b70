"""Operations on a GPU beside PyTorch's own kernels, cuDNN, torch.compile and a copy.

Each is captured into a CUDA graph of several calls, on as many sets of arrays as it takes to leave
the L2 cache, and replayed between two events: what is timed is the device, not Python. Calls that
cannot be captured are timed as they are; the column `how` says so. `copy` is a device copy of the
bytes that the operation must move at least: x once in, y once out (backward: grad_y and x in,
grad_x out), so `limit` is the share of that limit.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as TF

from bnext import functional as F

SHAPES = pathlib.Path(__file__).with_name("shapes.csv")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CALLS = 8  # of one graph, at least


def shapes() -> list[tuple[str, tuple[int, int, int, int]]]:
    with SHAPES.open() as file:
        return [
            (row["name"], (int(row["n"]), int(row["c"]), int(row["h"]), int(row["w"])))
            for row in csv.DictReader(file)
        ]


class Arrays:
    """One set of what the operations take. Channels lie last in memory, or not."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool) -> None:
        c = shape[1]
        self.axis = -1 if last else 1
        layout = torch.channels_last if last else torch.contiguous_format
        self.x = torch.randn(shape, device="cuda").mul_(2).add_(1).to(dtype)
        self.g = torch.randn(shape, device="cuda").to(dtype)
        self.x, self.g = (t.contiguous(memory_format=layout) for t in (self.x, self.g))
        # As the core sees them: contiguous.
        self.ours, self.ours_g = (t.permute(0, 2, 3, 1) if last else t for t in (self.x, self.g))
        self.weight, self.bias = torch.rand(2, c, device="cuda").add_(0.5).unbind()
        self.mean, self.var = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
        self.saved: dict[str, Any] = {}
        self.graphs: dict[str, tuple[Tensor, Tensor]] = {}


def ours(op: str) -> Callable[[Arrays], Any]:
    options = {"activation": "relu"} if "relu" in op else {}

    def forward(a: Arrays) -> Any:
        y, saved = F.batch_norm_forward(a.ours, a.weight, a.bias, channel_axis=a.axis, **options)
        a.saved[op] = saved
        return y

    def backward(a: Arrays) -> Any:
        if op not in a.saved:
            forward(a)
        return F.batch_norm_backward(a.ours_g, a.saved[op]).x

    def inference(a: Arrays) -> Any:
        return F.batch_norm_inference(
            a.ours, a.mean, a.var, a.weight, a.bias, channel_axis=a.axis, **options
        )

    def dropout(a: Arrays) -> Any:
        return F.dropout_forward(a.ours, 0.5)[0]

    kinds = {"forward": forward, "backward": backward, "inference": inference, "dropout": dropout}
    return kinds[op.split()[0]]


def theirs(op: str, compiled: bool = False) -> Callable[[Arrays], Any]:
    relu = "relu" in op

    def norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Any, var: Any, train: bool) -> Tensor:
        y = TF.batch_norm(x, mean, var, weight, bias, training=train)
        return TF.relu(y) if relu else y

    run = torch.compile(norm, dynamic=False) if compiled else norm

    def forward(a: Arrays) -> Any:
        return run(a.x, a.weight, a.bias, None, None, True)

    def backward(a: Arrays) -> Any:
        if op not in a.graphs:
            x = a.x.detach().requires_grad_()
            weight, bias = a.weight.detach().requires_grad_(), a.bias.detach().requires_grad_()
            a.graphs[op] = (run(x, weight, bias, None, None, True), [x, weight, bias])
        y, inputs = a.graphs[op]
        return torch.autograd.grad(y, inputs, a.g, retain_graph=True)

    def inference(a: Arrays) -> Any:
        return run(a.x, a.weight, a.bias, a.mean, a.var, False)

    def dropout(a: Arrays) -> Any:
        return TF.dropout(a.x, 0.5)

    kinds = {"forward": forward, "backward": backward, "inference": inference, "dropout": dropout}
    return kinds[op.split()[0]]


def copy_of(op: str, arrays: list[Arrays]) -> Callable[[Arrays], Any]:
    """As many bytes as the operation must move."""
    x = arrays[0].x
    size = x.numel() * 3 // 2 if op.startswith("backward") else x.numel()
    buffers = {id(a): torch.empty(2, size, dtype=x.dtype, device="cuda").unbind() for a in arrays}
    return lambda a: buffers[id(a)][0].copy_(buffers[id(a)][1])


def milliseconds(run: Callable[[Arrays], Any], arrays: list[Arrays]) -> tuple[float, str]:
    calls = -(-CALLS // len(arrays)) * len(arrays)

    def all_calls() -> None:
        for k in range(calls):
            run(arrays[k % len(arrays)])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_calls()
        replay, how = graph.replay, "graph"
        replay()
    except Exception:
        torch.cuda.synchronize()
        replay, how = all_calls, "eager"
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times), how


LABELS = {
    "torch": "PyTorch", "cudnn": "PyTorch with cuDNN", "compile": "torch.compile",
    "copy": "a copy of the least bytes",
}  # fmt: skip
OPS = ["forward", "backward", "inference", "forward relu", "backward relu", "dropout"]


# Two shapes, since it takes seconds for each.
COMPILED = ("vgg16 conv1", "resnet50 conv2 out")


def peers(name: str, op: str, dtype: str) -> dict[str, tuple[Callable[[Arrays], Any], bool]]:
    """Functions, and whether cuDNN is on."""
    found = {"bnext": (ours(op), True), "torch": (theirs(op), False)}
    if op != "dropout" and dtype != "bfloat16":  # for which PyTorch has its own kernels only
        found["cudnn"] = (theirs(op), True)
    if name in COMPILED and dtype != "float16" and op in ("forward relu", "backward relu"):
        torch._dynamo.reset()  # or, after some shapes, it would not compile
        found["compile"] = (theirs(op, compiled=True), False)
    return found


def check(arrays: Arrays, op: str) -> float:
    """How far bnext and PyTorch are apart, in units of the largest value. With ReLU in the mean:
    the gradient of a value next to 0 is all or nothing.
    """
    if op == "dropout":
        return 0.0
    actual, wanted = ours(op)(arrays), theirs(op)(arrays)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    wanted = wanted.permute(0, 2, 3, 1) if arrays.axis == -1 else wanted
    difference = (actual.float() - wanted.float()).abs()
    return float((difference.mean() if "relu" in op else difference.max()) / wanted.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=pathlib.Path, default="gpu.json")
    parser.add_argument("--read", type=pathlib.Path, help="what --write wrote, not to measure")
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=170)
    options = parser.parse_args()
    report = json.loads(options.read.read_text()) if options.read else measure(options)
    summarize(report)
    if options.plot:
        plot(report, options.plot)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "device": properties.name,
        "torch": torch.__version__,
        "l2": properties.L2_cache_size,
        "results": [],
        "skipped": [],
    }
    start = time.perf_counter()
    # Largest first: what matters most is measured before time runs out.
    cases = [
        (name, shape, dtype, last)
        for dtype in DTYPES
        for last in (False, True)
        for name, shape in shapes()
    ]
    cases.sort(key=lambda case: -torch.Size(case[1]).numel())
    for name, shape, dtype, last in cases:
        size = torch.Size(shape).numel()
        label = {"name": name, "shape": shape, "dtype": dtype, "last": last}
        if time.perf_counter() - start > options.seconds:
            report["skipped"].append(label)
            continue
        sets = min(24, max(1, 3 * properties.L2_cache_size // (size * DTYPES[dtype].itemsize) + 1))
        arrays = [Arrays(shape, DTYPES[dtype], last) for _ in range(sets)]
        for op in OPS:
            row: dict[str, Any] = {**label, "op": op, "error": check(arrays[0], op), "ms": {}}
            for peer, (run, cudnn) in peers(name, op, dtype).items():
                with torch.backends.cudnn.flags(enabled=cudnn):
                    row["ms"][peer], row.setdefault("how", {})[peer] = milliseconds(run, arrays)
            row["ms"]["copy"] = milliseconds(copy_of(op, arrays), arrays)[0]
            row["limit"] = row["ms"]["copy"] / row["ms"]["bnext"]
            report["results"].append(row)
            for a in arrays:
                a.saved.clear()
                a.graphs.clear()
        options.write.write_text(json.dumps(report, indent=1))
    return report


def ratios(report: dict[str, Any], op: str, peer: str) -> list[float]:
    return [
        row["ms"][peer] / row["ms"]["bnext"]
        for row in report["results"]
        if row["op"] == op and peer in row["ms"]
    ]


def measured(report: dict[str, Any]) -> list[str]:
    return [op for op in OPS if any(row["op"] == op for row in report["results"])]


def summarize(report: dict[str, Any]) -> None:
    print(f"{report['device']}, PyTorch {report['torch']}; times of peers over those of bnext")
    for op in measured(report):
        parts = []
        for peer in LABELS:
            found = ratios(report, op, peer)
            if found:
                parts.append(
                    f"{peer} {statistics.geometric_mean(found):.2f} (least {min(found):.2f})"
                )
        print(f"{op:14} {', '.join(parts)}")
    large = [
        row["limit"]
        for row in report["results"]
        if torch.Size(row["shape"]).numel() * DTYPES[row["dtype"]].itemsize >= 100e6
    ]
    if large:
        print(f"of the limit at 100 MB and more: {min(large):.2f} to {max(large):.2f}")
    print(f"largest difference to PyTorch: {max(r['error'] for r in report['results']):.1e}")
    print(f"cases skipped for want of time: {len(report['skipped'])}")


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ops = measured(report)
    figure, axes = plt.subplots(
        2, -(-len(ops) // 2), figsize=(13, 7), sharex=True, sharey=True, squeeze=False
    )
    for axis, op in zip(axes.flat, ops, strict=False):
        rows = [row for row in report["results"] if row["op"] == op]
        for color, (peer, label) in enumerate(LABELS.items()):
            for last, marker in ((False, "o"), (True, "x")):
                points = [
                    (torch.Size(r["shape"]).numel() * DTYPES[r["dtype"]].itemsize / 1e6,
                     r["ms"][peer] / r["ms"]["bnext"])
                    for r in rows if peer in r["ms"] and r["last"] == last
                ]  # fmt: skip
                if points:
                    order = "last" if last else "first"
                    axis.scatter(
                        *zip(*points, strict=True), s=10, marker=marker, color=f"C{color}",
                        linewidths=0.9, label=f"{label}, channels {order}",
                    )  # fmt: skip
        axis.axhline(1, color="0.5", linewidth=0.8)
        axis.set(title=op, xscale="log", yscale="log")
    for axis in axes[1]:
        axis.set_xlabel("MB of x")
    for axis in axes[:, 0]:
        axis.set_ylabel("time / time of bnext")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(report["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
