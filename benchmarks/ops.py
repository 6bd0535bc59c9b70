"""Time every operation on every shape of shapes.csv: bnext, the streaming limit, and the peers.

Results are compared before anything is timed, contenders take turns, and medians are reported.
Peers that are not installed are left out. With --fused also what bnext does in one operation and
others in several: batch normalization, the sum with a residual, ReLU, dropout.

    python benchmarks/ops.py --json ops.json --plot ops.png
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
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
DTYPES = ("float32", "float64", "float16", "bfloat16")
Run = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Op:
    """What is timed, named as bnext_bench names it."""

    kind: str
    residual: bool = False
    relu: bool = False
    dropout: float = 0  # probability

    @property
    def name(self) -> str:
        fused = ("residual", "relu", "dropout") if self.kind != "dropout" else ()
        other = [f"{self.dropout:g}"] if self.dropout not in (0, 0.5) else []
        return " ".join([self.kind, *(part for part in fused if getattr(self, part)), *other])


OPS = [Op("forward"), Op("backward"), Op("inference"), Op("dropout", dropout=0.5)]
FUSED = [
    *(Op(kind, relu=True) for kind in ("forward", "backward", "inference")),
    *(Op(kind, relu=True, dropout=p) for kind in ("forward", "backward") for p in (0.5, 0.1)),
    *(Op(kind, residual=True, relu=True) for kind in ("forward", "backward", "inference")),
    Op("dropout", dropout=0.1),
]


@dataclasses.dataclass
class Arrays:
    """(N, H, W, C) where channels come last, (N, C, H, W) otherwise."""

    x: np.ndarray
    grad_y: np.ndarray
    residual: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    channels_last: bool


def read_shapes(only: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    with SHAPES.open() as file:
        for row in csv.DictReader(file):
            if only in row["name"]:
                yield row["name"], tuple(int(row[axis]) for axis in "nchw")


class Bnext:
    """Each method returns a function that runs the operation once and gives its output."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays
        self.out = np.empty_like(arrays.x)
        weight = arrays.weight
        self.mean, self.var = np.full_like(weight, 0.5), np.full_like(weight, 4)
        self.generator = bnext.Generator(1)

    def _options(self, op: Op) -> dict:
        return {
            "residual": self.arrays.residual if op.residual else None,
            "activation": "relu" if op.relu else None,
            "channel_axis": -1 if self.arrays.channels_last else 1,
        }

    def _forward(self, op: Op, out=None):
        a = self.arrays
        return F.batch_norm_forward(
            a.x,
            a.weight,
            a.bias,
            dropout=op.dropout,
            generator=self.generator,
            out=out,
            **self._options(op),
        )

    def forward(self, op: Op) -> Run:
        return lambda: self._forward(op, self.out)[0]

    def backward(self, op: Op) -> Run:
        _, saved = self._forward(op)
        return lambda: F.batch_norm_backward(self.arrays.grad_y, saved, out=self.out).x

    def inference(self, op: Op) -> Run:
        a, options = self.arrays, self._options(op)
        return lambda: F.batch_norm_inference(
            a.x, self.mean, self.var, a.weight, a.bias, out=self.out, **options
        )

    def dropout(self, op: Op) -> Run:
        x = self.arrays.x
        return lambda: F.dropout_forward(x, op.dropout, generator=self.generator, out=self.out)[0]


