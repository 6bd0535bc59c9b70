"""What `bnext.doctor` looks for: one row for each code, and nothing about a code elsewhere.

How a figure is measured stands in `_static` and `_measured`; each code has a page in
``docs/doctor/`` that the tests compare with this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["RULES", "Rule", "rule"]


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes
    ----------
    code, title : str
    figure : str
        What is measured, with its symbol.
    side : "above" or "below"
        Where a figure is a finding, seen from the thresholds.
    threshold : float
        Beyond it, a finding.
    critical : float or None
        Beyond it, a critical finding.
    meaning, advice : str
    needs : str
        What a figure cannot be had without: "" (the network and the shape of its input), "data",
        "labels", "initial" or "validation".
    source : str
        Of the rule and its threshold.
    """

    code: str
    title: str
    figure: str
    side: str
    threshold: float
    critical: float | None
    meaning: str
    advice: str
    needs: str
    source: str

    def severity(self, figure: float) -> str | None:
        """ "critical", "warning" or None; None for NaN, which is no figure at all."""

        def beyond(limit: float) -> bool:
            return figure > limit if self.side == "above" else figure < limit

        if self.critical is not None and beyond(self.critical):
            return "critical"
        return "warning" if beyond(self.threshold) else None

    @property
    def limits(self) -> str:
        """The thresholds in words."""
        text = f"{self.side} {self.threshold:g}"
        return text if self.critical is None else f"{text} (critical: {self.critical:g})"


GAP_OF_MEAN = 0.2
"""BNX201: shift in units of sigma that counts as 1 in the gap."""
GAP_OF_VAR = 1.2
"""BNX201: variance ratio that counts as 1 there."""

