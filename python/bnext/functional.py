"""The operations on NumPy arrays: the functions of the C++ core, and what is made of them.

Data are float32, float64, float16 or bfloat16 (of ml_dtypes); results are like them. What belongs
to channels is float64 for float64, else float32. Half types are computed as float32 and rounded
once.
"""

from bnext._core import (
    BatchNormGrads,
    BatchNormSaved,
    DropoutSaved,
    activations,
    alpha_dropout_forward,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_inference,
    dropout_backward,
    dropout_forward,
    dropout_mask,
    gaussian_dropout_noise,
)
from bnext._drop_block import (
    DropBlock2dSaved,
    drop_block2d_backward,
    drop_block2d_forward,
    drop_block2d_mask,
)
from bnext._dropout import (
    alpha_dropout_backward,
    channel_dropout_backward,
    channel_dropout_forward,
    channel_dropout_mask,
    drop_path_backward,
    drop_path_forward,
    drop_path_mask,
    feature_alpha_dropout_backward,
    feature_alpha_dropout_forward,
)
from bnext._gaussian_dropout import (
    GaussianDropoutSaved,
    gaussian_dropout_backward,
    gaussian_dropout_forward,
)

mask = dropout_mask

__all__ = [
    "BatchNormGrads",
    "BatchNormSaved",
    "DropBlock2dSaved",
    "DropoutSaved",
    "GaussianDropoutSaved",
    "activations",
    "alpha_dropout_backward",
    "alpha_dropout_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "channel_dropout_backward",
    "channel_dropout_forward",
    "channel_dropout_mask",
    "drop_block2d_backward",
    "drop_block2d_forward",
    "drop_block2d_mask",
    "drop_path_backward",
    "drop_path_forward",
    "drop_path_mask",
    "dropout_backward",
    "dropout_forward",
    "dropout_mask",
    "feature_alpha_dropout_backward",
    "feature_alpha_dropout_forward",
    "gaussian_dropout_backward",
    "gaussian_dropout_forward",
    "gaussian_dropout_noise",
    "mask",
]
