"""Layers: ``y = layer(x)`` evaluates, ``y, backward = layer.forward(x)`` trains."""

from bnext.nn._running_stats import stats_updates, use_bank
from bnext.nn.activation import GELU, Hardswish, LeakyReLU, ReLU, ReLU6, SiLU
from bnext.nn.alpha_dropout import AlphaDropout, FeatureAlphaDropout
from bnext.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnext.nn.batchrenorm import BatchRenorm
from bnext.nn.container import Residual, Sequential
from bnext.nn.conv2d import Conv2d
from bnext.nn.drop_block import DropBlock2d
from bnext.nn.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath
from bnext.nn.flatten import Flatten
from bnext.nn.gaussian_dropout import GaussianDropout
from bnext.nn.input_statistics import InputStatistics
from bnext.nn.linear import Linear
from bnext.nn.module import Module, Parameter
from bnext.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d

__all__ = [
    "GELU",
    "AlphaDropout",
    "AvgPool2d",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "Conv2d",
    "DropBlock2d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "Flatten",
    "GaussianDropout",
    "GlobalAvgPool2d",
    "Hardswish",
    "InputStatistics",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "Module",
    "Parameter",
    "ReLU",
    "ReLU6",
    "Residual",
    "Sequential",
    "SiLU",
    "stats_updates",
    "use_bank",
]