class NumPy:
    """The formulas as one writes them."""

    def __init__(self, arrays: Arrays):
        self.x, self.grad_y, self.residual = arrays.x, arrays.grad_y, arrays.residual
        self.axes = (0, 1, 2) if arrays.channels_last else (0, 2, 3)
        row = (slice(None),) if arrays.channels_last else (slice(None), None, None)
        self.weight, self.bias = arrays.weight[row], arrays.bias[row]
        self.rng = np.random.default_rng(1)

    def _normalized(self):
        mean = self.x.mean(self.axes, keepdims=True)
        inv_std = 1 / np.sqrt(self.x.var(self.axes, keepdims=True) + 1e-5)
        return (self.x - mean) * inv_std, inv_std

    def _mask(self, p: float):
        dtype = self.x.dtype
        return (self.rng.random(self.x.shape, dtype) >= p) * dtype.type(1 / (1 - p))

    def _end(self, z, op: Op):
        if op.residual:
            z = z + self.residual
        if op.relu:
            z = np.maximum(z, 0)
        return z * self._mask(op.dropout) if op.dropout else z

    def forward(self, op: Op) -> Run:
        return lambda: self._end(self._normalized()[0] * self.weight + self.bias, op)

    def backward(self, op: Op) -> Run:
        n, inv_std = self._normalized()
        z = n * self.weight + self.bias + (self.residual if op.residual else 0)
        mask = self._mask(op.dropout) if op.dropout else None

        def run():
            passed = self.grad_y
            if op.dropout:
                passed = passed * mask
            if op.relu:
                passed = passed * (z > 0)
            g = passed - passed.mean(self.axes, keepdims=True)
            g -= n * (passed * n).mean(self.axes, keepdims=True)
            return g * (self.weight * inv_std)

        return run

    def inference(self, op: Op) -> Run:
        scale = self.weight / self.x.dtype.type(np.sqrt(4 + 1e-5))
        return lambda: self._end((self.x - self.x.dtype.type(0.5)) * scale + self.bias, op)

    def dropout(self, op: Op) -> Run:
        return lambda: self.x * self._mask(op.dropout)


class Torch:
    """PyTorch eager: one operation after the other."""

    def __init__(self, arrays: Arrays):
        import torch

        self.torch = torch
        torch.set_num_threads(bnext.get_num_threads())
        self.dtype, self.channels_last = arrays.x.dtype, arrays.channels_last
        self.x, self.grad_y, self.residual = map(
            self._tensor, (arrays.x, arrays.grad_y, arrays.residual)
        )
        self.weight, self.bias = torch.from_numpy(arrays.weight), torch.from_numpy(arrays.bias)
        self.mean = torch.full_like(self.weight, 0.5)
        self.var = torch.full_like(self.weight, 4)

    def compiled(self, function):
        return function

    def _tensor(self, array: np.ndarray):
        """The same memory, in PyTorch's order of axes; it does not know NumPy's bfloat16."""
        if self.dtype.name == "bfloat16":
            tensor = self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        else:
            tensor = self.torch.from_numpy(array)
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor

    def _array(self, tensor) -> np.ndarray:
        if self.channels_last:
            tensor = tensor.permute(0, 2, 3, 1)
        if self.dtype.name == "bfloat16":
            return tensor.view(self.torch.int16).numpy().view(self.dtype)
        return tensor.numpy()

    def _end(self, z, residual, op: Op):
        functional = self.torch.nn.functional
        if op.residual:
            z = z + residual
        if op.relu:
            z = functional.relu(z)
        return functional.dropout(z, op.dropout) if op.dropout else z

    def _norm(self, op: Op):
        batch_norm = self.torch.nn.functional.batch_norm

        def norm(x, weight, bias, residual):
            return self._end(batch_norm(x, None, None, weight, bias, training=True), residual, op)

        return self.compiled(norm)

    def forward(self, op: Op) -> Run:
        norm = self._norm(op)
        return lambda: self._array(norm(self.x, self.weight, self.bias, self.residual))

    def backward(self, op: Op) -> Run:
        inputs = [self.x, self.weight, self.bias, *([self.residual] if op.residual else [])]
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = self._norm(op)(*leaves, *([] if op.residual else [None]))
        grad = self.torch.autograd.grad
        return lambda: self._array(grad(y, leaves, self.grad_y, retain_graph=True)[0])

    def inference(self, op: Op) -> Run:
        batch_norm = self.torch.nn.functional.batch_norm

        def norm(x, residual):
            z = batch_norm(x, self.mean, self.var, self.weight, self.bias)
            return self._end(z, residual, op)

        norm = self.compiled(norm)
        return lambda: self._array(norm(self.x, self.residual))

    def dropout(self, op: Op) -> Run:
        drop = self.compiled(lambda x: self.torch.nn.functional.dropout(x, op.dropout))
        return lambda: self._array(drop(self.x))


class TorchCompile(Torch):
    """PyTorch compiled for each shape."""

    def compiled(self, function):
        self.torch.compiler.reset()  # after eight shapes it would fall back to eager
        return self.torch.compile(function, dynamic=False)


