"""Learning-rate schedules: pure functions of the step, so there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

from bnext._pieces import integer
from bnext.nn.module import number

__all__ = ["Constant", "Cosine", "Schedule", "Step", "build", "names"]


class Schedule:
    """``schedule(step) -> learning rate``, after a linear warm-up.

    During the first `warmup` steps the rate is ``lr * (step + 1) / (warmup + 1)``;
    then it is ``lr * factor(step - warmup)``, where each subclass has its own `factor`
    with ``factor(0) == 1``.

    Parameters
    ----------
    lr : float
        The rate at the end of the warm-up, > 0.
    warmup : int, default 0
        Number of warm-up steps.
    """

    def __init__(self, lr: float, *, warmup: int = 0) -> None:
        self._check("lr", lr, "a finite number > 0", lambda n: 0 < n < math.inf)
        self._check("warmup", warmup, "a whole number of steps >= 0", lambda n: n % 1 == 0 <= n)
        self.lr = lr
        self.warmup = int(warmup)

    def _check(self, name: str, value: float, expected: str, good: Callable[[float], bool]) -> None:
        kind = type(self).__name__
        if not good(number(kind, name, value)):
            raise ValueError(f"{kind}: {name}: expected {expected}, got {value!r}")

    def factor(self, step: int) -> float:
        """The share of `lr` in force `step` steps after the warm-up."""
        raise NotImplementedError(f"{type(self).__name__}.factor")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        return self.lr * self.factor(step - self.warmup)


class Constant(Schedule):
    """`lr` throughout.

    Examples
    --------
    >>> [Constant(0.3, warmup=2)(step) for step in range(4)]
    [0.09999999999999999, 0.19999999999999998, 0.3, 0.3]
    """

    def factor(self, step: int) -> float:
        return 1.0


class Step(Schedule):
    """`lr` multiplied by `gamma` after every `every` steps.

    Parameters
    ----------
    lr, warmup
        See `Schedule`.
    every : int
        Steps between two drops, >= 1, counted from the end of the warm-up.
    gamma : float, default 0.1
        The factor of one drop, in (0, 1].

    Examples
    --------
    >>> [Step(1.0, every=2, gamma=0.5)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    def __init__(self, lr: float, *, every: int, gamma: float = 0.1, warmup: int = 0) -> None:
        super().__init__(lr, warmup=warmup)
        self._check("every", every, "a whole number of steps >= 1", lambda n: n % 1 == 0 < n)
        self._check("gamma", gamma, "a number in (0, 1]", lambda n: 0 < n <= 1)
        self.every = int(every)
        self.gamma = gamma

    def factor(self, step: int) -> float:
        return float(self.gamma ** (step // self.every))


class Cosine(Schedule):
    """Half a cosine from `lr` at the end of the warm-up to ``final * lr`` at `total`.

    Parameters
    ----------
    lr, warmup
        See `Schedule`.
    total : int
        Steps of the whole training, warm-up included; `lr` stays at ``final * lr``
        beyond it.
    final : float, default 0.0
        The factor at the end, in [0, 1].

    Examples
    --------
    >>> [round(Cosine(1.0, total=4)(step), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    def __init__(self, lr: float, *, total: int, final: float = 0.0, warmup: int = 0) -> None:
        super().__init__(lr, warmup=warmup)
        self._check(
            "total",
            total,
            f"more steps than the warm-up's {warmup}",
            lambda n: n % 1 == 0 < n - warmup,
        )
        self._check("final", final, "a number in [0, 1]", lambda n: 0 <= n <= 1)
        self.total = int(total)
        self.final = final

    def factor(self, step: int) -> float:
        progress = min(step / (self.total - self.warmup), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


def names() -> tuple[str, ...]:
    """The names that `build` knows."""
    return ("constant", "step", "cosine")


def build(
    name: str, lr: float, *, epochs: int, steps_per_epoch: int, warmup_epochs: float = 0.0
) -> Schedule:
    """The schedule called `name` for a training of `epochs` epochs.

    ``step`` drops the rate to a tenth after each third of the epochs that follow the
    warm-up; ``cosine`` ends at 0.

    Raises
    ------
    ValueError
        If `name` is unknown, there is no step to train, or the warm-up is negative or leaves
        no epoch to train.
    TypeError
        For numbers that are something else.
    """
    epochs = integer("schedules.build", "epochs", epochs, 1)
    steps_per_epoch = integer("schedules.build", "steps_per_epoch", steps_per_epoch, 1)
    if not 0 <= number("schedules.build", "warmup_epochs", warmup_epochs) < epochs:
        raise ValueError(
            f"schedules.build: warmup_epochs: expected a number from 0 to below "
            f"{epochs} (the epochs), got {warmup_epochs}"
        )
    total = epochs * steps_per_epoch
    warmup = min(round(warmup_epochs * steps_per_epoch), total - 1)
    if name == "constant":
        return Constant(lr, warmup=warmup)
    if name == "step":
        return Step(lr, every=math.ceil((total - warmup) / 3), warmup=warmup)
    if name == "cosine":
        return Cosine(lr, total=total, warmup=warmup)
    raise ValueError(f"schedules.build: name: expected one of {', '.join(names())}, got {name!r}")
