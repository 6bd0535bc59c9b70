from bnext.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnext.nn.dropout import Dropout, Dropout2d
from bnext.nn.module import Module, Parameter
