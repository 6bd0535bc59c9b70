"""Gradients of a layer against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bnext.nn import Module


def gradcheck(
    module: Module,
    x: np.ndarray,
    *,
    before: Callable[[], object] = lambda: None,
    eps: float = 1e-5,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    checked: int = 100,
) -> None:
    """Check ``backward`` for `x` and for every parameter of `module`, in float64.

    The loss is a fixed random weighting of the output, so that no error cancels. Up to
    `checked` elements of each array are moved by +-`eps`. `before` runs before every forward
    pass; it should restore whatever state makes two passes differ. Choose `x` away from kinks.
    """
    assert x.dtype == np.float64
    rng = np.random.default_rng(7)
    module.zero_grad()
    before()
    x_before = x.copy()
    y, backward = module.forward(x)
    weights = rng.normal(size=y.shape)
    grad_y = weights.copy()
    grad_x = backward(grad_y)
    np.testing.assert_array_equal(x, x_before, err_msg="forward or backward changed its input")
    np.testing.assert_array_equal(grad_y, weights, err_msg="backward changed its input")
    assert grad_x.shape == x.shape
    assert grad_x.dtype == x.dtype

    def loss() -> float:
        before()
        return float(np.sum(module.forward(x)[0] * weights))

    def check(what: str, array: np.ndarray, grad: np.ndarray | None) -> None:
        assert grad is not None, f"{what} has no gradient"
        assert grad.shape == array.shape
        flat = array.reshape(-1)
        assert flat.size == 0 or np.shares_memory(flat, array), f"{what} is not contiguous"
        places = rng.permutation(flat.size)[:checked]
        numeric = np.empty(len(places))
        for i, place in enumerate(places):
            value = flat[place]
            flat[place] = value + eps
            above = loss()
            flat[place] = value - eps
            below = loss()
            flat[place] = value
            numeric[i] = (above - below) / (2 * eps)
        # Differences lose what the loss has too many digits for.
        scale = np.abs(numeric).max(initial=1)
        np.testing.assert_allclose(
            grad.reshape(-1)[places],
            numeric,
            rtol=rtol,
            atol=max(atol, 1e-7 * scale),
            err_msg=f"gradient of {what}",
        )

    check("x", x, grad_x)
    first = {}
    for name, parameter in module.named_parameters():
        check(name, parameter.data, parameter.grad)
        first[name] = parameter.grad.copy()

    before()
    again = module.forward(x)[1](grad_y)
    np.testing.assert_array_equal(again, grad_x)
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(parameter.grad, 2 * first[name], err_msg=f"second {name}")
