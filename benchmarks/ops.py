"""Time every operation on every shape of shapes.csv: bnext, the streaming limit, and the peers.

Results are compared before anything is timed, contenders take turns, and medians are reported.
Peers that are not installed are left out.

    python benchmarks/ops.py --json ops.json --plot ops.png
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

import bnext
from bnext import _core
from bnext import functional as F

SHAPES = pathlib.Path(__file__).with_name("shapes.csv")
OPS = ("forward", "backward", "inference", "dropout")
Run = Callable[[], np.ndarray]


def read_shapes(only: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    with SHAPES.open() as file:
        for row in csv.DictReader(file):
            if only in row["name"]:
                yield row["name"], tuple(int(row[axis]) for axis in "nchw")


class Bnext:
    """Each method returns a function that runs the operation once and gives its output.

    Arrays are (N, H, W, C) where channels come last, (N, C, H, W) otherwise.
    """

    def __init__(self, x, grad_y, weight, bias, channels_last, relu):
        self.arrays = x, weight, bias
        self.grad_y = grad_y
        self.out = np.empty_like(x)
        self.mean, self.var = np.full_like(weight, 0.5), np.full_like(weight, 4)
        self.generator = bnext.Generator(1)
        self.options = {
            "activation": "relu" if relu else None,
            "channel_axis": -1 if channels_last else 1,
        }

    def forward(self) -> Run:
        return lambda: F.batch_norm_forward(*self.arrays, out=self.out, **self.options)[0]

    def backward(self) -> Run:
        _, saved = F.batch_norm_forward(*self.arrays, **self.options)
        return lambda: F.batch_norm_backward(self.grad_y, saved, out=self.out).x

    def inference(self) -> Run:
        x, weight, bias = self.arrays
        return lambda: F.batch_norm_inference(
            x, self.mean, self.var, weight, bias, out=self.out, **self.options
        )

    def dropout(self) -> Run:
        x = self.arrays[0]
        return lambda: F.dropout_forward(x, 0.5, generator=self.generator, out=self.out)[0]


class NumPy:
    """The formulas as one writes them."""

    def __init__(self, x, grad_y, weight, bias, channels_last, relu):
        self.x, self.grad_y, self.relu = x, grad_y, relu
        self.axes = (0, 1, 2) if channels_last else (0, 2, 3)
        row = (slice(None),) if channels_last else (slice(None), None, None)
        self.weight, self.bias = weight[row], bias[row]
        self.rng = np.random.default_rng(1)

    def _normalized(self):
        mean = self.x.mean(self.axes, keepdims=True)
        inv_std = 1 / np.sqrt(self.x.var(self.axes, keepdims=True) + 1e-5)
        return (self.x - mean) * inv_std, inv_std

    def _end(self, z):
        return np.maximum(z, 0) if self.relu else z

    def forward(self) -> Run:
        return lambda: self._end(self._normalized()[0] * self.weight + self.bias)

    def backward(self) -> Run:
        n, inv_std = self._normalized()

        def run():
            passed = self.grad_y
            if self.relu:
                passed = passed * (n * self.weight + self.bias > 0)
            g = passed - passed.mean(self.axes, keepdims=True)
            g -= n * (passed * n).mean(self.axes, keepdims=True)
            return g * (self.weight * inv_std)

        return run

    def inference(self) -> Run:
        scale = self.weight / self.x.dtype.type(np.sqrt(4 + 1e-5))
        return lambda: self._end((self.x - self.x.dtype.type(0.5)) * scale + self.bias)

    def dropout(self) -> Run:
        dtype = self.x.dtype
        return lambda: self.x * (self.rng.random(self.x.shape, dtype) >= 0.5) * dtype.type(2)


class Torch:
    """PyTorch eager."""

    def __init__(self, x, grad_y, weight, bias, channels_last, relu):
        import torch

        self.torch = torch
        torch.set_num_threads(bnext.get_num_threads())
        self.x, self.grad_y, self.weight, self.bias = map(
            torch.from_numpy, (x, grad_y, weight, bias)
        )
        self.channels_last, self.relu = channels_last, relu
        if channels_last:  # the same memory, in PyTorch's order of axes
            self.x, self.grad_y = (a.permute(0, 3, 1, 2) for a in (self.x, self.grad_y))
        self.mean = torch.full_like(self.weight, 0.5)
        self.var = torch.full_like(self.weight, 4)

    def compiled(self, function):
        return function

    def _array(self, tensor):
        return (tensor.permute(0, 2, 3, 1) if self.channels_last else tensor).numpy()

    def _norm(self):
        functional, relu = self.torch.nn.functional, self.relu

        def norm(x, weight, bias):
            z = functional.batch_norm(x, None, None, weight, bias, training=True)
            return functional.relu(z) if relu else z

        return self.compiled(norm)

    def forward(self) -> Run:
        norm = self._norm()
        return lambda: self._array(norm(self.x, self.weight, self.bias))

    def backward(self) -> Run:
        leaves = [t.clone().requires_grad_() for t in (self.x, self.weight, self.bias)]
        y = self._norm()(*leaves)
        grad = self.torch.autograd.grad
        return lambda: self._array(grad(y, leaves, self.grad_y, retain_graph=True)[0])

    def inference(self) -> Run:
        functional, relu = self.torch.nn.functional, self.relu

        def norm(x):
            z = functional.batch_norm(x, self.mean, self.var, self.weight, self.bias)
            return functional.relu(z) if relu else z

        norm = self.compiled(norm)
        return lambda: self._array(norm(self.x))

    def dropout(self) -> Run:
        drop = self.compiled(lambda x: self.torch.nn.functional.dropout(x, 0.5))
        return lambda: self._array(drop(self.x))


class TorchCompile(Torch):
    """PyTorch compiled for each shape."""

    def __init__(self, *args):
        super().__init__(*args)
        self.torch.compiler.reset()  # after eight shapes it would fall back to eager

    def compiled(self, function):
        return self.torch.compile(function, dynamic=False)


class Jax:
    """JAX, jitted; backward is the whole of forward and backward."""

    def __init__(self, x, grad_y, weight, bias, channels_last, relu):
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp, self.relu = jax, jnp, relu
        jax.config.update("jax_enable_x64", x.dtype == np.float64)
        self.axes = (0, 1, 2) if channels_last else (0, 2, 3)
        row = (slice(None),) if channels_last else (slice(None), None, None)
        self.x, self.grad_y = jnp.asarray(x), jnp.asarray(grad_y)
        self.weight, self.bias = jnp.asarray(weight[row]), jnp.asarray(bias[row])
        self.key = jax.random.key(1)

    def _end(self, z):
        return self.jax.nn.relu(z) if self.relu else z

    def _norm(self, x, weight, bias):
        mean, var = x.mean(self.axes, keepdims=True), x.var(self.axes, keepdims=True)
        return self._end((x - mean) * self.jax.lax.rsqrt(var + 1e-5) * weight + bias)

    def forward(self) -> Run:
        norm = self.jax.jit(self._norm)
        return lambda: np.asarray(norm(self.x, self.weight, self.bias).block_until_ready())

    def backward(self) -> Run:
        pull = self.jax.jit(lambda x, w, b, g: self.jax.vjp(self._norm, x, w, b)[1](g)[0])
        return lambda: np.asarray(
            pull(self.x, self.weight, self.bias, self.grad_y).block_until_ready()
        )

    def inference(self) -> Run:
        scale = self.weight / self.x.dtype.type(np.sqrt(4 + 1e-5))
        norm = self.jax.jit(lambda x: self._end((x - 0.5) * scale + self.bias))
        return lambda: np.asarray(norm(self.x).block_until_ready())

    def dropout(self) -> Run:
        drop = self.jax.jit(
            lambda x, key: self.jnp.where(self.jax.random.bernoulli(key, 0.5, x.shape), x * 2, 0)
        )
        return lambda: np.asarray(drop(self.x, self.key).block_until_ready())


CONTENDERS = {
    "bnext": Bnext,
    "PyTorch": Torch,
    "torch.compile": TorchCompile,
    "JAX": Jax,
    "NumPy": NumPy,
}


def available(names: list[str]) -> dict[str, type]:
    found = {}
    for name in names:
        module = {"PyTorch": "torch", "torch.compile": "torch", "JAX": "jax"}.get(name)
        try:
            if module:
                __import__(module)
            found[name] = CONTENDERS[name]
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
    return found


def check(op: str, name: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Dropout draws other numbers in each library: only the share of zeros is compared."""
    if op == "dropout":
        share = float((got == 0).mean())
        wrong = abs(share - 0.5) > 3 / np.sqrt(got.size) + 1e-3
    else:
        # Rounding may put a value on the other side of the corner of ReLU.
        wrong = np.mean(~np.isclose(got, expected, rtol=1e-3, atol=1e-3)) > 1e-5
    if wrong:
        raise SystemExit(f"{name}: {op}: wrong result for shape {got.shape}")


