"""Optimizers with PyTorch's names and update formulas, on NumPy arrays in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bnext._pieces import integer
from bnext.nn.module import Array, Parameter, check_state, number
from bnext.regularizers import checked_limit, clip_unit_norms
from bnext.scaling import GradientScaling

__all__ = ["SGD", "Adam", "AdamW", "Optimizer"]


class Optimizer:
    """Base class: the parameters, their state, and what every optimizer does with them.

    Parameters
    ----------
    parameters : iterable of (name, Parameter) or of Parameter
        ``module.named_parameters()`` is best: its names become the keys of the state.
        Parameters without a name are numbered.
    lr : float
        Learning rate, >= 0; may be set at any time.
    weight_decay : float
        >= 0. Applies only to parameters with ``decay``: BatchNorm's weight and bias and
        other layers' biases are spared.
    scaling : GradientScaling, optional
        Gradients to use instead of ``.grad``: `bnext.scaling.BatchNormScaling` or
        `bnext.scaling.BNP` of the model. Its options are part of the state.
    max_norm : float, optional
        > 0. Limit for the norm of the weights of each unit, enforced after each step; see
        `bnext.regularizers.max_norm`.

    Notes
    -----
    A subclass lists the names of the arrays it keeps for each parameter (`_slots`) and
    implements `_update`. A parameter whose ``.grad`` is None is left alone, and its own
    step count, which the bias correction of Adam uses, stays as it is.
    """

    _slots: tuple[str, ...] = ()

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]] | Iterable[Parameter],
        lr: float,
        *,
        weight_decay: float,
        scaling: GradientScaling | None = None,
        max_norm: float | None = None,
    ) -> None:
        self._parameters: dict[str, Parameter] = {}
        if not isinstance(parameters, Iterable):
            raise TypeError(
                f"{self._name}: parameters: expected an iterable, such as "
                f"model.named_parameters(), got {type(parameters).__name__}"
            )
        for index, item in enumerate(parameters):
            name, parameter = item if isinstance(item, tuple) else (str(index), item)
            if not isinstance(parameter, Parameter):
                raise TypeError(
                    f"{self._name}: parameters: expected Parameters or (name, Parameter) "
                    f"pairs, got {type(parameter).__name__}"
                )
            if name in self._parameters or any(
                parameter is other for other in self._parameters.values()
            ):
                raise ValueError(f"{self._name}: parameters: {name!r} appears twice")
            self._parameters[name] = parameter
        if not self._parameters:
            raise ValueError(f"{self._name}: parameters: expected at least one, got none")
        self.lr = lr
        self._weight_decay = self._checked("weight_decay", weight_decay)
        self._scaling = scaling
        if scaling is not None:
            if not isinstance(scaling, GradientScaling):
                raise TypeError(
                    f"{self._name}: scaling: expected a GradientScaling, such as "
                    f"BatchNormScaling(model), got {type(scaling).__name__}"
                )
            own = {id(parameter) for parameter in self._parameters.values()}
            if all(id(parameter) not in own for parameter in scaling.parameters()):
                raise ValueError(
                    f"{self._name}: scaling: expected the model that the parameters belong to, "
                    "got another"
                )
        self._max_norm = (
            None if max_norm is None else checked_limit(self._name, "max_norm", max_norm)
        )
        self._steps = dict.fromkeys(self._parameters, 0)
        self._state = {
            f"{slot}.{name}": np.zeros_like(parameter.data)
            for slot in self._slots
            for name, parameter in self._parameters.items()
        }
        # Two working arrays, each large enough for any parameter.
        largest = max(parameter.data.nbytes for parameter in self._parameters.values())
        self._workspace = np.empty((2, largest), np.uint8)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _checked(self, name: str, value: float, *, below: float = math.inf) -> float:
        # A comparison with NaN is false, so NaN fails here too.
        if not 0 <= number(self._name, name, value) < below:
            expected = f"a number in [0, {below:g})" if below < math.inf else "a finite number >= 0"
            raise ValueError(f"{self._name}: {name}: expected {expected}, got {value!r}")
        return float(value)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = self._checked("lr", value)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient, in place."""
        scaled = {} if self._scaling is None else self._scaling.gradients()
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            data = parameter.data
            if parameter.grad.shape != data.shape:
                raise ValueError(
                    f"{self._name}: {name}.grad: expected shape {data.shape}, "
                    f"got {parameter.grad.shape}"
                )
            self._steps[name] += 1
            work_1, work_2 = (
                row[: data.nbytes].view(data.dtype).reshape(data.shape) for row in self._workspace
            )
            self._update(
                data,
                scaled.get(parameter, parameter.grad),
                self._weight_decay if parameter.decay else 0.0,
                [self._state[f"{slot}.{name}"] for slot in self._slots],
                self._steps[name],
                work_1,
                work_2,
            )
            if self._max_norm is not None:
                clip_unit_norms(data, self._max_norm)

    def _update(
        self,
        data: Array,
        grad: Array,
        weight_decay: float,
        slots: list[Array],
        step: int,
        work_1: Array,
        work_2: Array,
    ) -> None:
        """Update `data` and `slots` in place; `step` counts from 1; leave `grad` as it is."""
        raise NotImplementedError(f"{self._name}._update")

    def state_dict(self) -> dict[str, Any]:
        """Everything that steps change, flat: ``lr``, ``step.<name>``, ``<slot>.<name>``.

        With `scaling`, also its options, ``scaling.<option>``. The arrays are the optimizer's
        own, not copies.
        """
        steps = {f"step.{name}": step for name, step in self._steps.items()}
        scaling = {} if self._scaling is None else self._scaling.state_dict()
        options = {f"scaling.{name}": value for name, value in scaling.items()}
        return {"lr": self.lr, **steps, **options, **self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state`, as `state_dict` gives it.

        Raises
        ------
        ValueError
            If a key is missing or unexpected, an array has another shape or dtype or a number
            is out of range. Nothing has changed then.
        TypeError
            If `state` is no mapping, or a number something else.
        """
        check_state(self._name, self.state_dict(), state)
        where = f"{self._name}.load_state_dict"
        steps = {
            name: integer(where, f"'step.{name}'", state[f"step.{name}"], 0) for name in self._steps
        }
        lr = self._checked("lr", float(state["lr"]))
        if self._scaling is not None:
            prefix = "scaling."
            self._scaling.load_state_dict(
                {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            )
        self.lr = lr
        self._steps = steps
        for key, array in self._state.items():
            array[...] = state[key]


class SGD(Optimizer):
    r"""Stochastic gradient descent with momentum, `torch.optim.SGD`'s formula.

    .. math::
        g &\leftarrow g + \lambda\,\theta \\
        b &\leftarrow \mu\,b + g \\
        \theta &\leftarrow \theta - \eta\,(g + \mu\,b) \quad\text{(Nesterov), else}\quad
        \theta - \eta\,b

    Parameters
    ----------
    parameters, lr, weight_decay, scaling, max_norm
        See `Optimizer`.
    momentum : float, default 0.0
        In [0, 1).
    nesterov : bool, default False
        Look ahead by one step of the momentum; needs ``momentum > 0``.

    Examples
    --------
    >>> weight = Parameter(np.array([1.0, 2.0]))
    >>> weight.accumulate(np.array([0.5, 1.0]))
    >>> SGD([weight], lr=0.1).step()
    >>> weight.data
    array([0.95, 1.9 ])
    """

    _slots: tuple[str, ...] = ("momentum",)

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]] | Iterable[Parameter],
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        scaling: GradientScaling | None = None,
        max_norm: float | None = None,
    ) -> None:
        self._momentum = self._checked("momentum", momentum, below=1)
        self._nesterov = nesterov
        if nesterov and not momentum:
            raise ValueError(f"{self._name}: nesterov: expected a momentum > 0 with it, got 0")
        if not momentum:
            self._slots = ()
        super().__init__(
            parameters, lr, weight_decay=weight_decay, scaling=scaling, max_norm=max_norm
        )

    def _update(
        self,
        data: Array,
        grad: Array,
        weight_decay: float,
        slots: list[Array],
        step: int,
        work_1: Array,
        work_2: Array,
    ) -> None:
        if weight_decay:
            np.multiply(data, weight_decay, out=work_1)
            work_1 += grad
            grad = work_1
        if slots:
            (velocity,) = slots
            velocity *= self._momentum
            velocity += grad
            if self._nesterov:
                np.multiply(velocity, self._momentum, out=work_2)
                work_2 += grad
                grad = work_2
            else:
                grad = velocity
        np.multiply(grad, self.lr, out=work_1)
        data -= work_1


class Adam(Optimizer):
    r"""Adam, `torch.optim.Adam`'s formula.

    .. math::
        g &\leftarrow g + \lambda\,\theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,g \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \\
        \theta &\leftarrow \theta - \frac{\eta}{1 - \beta_1^t}\,
        \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon}

    Parameters
    ----------
    parameters, lr, weight_decay, scaling, max_norm
        See `Optimizer`.
    betas : (float, float), default (0.9, 0.999)
        Each in [0, 1).
    eps : float, default 1e-8
        >= 0.
    """

    _slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]] | Iterable[Parameter],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scaling: GradientScaling | None = None,
        max_norm: float | None = None,
    ) -> None:
        if np.shape(betas) != (2,):
            raise ValueError(f"{self._name}: betas: expected two numbers, got {betas!r}")
        beta_1, beta_2 = betas
        self._betas = (
            self._checked("betas", beta_1, below=1),
            self._checked("betas", beta_2, below=1),
        )
        self._eps = self._checked("eps", eps)
        super().__init__(
            parameters, lr, weight_decay=weight_decay, scaling=scaling, max_norm=max_norm
        )

    def _update(
        self,
        data: Array,
        grad: Array,
        weight_decay: float,
        slots: list[Array],
        step: int,
        work_1: Array,
        work_2: Array,
    ) -> None:
        if weight_decay:
            np.multiply(data, weight_decay, out=work_1)
            work_1 += grad
            grad = work_1
        mean, square = slots
        beta_1, beta_2 = self._betas

        np.multiply(grad, 1 - beta_1, out=work_2)
        mean *= beta_1
        mean += work_2

        np.multiply(grad, grad, out=work_2)
        work_2 *= 1 - beta_2
        square *= beta_2
        square += work_2

        np.sqrt(square, out=work_1)
        work_1 /= math.sqrt(1 - beta_2**step)
        work_1 += self._eps
        np.divide(mean, work_1, out=work_1)
        work_1 *= self.lr / (1 - beta_1**step)
        data -= work_1


class AdamW(Adam):
    r"""Adam with decoupled weight decay, `torch.optim.AdamW`'s formula.

    The decay multiplies the parameter, :math:`\theta \leftarrow (1 - \eta\lambda)\,\theta`,
    and does not enter the gradient. Parameters are those of `Adam`, with
    ``weight_decay=0.01``.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]] | Iterable[Parameter],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        scaling: GradientScaling | None = None,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            parameters,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            scaling=scaling,
            max_norm=max_norm,
        )

    def _update(
        self,
        data: Array,
        grad: Array,
        weight_decay: float,
        slots: list[Array],
        step: int,
        work_1: Array,
        work_2: Array,
    ) -> None:
        data *= 1 - self.lr * weight_decay
        super()._update(data, grad, 0.0, slots, step, work_1, work_2)
