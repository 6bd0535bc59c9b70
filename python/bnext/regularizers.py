"""Regularizers of weights: a penalty on their squares, a limit for the norm of each unit.

Weight decay is an option of the optimizers, and so is the limit (`max_norm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from bnext.nn.module import Array, Parameter, number

__all__ = ["l2_penalty", "max_norm"]

Parameters = Iterable[tuple[str, Parameter]] | Iterable[Parameter]
"""What ``module.named_parameters()`` and ``module.parameters()`` give."""


def l2_penalty(parameters: Parameters, strength: float) -> tuple[float, Callable[..., None]]:
    r"""Half the squared norm of the weights, times `strength`; to be added to a loss.

    .. math:: L = \frac\lambda2 \sum_w w^2, \qquad \frac{\partial L}{\partial w} = \lambda\, w

    The gradient is what ``weight_decay=strength`` of `SGD` and `Adam` adds; the penalty also has
    a value to show. (The decoupled decay of `AdamW` is not a gradient.)

    Parameters
    ----------
    parameters : iterable of Parameter or of (name, Parameter)
        Those without `decay`, the biases and BatchNorm's parameters, are left out.
    strength : float
        :math:`\lambda`, >= 0.

    Returns
    -------
    loss : float
        Summed in float64.
    backward : callable
        ``backward(grad_loss=1.0)`` adds into the parameters' ``.grad``.

    References
    ----------
    Goodfellow, Bengio & Courville, "Deep learning", section 7.1.1.

    Examples
    --------
    >>> weight = Parameter(np.array([3.0, 4.0]))
    >>> loss, backward = l2_penalty([weight], 0.1)
    >>> loss
    1.25
    >>> backward()
    >>> weight.grad
    array([0.3, 0.4])
    """
    if not 0 <= number("l2_penalty", "strength", strength) < np.inf:
        raise ValueError(f"l2_penalty: strength: expected a finite number >= 0, got {strength!r}")
    weights = [parameter for parameter in _listed("l2_penalty", parameters) if parameter.decay]
    squares = sum(float(np.square(w.data, dtype=np.float64).sum()) for w in weights)

    def backward(grad_loss: float = 1.0) -> None:
        for weight in weights:
            weight.accumulate(weight.data * weight.data.dtype.type(strength * grad_loss))

    return strength / 2 * squares, backward


def max_norm(parameters: Parameters, limit: float) -> None:
    r"""Shorten the weights of each unit to the norm `limit`, in place, where they are longer.

    .. math:: w_o \leftarrow w_o \min\Bigl(1, \frac{c}{\lVert w_o \rVert_2}\Bigr)

    :math:`w_o` are the incoming weights of one unit: a row of a `Linear` weight, the kernels of
    one output channel of a `Conv2d`. To be called after each step, or given to the optimizer:
    ``SGD(..., max_norm=3)``.

    Parameters
    ----------
    parameters : iterable of Parameter or of (name, Parameter)
        Those with fewer than two dimensions are left alone.
    limit : float
        c, > 0; 3 or 4 are usual with dropout.

    References
    ----------
    Srivastava et al., "Dropout", JMLR 15 (2014), section 5.1.

    Examples
    --------
    >>> weight = Parameter(np.array([[3.0, 4.0], [0.3, 0.4]]))
    >>> max_norm([weight], 1)
    >>> weight.data
    array([[0.6, 0.8],
           [0.3, 0.4]])
    """
    limit = checked_limit("max_norm", "limit", limit)
    for parameter in _listed("max_norm", parameters):
        clip_unit_norms(parameter.data, limit)


def clip_unit_norms(data: Array, limit: float) -> None:
    """What `max_norm` does to one array; rows within the limit keep their bits."""
    if data.ndim < 2 or not data.size:
        return
    rows = data.reshape(len(data), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
        huge = np.isinf(norms)  # not of float32, whose squares float64 has room for
        if huge.any():
            largest = abs(rows[huge]).max(axis=1)
            shares = rows[huge] / largest[:, np.newaxis]
            norms[huge] = largest * np.sqrt(np.square(shares).sum(axis=1))
    long = norms > limit
    factors = (limit / norms[long]).astype(data.dtype)
    data[long] *= factors.reshape(-1, *[1] * (data.ndim - 1))


def checked_limit(where: str, name: str, limit: float) -> float:
    """`limit` as a float; ValueError unless it is finite and above 0."""
    if not 0 < number(where, name, limit) < np.inf:
        raise ValueError(f"{where}: {name}: expected a finite number > 0, got {limit!r}")
    return float(limit)


def _listed(where: str, parameters: Parameters) -> list[Parameter]:
    if not isinstance(parameters, Iterable):
        raise TypeError(
            f"{where}: parameters: expected several, got one {type(parameters).__name__}"
        )
    found = [item[1] if isinstance(item, tuple) else item for item in parameters]
    for parameter in found:
        if not isinstance(parameter, Parameter):
            raise TypeError(
                f"{where}: parameters: expected Parameters or (name, Parameter) pairs, "
                f"got {type(parameter).__name__}"
            )
    return found