def take_turns(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median seconds of one call of each, every round in the same order."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while len(samples["bnext"]) < 5 or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            time.sleep(0.005)  # threads of the last one stop spinning
            for _ in range(3):  # caches as it leaves them itself
                run()
            begin = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in samples.items()}


def measure(
    name: str, shape: tuple[int, ...], classes: dict[str, type], options: argparse.Namespace
):
    rng = np.random.default_rng(0)
    dtype = np.dtype(options.dtype)
    channels = shape[1]
    if options.channels_last:
        shape = (shape[0], *shape[2:], channels)
    x = rng.normal(0.5, 2, shape).astype(dtype)
    grad_y = rng.normal(size=shape).astype(dtype)
    weight, bias = (rng.normal(1, 0.2, channels).astype(dtype) for _ in range(2))
    contenders = {
        label: kind(x, grad_y, weight, bias, options.channels_last, options.relu)
        for label, kind in classes.items()
    }
    target = np.empty_like(x)
    for op in OPS:
        runs = {label: getattr(contender, op)() for label, contender in contenders.items()}
        outputs = {label: run() for label, run in runs.items()}
        expected = outputs["bnext"].copy()
        for label, output in outputs.items():
            check(op, label, output, expected)
        del outputs
        runs["memcpy"] = lambda: np.copyto(target, x)
        for label, median in take_turns(runs, options.seconds).items():
            yield {
                "case": name,
                "shape": list(shape),
                "op": op,
                "contender": label,
                "seconds": median,
            }


