"""Layers: ``y = layer(x)`` evaluates, ``y, backward = layer.forward(x)`` trains."""

from bnext.nn._running_stats import stats_updates, use_bank
from bnext.nn.activation import LeakyReLU, ReLU
from bnext.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnext.nn.batchrenorm import BatchRenorm
from bnext.nn.container import Residual, Sequential
from bnext.nn.conv2d import Conv2d
from bnext.nn.dropout import Dropout, Dropout2d
from bnext.nn.flatten import Flatten
from bnext.nn.input_statistics import InputStatistics
from bnext.nn.linear import Linear
from bnext.nn.module import Module, Parameter
from bnext.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d

__all__ = [
    "AvgPool2d",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "Conv2d",
    "Dropout",
    "Dropout2d",
    "Flatten",
    "GlobalAvgPool2d",
    "InputStatistics",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "Module",
    "Parameter",
    "ReLU",
    "Residual",
    "Sequential",
    "stats_updates",
    "use_bank",
]