class Jax:
    """JAX, jitted; backward is the whole of forward and backward."""

    def __init__(self, arrays: Arrays):
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp = jax, jnp
        jax.config.update("jax_enable_x64", arrays.x.dtype == np.float64)
        self.axes = (0, 1, 2) if arrays.channels_last else (0, 2, 3)
        row = (slice(None),) if arrays.channels_last else (slice(None), None, None)
        self.x, self.grad_y = jnp.asarray(arrays.x), jnp.asarray(arrays.grad_y)
        self.residual = jnp.asarray(arrays.residual)
        self.weight, self.bias = jnp.asarray(arrays.weight[row]), jnp.asarray(arrays.bias[row])
        self.key = jax.random.key(1)

    def _drop(self, x, key, p: float):
        kept = self.jax.random.bernoulli(key, 1 - p, x.shape)
        return self.jnp.where(kept, x / (1 - p), 0)

    def _end(self, z, residual, key, op: Op):
        if op.residual:
            z = z + residual
        if op.relu:
            z = self.jax.nn.relu(z)
        z = self._drop(z, key, op.dropout) if op.dropout else z
        return z.astype(self.x.dtype)

    def _norm(self, op: Op):
        def norm(x, weight, bias, residual, key):
            x = x.astype(weight.dtype)
            mean, var = x.mean(self.axes, keepdims=True), x.var(self.axes, keepdims=True)
            z = (x - mean) * self.jax.lax.rsqrt(var + 1e-5) * weight + bias
            return self._end(z, residual, key, op)

        return norm

    def forward(self, op: Op) -> Run:
        norm = self.jax.jit(self._norm(op))
        inputs = self.x, self.weight, self.bias, self.residual, self.key
        return lambda: np.asarray(norm(*inputs).block_until_ready())

    def backward(self, op: Op) -> Run:
        norm = self._norm(op)

        def gradients(x, weight, bias, residual, key, grad_y):
            pull = self.jax.vjp(lambda *leaves: norm(*leaves, key), x, weight, bias, residual)[1]
            return pull(grad_y)

        gradients = self.jax.jit(gradients)
        inputs = self.x, self.weight, self.bias, self.residual, self.key, self.grad_y
        return lambda: np.asarray(self.jax.block_until_ready(gradients(*inputs))[0])

    def inference(self, op: Op) -> Run:
        scale = self.weight / self.weight.dtype.type(np.sqrt(4 + 1e-5))

        def norm(x, residual, key):
            z = (x.astype(scale.dtype) - 0.5) * scale + self.bias
            return self._end(z, residual, key, op)

        norm = self.jax.jit(norm)
        return lambda: np.asarray(norm(self.x, self.residual, self.key).block_until_ready())

    def dropout(self, op: Op) -> Run:
        drop = self.jax.jit(lambda x, key: self._drop(x, key, op.dropout))
        return lambda: np.asarray(drop(self.x, self.key).block_until_ready())


CONTENDERS = {
    "bnext": Bnext,
    "PyTorch": Torch,
    "torch.compile": TorchCompile,
    "JAX": Jax,
    "NumPy": NumPy,
}
MODULES = {"PyTorch": "torch", "torch.compile": "torch", "JAX": "jax"}


def available(names: list[str], dtype: np.dtype) -> dict[str, type]:
    found = {}
    for name in names:
        if name in MODULES and importlib.util.find_spec(MODULES[name]) is None:
            print(f"{name} is not installed: left out", file=sys.stderr)
        elif name == "NumPy" and dtype.itemsize == 2:
            print("NumPy computes in its own dtypes only: left out", file=sys.stderr)
        else:
            found[name] = CONTENDERS[name]
    return found