def print_table(rows: list[dict]) -> None:
    for op in OPS:
        times = {row["contender"]: row["seconds"] for row in rows if row["op"] == op}
        ours = times["bnext"]
        peers = "  ".join(
            f"{label} {seconds / ours:.1f}x"
            for label, seconds in times.items()
            if label not in ("bnext", "memcpy")
        )
        shape = "x".join(map(str, rows[0]["shape"]))
        print(
            f"{rows[0]['case']:22} {shape:16} {op:10} {ours * 1e3:9.3f} ms "
            f"{ours / times['memcpy']:6.2f} memcpy   {peers}",
            flush=True,
        )


def plot(rows: list[dict], path: str, what: str) -> None:
    """Time in units of bnext's, for each operation and shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for axes, op in zip(figure.subplots(2, 2, sharex=True).flat, OPS, strict=True):
        times = {(r["contender"], r["case"]): r["seconds"] for r in rows if r["op"] == op}
        for label in dict.fromkeys(row["contender"] for row in rows):
            ratios = [times[label, case] / times["bnext", case] for case in cases]
            style = {"linewidth": 2, "color": "black"} if label == "bnext" else {"marker": "."}
            axes.plot(ratios, label=label, **style)
        axes.set_yscale("log")
        axes.set_ylabel("time / time of bnext")
        axes.set_title(op)
        axes.set_xticks(range(len(cases)), cases, rotation=90, fontsize=7)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"{what}, {bnext.get_num_threads()} threads, {_core.backend()}")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=bnext.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape and operation")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--channels-last", action="store_true", help="arrays are (N, H, W, C)")
    parser.add_argument("--relu", action="store_true", help="BatchNorm with ReLU")
    parser.add_argument("--json", help="write every median here")
    parser.add_argument("--plot", help="write a picture of the ratios here")
    options = parser.parse_args()

    bnext.set_num_threads(options.threads)
    classes = available(["bnext", *(name for name in options.contenders if name != "bnext")])
    rows: list[dict] = []
    for name, shape in read_shapes(options.only):
        case = list(measure(name, shape, classes, options))
        print_table(case)
        rows += case
    if options.json:
        facts = {
            "threads": options.threads,
            "backend": _core.backend(),
            "dtype": options.dtype,
            "layout": "nhwc" if options.channels_last else "nchw",
            "activation": "relu" if options.relu else "none",
            "rows": rows,
        }
        pathlib.Path(options.json).write_text(json.dumps(facts, indent=1))
    if options.plot:
        layout = "NHWC" if options.channels_last else "NCHW"
        plot(rows, options.plot, f"{options.dtype} {layout}{' with ReLU' * options.relu}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
