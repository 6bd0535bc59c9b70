"""Batch Renormalization."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnext.nn._normalize import Moments
from bnext.nn._running_stats import _without_initial
from bnext.nn.batchnorm import BatchNorm
from bnext.nn.module import Array, number

__all__ = ["BatchRenorm"]


class BatchRenorm(BatchNorm):
    r"""`BatchNorm` whose training agrees with its evaluation, for small or uneven batches.

    .. math::
        y = \Bigl(\frac{x - \mu_B}{\sigma_B} R + d\Bigr) weight + bias, \quad
        R = \mathrm{clip}\Bigl(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\Bigr), \quad
        d = \mathrm{clip}\Bigl(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\Bigr)

    with the batch's :math:`\mu_B` and :math:`\sigma_B = \sqrt{var_B + eps}` (biased) and the
    running :math:`\mu` and :math:`\sigma`. No gradient goes through R and d. Within the limits y
    is what the running statistics give; with r_max 1 and d_max 0 it is that of `BatchNorm`. The
    running :math:`\sigma` is an average of :math:`\sigma_B`, kept as
    ``running_var = sigma**2 - eps``.

    Parameters
    ----------
    num_features, eps, momentum, affine, and keywords
        As `BatchNorm`; running statistics are always tracked.
    r_max : float, default 3
        At least 1.
    d_max : float, default 5
        At least 0.

    Attributes
    ----------
    r_max, d_max : float
        May be set at any time. The paper begins with 1 and 0, plain batch normalization, for 5,000
        steps, and reaches 3 at step 40,000 and 5 at step 25,000.

    Notes
    -----
    The statistics are needed before the result can be made, so forward reads x twice as often as
    `BatchNorm`; backward costs the same.

    Raises
    ------
    ValueError
        As `BatchNorm`; also for limits out of range.

    References
    ----------
    Ioffe, "Batch renormalization", arXiv:1702.03275, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from bnext import nn
    >>> norm = nn.BatchRenorm(1, r_max=3, d_max=5)
    >>> x = np.array([[1.0], [2.0]], np.float32)
    >>> bool(np.allclose(norm.forward(x)[0], x, atol=1e-4))  # mean 0 and variance 1 so far
    True
    """

    r_max = 3.0
    d_max = 5.0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        r_max: float = r_max,
        d_max: float = d_max,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, **options)
        if not self.track_running_stats:
            raise ValueError("BatchRenorm: track_running_stats: expected True, got False")
        self.r_max = r_max
        self.d_max = d_max
        self._check_limits()

    def _check_limits(self) -> None:
        for name, least in (("r_max", 1), ("d_max", 0)):
            value = number(self.label, name, getattr(self, name))
            if not value >= least:
                raise ValueError(f"{self.label}: {name}: expected {least} or more, got {value}")

    def _sigma(self, var: Array) -> Array:
        sigma: Array = np.sqrt(var.astype(np.float64) + self.eps)
        return sigma

    def _rescale(self, moments: Moments) -> tuple[Array, Array]:
        self._check_limits()
        sigma = self._sigma(self.running_var)
        with np.errstate(divide="ignore", invalid="ignore"):  # sigma 0: as IEEE has it
            ratio = self._sigma(moments.var) / sigma
            shift = (moments.mean - self.running_mean) / sigma
        return (
            np.clip(ratio, 1 / self.r_max, self.r_max),
            np.clip(shift, -self.d_max, self.d_max),
        )

    def _estimates(self, moments: Moments) -> tuple[Array, Array]:
        return moments.mean, moments.var

    def _moved(self, moments: Moments, weight: float) -> tuple[Array, Array]:
        mean, _ = super()._moved(moments, weight)
        sigma = (1 - weight) * self._sigma(self.running_var) + weight * self._sigma(moments.var)
        return mean, np.maximum(np.square(sigma) - self.eps, 0)

    def _collected_var(self) -> Array:
        share, initial = self._share_of_initial, float(np.sqrt(1 + self.eps))
        sigma = _without_initial(self._sigma(self.running_var), share, initial)
        return np.maximum(np.square(sigma) - self.eps, 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"
