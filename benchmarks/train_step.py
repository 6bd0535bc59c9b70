"""One training step of the default ResNet: bnext against the same network in PyTorch eager.

Both start from the same weights, see the same batch, use the same number of threads and take turns.
Their losses are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

import bnext
from bnext import models, nn
from bnext.losses import softmax_cross_entropy
from bnext.nn.module import Module
from bnext.optim import SGD

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


class TorchResidual(torch.nn.Module):
    def __init__(self, layer: nn.Residual) -> None:
        super().__init__()
        self.body = to_torch(layer.body)
        self.shortcut = None if layer.shortcut is None else to_torch(layer.shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


def to_torch(layer: Module) -> torch.nn.Module:
    """The same layer in PyTorch, with copies of its weights."""
    if isinstance(layer, nn.Sequential):
        return torch.nn.Sequential(*(to_torch(child) for child in layer))
    if isinstance(layer, nn.Residual):
        return TorchResidual(layer)
    if isinstance(layer, nn.GlobalAvgPool2d):
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    if isinstance(layer, nn.Conv2d):
        other: torch.nn.Module = torch.nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            bias=layer.bias is not None,
        )
    elif isinstance(layer, nn.MaxPool2d):
        return torch.nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding)
    elif isinstance(layer, nn.Linear):
        other = torch.nn.Linear(layer.in_features, layer.out_features)
    elif isinstance(layer, nn.BatchNorm):
        other = torch.nn.BatchNorm2d(layer.num_features)
        if layer.activation:
            return torch.nn.Sequential(other, torch.nn.ReLU(inplace=True))
    else:
        raise TypeError(f"no PyTorch layer for {layer}")
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            getattr(other, name).copy_(torch.from_numpy(parameter.data))
    return other


def steps(model: Module, x: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], float]]:
    """A function for each library that takes one step and returns the loss before it."""
    other = to_torch(model).train()
    x_torch, labels_torch = torch.from_numpy(x), torch.from_numpy(labels)
    optimizer = SGD(
        model.named_parameters(), LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    decay = [p for p in other.parameters() if p.ndim > 1]
    rest = [p for p in other.parameters() if p.ndim == 1]
    other_optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0}],
        LR,
        momentum=MOMENTUM,
        nesterov=True,
    )

    def bnext_step() -> float:
        optimizer.zero_grad()
        logits, backward = model.forward(x)
        loss, loss_backward = softmax_cross_entropy(logits, labels)
        backward(loss_backward())
        optimizer.step()
        return loss

    def torch_step() -> float:
        other_optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(other(x_torch), labels_torch)
        loss.backward()
        other_optimizer.step()
        return loss.item()

    return {"bnext": bnext_step, "PyTorch": torch_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=bnext.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--depth", type=int, help="of the ResNet; default: its own")
    parser.add_argument("--width", type=int, help="of the ResNet; default: its own")
    args = parser.parse_args()

    bnext.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    bnext.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.batch, 1, 28, 28)).astype(np.float32)
    labels = rng.integers(0, 10, args.batch)
    model = models.build("resnet", x.shape[1:], 10, depth=args.depth, width=args.width)
    both = steps(model, x, labels)

    # Warm-up, and the check that both do the same. Rounding grows from step to step.
    for step in range(3):
        losses = {name: run() for name, run in both.items()}
        print(f"loss {step}: " + "  ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
        np.testing.assert_allclose(losses["bnext"], losses["PyTorch"], rtol=1e-4)

    times: dict[str, list[float]] = {name: [] for name in both}
    for repeat in range(args.repeats):
        # Whoever runs second finds the caches full of the other's data: change the order.
        for name in list(both) if repeat % 2 else reversed(both):
            start = time.perf_counter()
            both[name]()
            times[name].append(time.perf_counter() - start)
        if sys.stderr.isatty():
            print(f"\r{repeat + 1}/{args.repeats}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)

    count = sum(parameter.data.size for parameter in model.parameters())
    print(
        f"input {x.shape}, {count:,} parameters, {args.threads} threads, torch {torch.__version__}"
    )
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(
            f"{name:8} median {middle * 1e3:7.1f} ms   quartiles {low * 1e3:.1f} {high * 1e3:.1f}"
        )
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"bnext / PyTorch: {medians['bnext'] / medians['PyTorch']:.2f}")


if __name__ == "__main__":
    main()
