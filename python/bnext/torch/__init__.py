"""Modules for PyTorch that run on the core where tensors lie in main memory; see ``docs/torch.md``.

>>> import torch, bnext.torch
>>> norm = bnext.torch.BatchNorm2d(3)  # as torch.nn.BatchNorm2d
>>> norm(torch.randn(8, 3, 4, 4)).shape
torch.Size([8, 3, 4, 4])
"""

from bnext import _extras

_extras.require("torch", "bnext.torch", "torch")

from bnext.torch._accelerate import Report, accelerate, restore  # noqa: E402
from bnext.torch._batch_norm import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)
from bnext.torch._dropout import (  # noqa: E402
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
)
from bnext.torch._sync_batch_norm import SyncBatchNorm  # noqa: E402

__all__ = [
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "Report",
    "SyncBatchNorm",
    "accelerate",
    "restore",
]
