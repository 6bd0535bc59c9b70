"""The operations on NumPy arrays: the functions of the C++ core, as they are."""

from bnext._core import (
    BatchNormGrads,
    BatchNormSaved,
    DropoutSaved,
    activations,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_inference,
    dropout_backward,
    dropout_forward,
)

__all__ = [
    "BatchNormGrads",
    "BatchNormSaved",
    "DropoutSaved",
    "activations",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "dropout_backward",
    "dropout_forward",
]
