"""The claims of the article that bnext comes from, and what the literature says about each."""

from __future__ import annotations

from typing import NamedTuple

from bnext.study.experiment import Verdict

__all__ = ["CLAIMS", "Claim"]


class Claim(NamedTuple):
    """A statement of the article.

    Attributes
    ----------
    name : str
        "L" and the line of the article, with a letter if a line holds several.
    chinese, english : str
        The original, shortened where it is long, and a translation.
    literature : Verdict
        Of published measurements, independent of ours.
    evidence : str
        What that rests on.
    """

    name: str
    chinese: str
    english: str
    literature: Verdict
    evidence: str


def _table(rows: list[tuple[str, str, str, Verdict, str]]) -> dict[str, Claim]:
    return {row[0]: Claim(*row) for row in rows}


CLAIMS = _table(
    [
        (
            "L7",
            "BN和DO都是促进模型训练和泛化能力提升的有效手段",
            "BN and dropout both are effective means for training and generalisation",
            "refined",
            "MNIST MLP, best of none / dropout / BN 98.79 / 98.81 / 98.68 %; in the CIFAR-10 CNN "
            "dropout always lost (Garbin et al. 2020)",
        ),
        (
            "L10a",
            "使得各层之间的数据分布相互独立",
            "BN makes the distributions of the layers independent of each other",
            "refuted",
            "only mean and variance of each channel are set; BN with noise added after it still "
            "trains well (Santurkar et al. 2018)",
        ),
        (
            "L10b",
            "通常作为激活函数或线性运算后面出现的层进行使用",
            "BN usually comes after the activation or after the linear operation",
            "refined",
            "both work; which is better depends on the architecture (see L41b)",
        ),
        (
            "L10c",
            "帮助训练变得更加稳定、快速、准确，提高梯度下降优化算法的性能",
            "BN makes training more stable, faster and more accurate, and gradient descent better",
            "supported",
            "Inception reaches 72.2 % after 31.0 M steps, with BN after 13.3 M (Ioffe & Szegedy "
            "2015)",
        ),
        (
            "L11",
            "归一化数据输入到每一层",
            "BN normalises what enters each layer",
            "supported",
            "by definition: each channel over batch and positions",
        ),
        (
            "L12",
            "增强模型的鲁棒性，模型的鲁棒性显著提高",
            "BN makes the model much more robust",
            "refined",
            "to the learning rate and the initial weights, yes; not to shifted data",
        ),
        (
            "L18",
            "对当前batch中的所有样本计算均值和方差",
            "Mean and variance are taken over all samples of the batch",
            "supported",
            "by definition",
        ),
        (
            "L19",
            "将样本标准化，即减去均值除以标准差",
            "Samples are standardised: minus the mean, divided by the standard deviation",
            "refined",
            "eps, weight and bias are left out; weight and bias add 0.5 to 2 points on CIFAR-10 "
            "(Frankle et al. 2021)",
        ),
        (
            "L20",
            "对参数求导时，通过代价函数最小化的方式来更新参数",
            "In training, parameters are differentiated and updated by minimising the loss",
            "refined",
            "the gradient has to go through mean and variance, too (Ioffe & Szegedy 2015)",
        ),
        (
            "L21",
            "在测试期间，直接使用训练好的参数对输入数据进行标准化操作",
            "In testing, the trained parameters standardise the inputs",
            "refuted",
            "population statistics do, which are estimated, not trained; weight and bias follow",
        ),
        (
            "L25a",
            "每一层学习特征表示，而不依赖于之前层所学习到的特征表示",
            "Each layer learns features without depending on those of the layers before",
            "refuted",
            "its inputs still come from them",
        ),
        (
            "L25b",
            "能够解决输入数据的分布不一致，导致权重初始化不足的问题",
            "BN solves inconsistent distributions of the inputs and poor initial weights",
            "refined",
            "initial weights yes; a shift between domains hurts BN (Wu & Johnson 2021)",
        ),
        (
            "L25c",
            "能够解决训练过程中梯度消失或爆炸的问题",
            "BN solves vanishing and exploding gradients",
            "refined",
            "with residual connections yes (De & Smith 2020); in plain deep networks gradients "
            "explode with BN (Yang et al. 2019; unchecked)",
        ),
        (
            "L28a",
            "不同层之间的输出误差不再传递",
            "Errors are no longer passed on from layer to layer",
            "refuted",
            "layers are composed as before; the variance shift of dropout adds up (Li et al. 2019)",
        ),
        (
            "L28b",
            "还能有效防止过拟合现象的发生",
            "BN effectively prevents overfitting",
            "refined",
            "a weak regulariser, the weaker the larger the batch (Luo et al. 2019)",
        ),
        (
            "L28c",
            "在一定程度上抑制权重的更新，从而减少模型的复杂度",
            "BN restrains the updates of weights and so reduces the complexity of the model",
            "refuted",
            "before BN the length of weights has no effect; weight decay acts on the effective "
            "learning rate, lr over squared norm (van Laarhoven 2017)",
        ),
        (
            "L31",
            "加快了收敛速度，尤其是在采用更小的学习率时",
            "BN makes convergence faster, especially at smaller learning rates",
            "refuted",
            "the gain comes from large rates: learning rate 1e-4 to 1e-3 takes BN from .827 to "
            ".845 and a plain CNN from .802 to .572 (Garbin et al. 2020)",
        ),
        (
            "L35",
            "假设：当前层的输入数据是标准正态分布",
            "BN assumes that the inputs of a layer are standard normal",
            "refuted",
            "no assumption about the distribution is made",
        ),
        (
            "L36",
            "假设：每一个隐藏节点处于同质性较低的状态，具有高度的可分离性",
            "BN assumes heterogeneous, highly separable hidden units",
            "refuted",
            "what it needs: batches drawn at random, enough values, training and test alike",
        ),
        (
            "L38a",
            "当数据存在某种形式的不平衡现象时，BN就可能失效",
            "BN can fail when the data are imbalanced",
            "refined",
            "the composition of the batches does it: with batches that are not i.i.d. BN 67 %, "
            "batch renormalisation 78.5 % (Ioffe 2017; unchecked)",
        ),
        (
            "L38b",
            "BN层之后的激活函数，如ReLU等，会抑制BN的功效",
            "An activation after BN, such as ReLU, suppresses its effect",
            "refined",
            "CaffeNet: before ReLU .474, after .499; GoogLeNet: before .607, after .596 "
            "(ducha-aiki, caffenet-benchmark)",
        ),
        (
            "L41a",
            "BN最常用的地方就是卷积神经网络中",
            "BN is used most in convolutional networks",
            "supported",
            "common practice",
        ),
        (
            "L41b",
            "一般将BN层置于激活函数ReLU或LeakyReLU之后",
            "BN is put after the activation, ReLU or LeakyReLU",
            "refined",
            "the original is before; it depends on the architecture",
        ),
        (
            "L47a",
            "对整个batch求平均值和方差",
            "Mean and variance are those of the whole mini-batch",
            "refined",
            "the default, not the optimum: ghost batches (Hoffer et al. 2017)",
        ),
        (
            "L47b",
            "BN可以放在网络的任意位置，包括每一层的前或后面",
            "BN can be put anywhere in the network",
            "refuted",
            "ResNet-110, BN before or after the addition: 6.97 or 13.56 % errors; ResNet-20: 8.29 "
            "or 8.34 (gcr, torch-residual-networks)",
        ),
        (
            "L47c",
            "某些层不需要归一化处理，可以跳过，如池化层或者全连接层",
            "Some layers need no normalisation: pooling, fully connected layers, some channels",
            "refined",
            "pooling yes; fully connected layers are an empirical question",
        ),
        (
            "L47d",
            "多个BN层可以提升模型的性能，在ResNet中BN层多于2个",
            "Several BN layers improve the model; ResNet has more than 2",
            "refined",
            "ResNet-50 has 53 (unchecked)",
        ),
        (
            "L51",
            "dropout可以让模型避免过拟合，提高泛化能力",
            "Dropout avoids overfitting and improves generalisation",
            "supported",
            "MNIST: L2 1.62, max-norm 1.35, dropout + L2 1.25, dropout + max-norm 1.05 % errors "
            "(Srivastava et al. 2014)",
        ),
        (
            "L54",
            "dropout的应用场景：模型训练速度",
            "Dropout serves the speed of training",
            "refuted",
            "2 to 3 times slower (Srivastava et al. 2014; unchecked); +17 % time (Garbin et al. "
            "2020)",
        ),
        (
            "L55",
            "dropout的应用场景：防止梯度消失或爆炸",
            "Dropout prevents vanishing or exploding gradients",
            "refuted",
            "no mechanism; dropping whole layers helps (Huang et al. 2016)",
        ),
        (
            "L57a",
            "随机将神经元的输出值置为零，模拟神经元剪枝",
            "Zeroing units at random simulates pruning",
            "refined",
            "an ensemble that shares weights (Srivastava et al. 2014)",
        ),
        (
            "L57b",
            "在测试阶段，依然使用全部的神经元进行计算",
            "In testing all units are used",
            "refined",
            "and outputs are scaled: by q in testing, or by 1/q in training",
        ),
        (
            "L59a",
            "把Dropout用于过拟合问题上，可能会造成模型欠拟合",
            "Dropout can make the model underfit",
            "supported",
            "ViT-T 73.9 to 67.9; dropout in the first part of training only, 74.3 (Liu et al. "
            "2023)",
        ),
        (
            "L59b",
            "为了降低这种风险，可以在Dropout之后添加一个L2正则项",
            "To reduce that risk, add L2 regularisation to dropout",
            "refuted",
            "L2 can only make underfitting worse",
        ),
        (
            "L62",
            "最有效的方法是结合使用这两种方法",
            "The most effective is to combine the two",
            "refuted",
            "not as a rule: DenseNet on CIFAR-100 77.42 to 68.55 with dropout .5 in bottlenecks "
            "(Li et al. 2019); but Wide ResNet 19.25 to 18.85 % errors (Zagoruyko & Komodakis "
            "2016)",
        ),
        (
            "L63",
            "使用更大的学习率",
            "Use a larger learning rate",
            "supported",
            "with BN; it contradicts L31",
        ),
        (
            "L64",
            "使用更小的学习率衰减策略",
            "Use a weaker decay of the learning rate",
            "refuted",
            "Ioffe & Szegedy 2015 decay 6 times faster with BN",
        ),
        (
            "L65",
            "使用BatchNormalization的每层统计量来缩放梯度",
            "Scale gradients by the statistics of each BN layer",
            "refined",
            "makes steps independent of the scale of the weights; not better at good initial "
            "weights",
        ),
        (
            "L66",
            "使用多任务损失函数，如Focal Loss",
            "Use multi-task losses such as focal loss",
            "refuted",
            "focal loss weighs samples of a single task (Lin et al. 2017); for several tasks there "
            "is weighting by uncertainty (Kendall et al. 2018)",
        ),
        (
            "L67",
            "使用dropout和pooling层来减少特征维度",
            "Use dropout and pooling to reduce the dimension of features",
            "refined",
            "pooling does; dropout keeps the shape",
        ),
        (
            "L68",
            "使用更复杂的模型结构，如残差网络ResNet",
            "Use more complex models, such as ResNet",
            "refined",
            "BN makes depth possible; Fixup and SkipInit do without",
        ),
    ]
)
