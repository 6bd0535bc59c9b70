"""A training step in PyTorch before and after `bnext.torch.accelerate`.

Both models start from the same weights, see the same batch and take turns. Their losses are
compared before anything is timed. Peak memory is that of one more step in a process of its own.
A third model, in which nothing stands for BatchNorm, activations and Dropout, shows what there is
to be gained.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnext
import bnext.torch


# -- the networks, as their papers have them -------------------------------------------------------
def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def resnet(block: Any, depths: list[int], size: int) -> nn.Sequential:
    """He et al., 2016; for small images with the first layers of their CIFAR network."""
    if size < 64:
        layers = [conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    else:
        layers = [conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
                  nn.MaxPool2d(3, 2, 1)]  # fmt: skip
    inputs = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            width = 64 << stage
            layers.append(block(inputs, width, 2 if stage and not i else 1))
            inputs = width * block.expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [conv(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU6(inplace=True)]
        layers += [conv(width, width, 3, stride, width), nn.BatchNorm2d(width)]
        layers += [nn.ReLU6(inplace=True), conv(width, outputs, 1), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2(size: int) -> nn.Sequential:
    """Sandler et al., 2018; for small images with less stride at the start."""
    small = size < 64
    layers = [conv(3, 32, 3, 1 if small else 2), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
    inputs = 32
    for expand, outputs, count, stride in [
        (1, 16, 1, 1), (6, 24, 2, 1 if small else 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ]:  # fmt: skip
        for i in range(count):
            layers.append(Inverted(inputs, outputs, 1 if i else stride, expand))
            inputs = outputs
    layers += [conv(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 10)]
    return nn.Sequential(*layers)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth, 3)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu(self.norm1(x)))
        new = self.drop(self.conv2(self.relu(self.norm2(new))))
        return torch.cat([x, new], 1)


def densenet(size: int, growth: int = 12, depth: int = 16, drop: float = 0.2) -> nn.Sequential:
    """Huang et al., 2017: DenseNet-BC with 100 layers, growth 12 and dropout 0.2, for CIFAR."""
    inputs = 2 * growth
    layers: list[nn.Module] = [conv(3, inputs, 3)]
    for stage in range(3):
        for _ in range(depth):
            layers.append(DenseLayer(inputs, growth, drop))
            inputs += growth
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        if stage < 2:
            layers += [conv(inputs, inputs // 2, 1), nn.Dropout(drop), nn.AvgPool2d(2)]
            inputs //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class EncoderLayer(nn.Module):
    """Devlin et al., 2019: with dropout after attention, on its weights, and after the MLP."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop_weights, self.drop1, self.drop2 = (nn.Dropout(drop) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        attended = self.drop_weights(scores.softmax(-1)) @ v
        attended = attended.transpose(1, 2).reshape(n, length, width)
        x = self.norm1(x + self.drop1(self.out(attended)))
        return self.norm2(x + self.drop2(self.down(F.gelu(self.up(x)))))