RULES: dict[str, Rule] = {
    row.code: row
    for row in (
        # -- before training: the network, the shape of its input, the sizes of batches ----------
        Rule(
            "BNX101",
            "one value per channel",
            "m, values per channel in the smallest batch",
            "below",
            2,
            2,
            "In training the variance of one value is 0: BatchNorm raises an error, or returns "
            "its bias whatever comes in.",
            "Use batches of 2 or more samples; drop or merge a last batch of one; or freeze the "
            "layer's statistics.",
            "",
            "pytorch/pytorch#4534, #7716",
        ),
        Rule(
            "BNX102",
            "few values per channel",
            "m, values per channel in a batch",
            "below",
            16,
            8,
            "The batch variance of so few values is off by a third or more even if they are "
            "independent: sqrt(2 / m).",
            "Use larger batches, synchronized BatchNorm, BatchRenorm or GroupNorm.",
            "",
            "relative standard error of the variance of normal values; Wu & He, arXiv:1803.08494",
        ),
        Rule(
            "BNX103",
            "small last batch",
            "m, values per channel in the last batch",
            "below",
            8,
            None,
            "The last batch of an epoch is much smaller than the others, and its noisy statistics "
            "count as much as theirs; they are the last to enter the running statistics.",
            "Drop the last batch, or choose a batch size with a larger remainder.",
            "",
            "as BNX102",
        ),
        Rule(
            "BNX104",
            "bias without effect before BatchNorm",
            "channels with such a bias",
            "above",
            0,
            None,
            "BatchNorm subtracts the mean, and with it the bias of the layer before: the bias is "
            "trained, stored and updated for nothing.",
            "Make the layer with bias=False.",
            "",
            "Ioffe & Szegedy, arXiv:1502.03167, section 3.2",
        ),
        Rule(
            "BNX105",
            "BatchNorm directly after Dropout",
            "R, predicted variance in evaluation / in training",
            "below",
            1,
            0.67,
            "Dropout raises the variance of what BatchNorm sees in training; in evaluation, "
            "without dropout, the running variance is too large.",
            "Put Dropout after the last BatchNorm, or BatchNorm before Dropout.",
            "",
            "Li et al., arXiv:1801.05134",
        ),
        Rule(
            "BNX106",
            "Dropout before BatchNorm, one layer between",
            "R, predicted variance in evaluation / in training",
            "below",
            0.8,
            0.67,
            "The variance that Dropout adds goes through the layer between, and BatchNorm's "
            "running variance is too large for evaluation.",
            "Put Dropout after the last BatchNorm, lower its p, widen the layer, or call "
            "bnext.reestimate after training.",
            "",
            "Li et al., arXiv:1801.05134",
        ),
        Rule(
            "BNX107",
            "momentum looks like another convention's",
            "momentum, the weight of the new batch (0 counts as 1)",
            "above",
            0.5,
            None,
            "Here and in PyTorch momentum weighs the new batch: 0.99 forgets all batches but the "
            "last, and 0 never moves the running statistics.",
            "What Keras calls momentum 0.99 is 0.01 here; the default is 0.1.",
            "",
            "pytorch/pytorch#60528; kazuto1011/deeplab-pytorch#79",
        ),
        Rule(
            "BNX108",
            "few images in a batch",
            "samples in a batch, of several values per channel each",
            "below",
            8,
            4,
            "Values of one image are alike, and of few images there are few different ones, "
            "however many values a channel has: error rises from batches of 8 on, steeply from 4.",
            "Use larger batches, synchronized BatchNorm, BatchRenorm or GroupNorm.",
            "",
            "Wu & He, arXiv:1803.08494, table 2: 23.7, 24.8, 27.3, 34.7 % error at 16, 8, 4, 2",
        ),
        # -- measured on data ------------------------------------------------------------------
        Rule(
            "BNX201",
            "running statistics are not those of the data",
            f"gap, the larger of |mean shift| / sigma / {GAP_OF_MEAN:g} and |log variance ratio| / "
            f"log {GAP_OF_VAR:g}",
            "above",
            1,
            4,
            "Evaluation normalizes by statistics that the layer's input does not have, and the "
            "loss falls when they are measured anew.",
            "Call bnext.reestimate (torch.optim.swa_utils.update_bn); train longer, raise the "
            "momentum, or look for data that differ between training and here.",
            "data",
            "Wu & Johnson, arXiv:2105.07576, section 3; thresholds derived",
        ),
        Rule(
            "BNX202",
            "batch variance is unreliable",
            "RSE, relative standard error of the batch variance",
            "above",
            0.35,
            0.5,
            "From batch to batch the variance is off by so much that each sample's output "
            "depends on its neighbours: training is noisy and running statistics are a guess.",
            "Use larger batches, synchronized BatchNorm, BatchRenorm or GroupNorm.",
            "data",
            "derived; the region where BatchNorm falls behind in Wu & He, arXiv:1803.08494",
        ),
        Rule(
            "BNX203",
            "constant channels",
            "share of channels with variance below 10 eps",
            "above",
            0,
            0.5,
            "There is nothing to normalize: the output is the bias, or what eps and rounding "
            "make of noise.",
            "Remove the channel or the layer; look for dead units or zero weights before it.",
            "data",
            "derived",
        ),
        Rule(
            "BNX204",
            "dead channels",
            "share of channels whose ReLU passes less than 0.1 % of the values",
            "above",
            0.1,
            0.5,
            "These channels are 0 for all inputs, and get no gradient to come back.",
            "Lower the learning rate, use LeakyReLU, look at BatchNorm's bias: a channel is dead "
            "where bias / |weight| is below -3.",
            "data",
            "derived",
        ),
        Rule(
            "BNX205",
            "variance shift between training and evaluation",
            "R, variance of the input without dropout / with dropout",
            "below",
            0.8,
            0.67,
            "Dropout before this layer makes its input vary more in training than in evaluation; "
            "the running variance fits training.",
            "Put Dropout after the last BatchNorm, lower its p, or call bnext.reestimate after "
            "training.",
            "data",
            "Li et al., arXiv:1801.05134; p = 0.1 before ReLU gives 0.86, p = 0.2 gives 0.73",
        ),
        Rule(
            "BNX206",
            "evaluation is worse than training on the same data",
            "ratio of the losses, with running and with batch statistics, without dropout",
            "above",
            1.1,
            2,
            "Only the statistics differ between the two: the running ones are wrong, or batches "
            "tell the network something that single samples do not.",
            "Call bnext.reestimate; if that does not help, shuffle, or use BatchRenorm.",
            "labels",
            "Singh & Shrivastava, arXiv:1904.06031; pytorch/pytorch#4741; threshold derived",
        ),
        Rule(
            "BNX207",
            "batches are not random samples",
            "F, variance of batch means / what random batches would have",
            "above",
            2,
            10,
            "Samples of a batch are more alike than samples of the data: batch statistics are "
            "those of a class or a source.",
            "Shuffle; where that cannot be, use BatchRenorm or freeze the statistics.",
            "data",
            "analysis of variance; Ioffe, arXiv:1702.03275, section 4.3",
        ),
        Rule(
            "BNX208",
            "weights of BatchNorm near 0",
            "share of channels with |weight| below 1 % of the 90th percentile",
            "above",
            0.33,
            0.67,
            "These channels are switched off: the layer is narrower than it looks.",
            "Prune them; see that weight decay spares BatchNorm's weight.",
            "data",
            "Frankle et al., arXiv:2003.00152: a third, where only BatchNorm is trained",
        ),
        Rule(
            "BNX209",
            "heavy tails",
            "excess kurtosis of the input, median over channels",
            "above",
            10,
            50,
            "A few large values make the variance of a batch, and whether they are in it is "
            "chance.",
            "Use larger batches, clip or transform the input, look at its scale.",
            "data",
            "derived: RSE = sqrt((kurtosis + 2) / m)",
        ),
        Rule(
            "BNX210",
            "weights before BatchNorm have grown",
            "growth, norm of the weights now / at the beginning",
            "above",
            3,
            None,
            "BatchNorm cancels the scale of these weights, and the effective learning rate falls "
            "with its square: by 9 at a growth of 3.",
            "Use weight decay, or a larger learning rate.",
            "initial",
            "van Laarhoven, arXiv:1706.05350",
        ),
        Rule(
            "BNX211",
            "underfitting with dropout",
            "training accuracy, where validation is less than 1 point behind",
            "below",
            0.95,
            None,
            "The network does no better on what it was trained on than on other data, and "
            "dropout keeps it from learning more.",
            "Lower p, or stop dropout earlier; bnext.compare shows whether it helps.",
            "validation",
            "Liu et al., arXiv:2303.01500; thresholds derived",
        ),
        Rule(
            "BNX212",
            "values that are not finite",
            "parameters, buffers and inputs of BatchNorm that are NaN or infinite",
            "above",
            0,
            0,
            "What comes after them is not finite either, and other figures of the layer are "
            "missing.",
            "Go back to a checkpoint before, lower the learning rate, look at the data; "
            "PyTorch's running statistics keep a NaN for ever.",
            "data",
            "pytorch/pytorch#1206",
        ),
    )
}


