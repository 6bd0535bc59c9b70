"""Published results that experiments of the study repeat on a small scale."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ANCHORS", "Anchor"]


class Anchor(NamedTuple):
    """A published result.

    Attributes
    ----------
    source : str
    result : str
        With its figures.
    caveat : str
        Why it may come out differently on a small scale, or why it is not repeated.
    """

    source: str
    result: str
    caveat: str


ANCHORS: dict[str, Anchor] = {
    "garbin-bn": Anchor(
        "Garbin et al. 2020, CIFAR-10 CNN",
        "BN .8447 above the plain network .8041",
        "one seed there; a smaller network and fewer epochs here",
    ),
    "garbin-dropout": Anchor(
        "Garbin et al. 2020, CIFAR-10 CNN",
        "dropout .7575 below the plain network .8041",
        "dropout of 0.5 there in all layers; here before the last layer and at most 0.5",
    ),
    "garbin-both": Anchor(
        "Garbin et al. 2020, CIFAR-10 CNN",
        "BN with dropout .8087 below BN alone .8447",
        "dropout between the layers there, before the last layer here, where it does no harm to BN",
    ),
    "groupnorm-bn": Anchor(
        "Wu & He 2018, ImageNet",
        "BN: 23.6 % errors with batches of 32 per device, 34.7 % with 2",
        "a fully connected network has a single value per sample and channel, so small batches "
        "hurt more",
    ),
    "groupnorm-gn": Anchor(
        "Wu & He 2018, ImageNet",
        "at batches of 2, GN 24.1 % errors, BN 34.7 %",
        "groups of hidden units here, of channels there",
    ),
    "renorm-classes": Anchor(
        "Ioffe 2017, ImageNet",
        "with batches that are not i.i.d. BN 67 %, batch renormalisation 78.5 % (unchecked)",
        "sorted by class here, pairs of a class there",
    ),
    "ghost": Anchor(
        "Hoffer et al. 2017, CIFAR-10",
        "at batches of 4096, ghost batches 90.5 %, without 89.3 % (unchecked)",
        "large batches here are of some hundred samples",
    ),
    "add-shallow": Anchor(
        "gcr, torch-residual-networks, CIFAR-10",
        "ResNet-20: BN before the addition 8.29 %, after it 8.34 % errors: the same",
        "residual blocks of a linear layer here",
    ),
    "add-deep": Anchor(
        "gcr, torch-residual-networks, CIFAR-10",
        "ResNet-110: BN before the addition 6.97 %, after it 13.56 % errors",
        "a dozen or two of blocks here, 54 there",
    ),
    "caffenet-order": Anchor(
        "ducha-aiki, caffenet-benchmark",
        "BN before ReLU .474, after it .499",
        "GoogLeNet was the other way round: .607 before, .596 after",
    ),
    "order-dropout": Anchor(
        "Li et al. 2019; Chen et al. 2019",
        "dropout before BN is worse than BN before dropout",
        "wide layers suffer less: the shift falls with the width",
    ),
    "frankle": Anchor(
        "Frankle et al. 2021, CIFAR-10",
        "training nothing but BN's weight and bias reaches 82 % in a deep ResNet, far above chance",
        "a small network with few BN parameters here",
    ),
    "mc-dropout": Anchor(
        "a repository of MC dropout",
        "averaging 30 passes with dropout lowers the calibration error, .0376 to .0319",
        "small networks are hardly overconfident",
    ),
    "srivastava": Anchor(
        "Srivastava et al. 2014, MNIST",
        "dropout with max-norm 1.05 % errors, L2 alone 1.62 %",
        "far less training here",
    ),
    "early-dropout": Anchor(
        "Liu et al. 2023, ViT-T",
        "dropout in the first part of training only 74.3 %, throughout 67.9 %",
        "a narrow fully connected network here",
    ),
}

NOT_REPEATED: tuple[tuple[str, str, str], ...] = (
    (
        "He et al. 2016, ResNet-110",
        "BN before the addition 6.61 %, after 8.17 %, pre-activation 6.37 % errors",
        "the gcr figures stand for it",
    ),
    (
        "Fixup ResNet-110",
        "7.24 % errors, BN 6.61 % (unchecked)",
        "Fixup is not part of bnext",
    ),
    (
        "Stochastic depth",
        "6.41 to 5.23 % errors at depth 110",
        "needs depths that small data does not",
    ),
    (
        "DropBlock, ResNet-50",
        "none 76.51, dropout 76.80, spatial 77.41, DropBlock 78.13 % (unchecked)",
        "needs images larger than 28 x 28 and deep features",
    ),
    ("RetinaNet, focal loss", "31.1 to 34.0 AP (unchecked)", "a detector"),
)