class Encoder(nn.Module):
    """BERT base with some of its twelve layers: each costs the same."""

    def __init__(self, layers: int = 4, width: int = 768, drop: float = 0.1) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(30522, width), nn.Embedding(512, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(drop)
        self.layers = nn.Sequential(
            *(EncoderLayer(width, width // 64, drop) for _ in range(layers))
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.words(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.layers(self.drop(self.norm(embedded)))[:, 0])


# name: (network, batch, image size or length)
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], int, int]] = {
    "resnet18-32": (lambda size: resnet(Basic, [2, 2, 2, 2], size), 32, 32),
    "resnet50-32": (lambda size: resnet(Bottleneck, [3, 4, 6, 3], size), 16, 32),
    "resnet18-224": (lambda size: resnet(Basic, [2, 2, 2, 2], size), 8, 224),
    "resnet50-224": (lambda size: resnet(Bottleneck, [3, 4, 6, 3], size), 4, 224),
    "mobilenetv2-32": (mobilenet_v2, 32, 32),
    "mobilenetv2-224": (mobilenet_v2, 8, 224),
    "densenet100-32": (densenet, 16, 32),
    "bert-128": (lambda size: Encoder(), 8, 128),
    "bert-512": (lambda size: Encoder(), 2, 512),
}


def model_and_batch(name: str, channels_last: bool) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, batch, size = NETWORKS[name]
    model = build(size).train()
    labels = torch.randint(10, (batch,))
    if name.startswith("bert"):
        return model, torch.randint(30522, (batch, size)), labels
    x = torch.randn(batch, 3, size, size)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(
            memory_format=torch.channels_last
        )  # fmt: skip
    return model, x, labels


def step_of(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> float:
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def bare(model: nn.Module) -> nn.Module:
    """Without what bnext does."""
    ours = nn.BatchNorm2d | nn.ReLU | nn.ReLU6 | nn.Dropout
    for parent in list(model.modules()):
        for child, module in parent.named_children():
            if isinstance(module, ours):
                setattr(parent, child, nn.Identity())
    return model


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    model, x, labels = model_and_batch(name, args.channels_last)
    other, report = bnext.torch.accelerate(copy.deepcopy(model), fuse=not args.no_fuse)

    # Without masks both do the same. In float64: a float32 gradient of an untrained network of 50
    # layers is a percent off, whoever computes it.
    part = x[:4].double() if x.is_floating_point() else x[:4]
    same = [
        step_of(without_dropout(copy.deepcopy(m)).double(), part, labels[:4])
        for m in (model, other)
    ]
    losses = [[step() for step in same] for _ in range(2)]
    for before, after in losses:
        assert abs(before - after) <= 1e-9 * max(1.0, abs(before)), losses

    models = {"PyTorch": model, "accelerated": other, "bare": bare(copy.deepcopy(model))}
    steps = {which: step_of(m, x, labels) for which, m in models.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {which: [] for which in steps}
    for repeat in range(args.repeats):
        # Whoever runs second finds the caches full of the other's data: change the order.
        for which in list(steps) if repeat % 2 else list(reversed(steps)):
            start = time.perf_counter()
            steps[which]()
            times[which].append(time.perf_counter() - start)
    compared = ("PyTorch", "accelerated")
    memory = {which: peak(name, which, args) for which in compared} if args.memory else {}
    medians = {which: statistics.median(values) for which, values in times.items()}
    return {
        "network": name,
        "batch": list(x.shape),
        "threads": args.threads,
        "channels_last": args.channels_last,
        "milliseconds": {which: round(1e3 * value, 1) for which, value in medians.items()},
        "quartiles": {
            which: [round(1e3 * q, 1) for q in statistics.quantiles(values, n=4)]
            for which, values in times.items()
        },
        "speedup": round(medians["PyTorch"] / medians["accelerated"], 2),
        "bound": round(medians["PyTorch"] / medians["bare"], 2),
        "peak_MiB": memory,
        "fused": len(report.fused),
        "replaced": len(report.replaced),
        "losses": losses,
    }


def peak(name: str, which: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, name, "--peak", which, "--threads", str(args.threads)]
    command += ["--channels-last"] if args.channels_last else []
    command += ["--no-fuse"] if args.no_fuse else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, which: str, args: argparse.Namespace) -> None:
    """Most memory that three steps take, beyond what the model and the batch do."""
    model, x, labels = model_and_batch(name, args.channels_last)
    if which != "PyTorch":
        bnext.torch.accelerate(model, fuse=not args.no_fuse)
    step = step_of(model, x, labels)
    before = resident("VmRSS")
    for _ in range(3):
        step()
    print(round(resident("VmHWM") - before))


def resident(key: str) -> float:
    """Memory of this process in MiB, now (VmRSS) or at most so far (VmHWM)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--threads", type=int, default=bnext.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--memory", action="store_true", help="also the peak memory")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(args.networks[0], args.peak, args)
        return
    for name in args.networks or NETWORKS:
        print(json.dumps(measure(name, args)), flush=True)


if __name__ == "__main__":
    main()