def check(op: Op, name: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Each library drops other elements: only what all must share is compared then."""
    half = got.dtype.itemsize == 2
    if half:
        got, expected = got.astype(np.float32), expected.astype(np.float32)
    noise = 10 / np.sqrt(got.size)
    # Rounding may put a value on the other side of the corner of ReLU; some libraries round the
    # numbers of 16 bits after each step.
    tolerance, few = (0.03, 1e-2) if half else (1e-3, 1e-5)
    wrong = False
    if op.dropout and op.kind == "backward":
        sizes = [float(np.sqrt(np.mean(a * a))) for a in (got, expected)]
        wrong = abs(sizes[0] / sizes[1] - 1) > noise + 0.02
    else:
        if op.dropout:
            shares = [float((a == 0).mean()) for a in (got, expected)]
            wrong = abs(shares[0] - shares[1]) > noise + 1e-3
            both = (got != 0) & (expected != 0)
            got, expected = got[both], expected[both]
        close = np.isclose(got, expected, rtol=tolerance, atol=tolerance)
        wrong = wrong or np.mean(~close) > few
    if wrong:
        raise SystemExit(f"{name}: {op.name}: wrong result for {got.size} values")


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
    dtype = dtype_of(options.dtype)
    parameters = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
    channels = shape[1]
    if options.channels_last:
        shape = (shape[0], *shape[2:], channels)
    arrays = Arrays(
        rng.normal(0.5, 2, shape).astype(dtype),
        rng.normal(size=shape).astype(dtype),
        rng.normal(size=shape).astype(dtype),
        *(rng.normal(1, 0.2, channels).astype(parameters) for _ in range(2)),
        options.channels_last,
    )
    contenders = {label: kind(arrays) for label, kind in classes.items()}
    target = np.empty_like(arrays.x)
    for op in options.ops:
        runs = {label: getattr(contender, op.kind)(op) for label, contender in contenders.items()}
        outputs = {label: run() for label, run in runs.items()}
        expected = outputs["bnext"].copy()
        for label, output in outputs.items():
            check(op, label, output, expected)
        del outputs
        runs["memcpy"] = lambda: np.copyto(target, arrays.x)
        for label, median in take_turns(runs, options.seconds).items():
            yield {
                "case": name,
                "shape": list(shape),
                "op": op.name,
                "contender": label,
                "seconds": median,
            }


def dtype_of(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def print_table(rows: list[dict]) -> None:
    for op in dict.fromkeys(row["op"] for row in rows):
        times = {row["contender"]: row["seconds"] for row in rows if row["op"] == op}
        ours = times["bnext"]
        peers = "  ".join(
            f"{label} {seconds / ours:.1f}x"
            for label, seconds in times.items()
            if label not in ("bnext", "memcpy")
        )
        shape = "x".join(map(str, rows[0]["shape"]))
        print(
            f"{rows[0]['case']:22} {shape:16} {op:22} {ours * 1e3:9.3f} ms "
            f"{ours / times['memcpy']:6.2f} memcpy   {peers}",
            flush=True,
        )


def plot(rows: list[dict], path: str, what: str) -> None:
    """Time in units of bnext's, for each operation and shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for axes, op in zip(figure.subplots(2, 2, sharex=True).flat, OPS, strict=True):
        times = {(r["contender"], r["case"]): r["seconds"] for r in rows if r["op"] == op.name}
        for label in dict.fromkeys(row["contender"] for row in rows):
            ratios = [times[label, case] / times["bnext", case] for case in cases]
            style = {"linewidth": 2, "color": "black"} if label == "bnext" else {"marker": "."}
            axes.plot(ratios, label=label, **style)
        axes.set_yscale("log")
        axes.set_ylabel("time / time of bnext")
        axes.set_title(op.name)
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
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--channels-last", action="store_true", help="arrays are (N, H, W, C)")
    parser.add_argument("--fused", action="store_true", help="also fused operations")
    parser.add_argument("--json", help="write every median here")
    parser.add_argument("--plot", help="write a picture of the ratios here")
    options = parser.parse_args()
    options.ops = OPS + FUSED * options.fused

    bnext.set_num_threads(options.threads)
    labels = ["bnext", *(name for name in options.contenders if name != "bnext")]
    classes = available(labels, dtype_of(options.dtype))
    rows: list[dict] = []
    for name, shape in read_shapes(options.only):
        case = list(measure(name, shape, classes, options))
        print_table(case)
        rows += case
        if options.json:  # after each shape: with compilers among the contenders one takes minutes
            facts = {
                "threads": options.threads,
                "backend": _core.backend(),
                "dtype": options.dtype,
                "layout": "nhwc" if options.channels_last else "nchw",
                "rows": rows,
            }
            pathlib.Path(options.json).write_text(json.dumps(facts, indent=1))
    if options.plot:
        layout = "NHWC" if options.channels_last else "NCHW"
        plot(rows, options.plot, f"{options.dtype} {layout}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