def rule(code: str) -> Rule:
    """The row of `code`.

    Raises
    ------
    ValueError
        If there is none; says which there are.
    """
    if code not in RULES:
        raise ValueError(f"doctor: code: expected one of {', '.join(RULES)}, got {code!r}")
    return RULES[code]


# -- what figures are made with ---------------------------------------------------------
STANDARD_ERRORS = 2.0
"""BNX201, BNX206: by so many the one loss is above the other, sample by sample."""
CONSTANT = 10.0
"""BNX203: a channel whose variance is below so many eps is constant."""
PASSES = 0.001
"""BNX204: a channel is dead if it passes less than this share of the values."""
LEAST_VALUES = 1000
"""BNX204: values of a channel that it takes to see so small a share."""
LEAST_LOSS = 0.1
"""BNX206: difference of losses, in nats per sample, below which their ratio means nothing."""
LEAST_BATCHES = 4
"""BNX207: batches that F needs."""
NEAR_ZERO = 0.01
"""BNX208: weights below this part of the 90th percentile are near 0."""
LEAST_CHANNELS = 8
"""BNX204, BNX208: channels that it takes to speak of a share of them."""
BEHIND = 0.01
"""BNX211: validation accuracy behind that in training, below which nothing is learned by heart."""


def chance_of_imbalance(batches: int) -> float:
    """BNX207: F that random batches stay below: 1 and four standard deviations of F."""
    return 1 + 4 * math.sqrt(2 / (batches - 1))
