"""One file for each experiment; its `EXPERIMENT` is all that is looked for.

`bnext.study` says how to write one.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from bnext.study.experiment import Experiment


@cache
def registry() -> dict[str, Experiment]:
    """All experiments by name, in the order of the report."""
    found: list[Experiment] = [
        importlib.import_module(f"{__name__}.{module.name}").EXPERIMENT
        for module in pkgutil.iter_modules(__path__)
    ]
    return {experiment.name: experiment for experiment in sorted(found, key=lambda e: e.number)}


def module_of(experiment: Experiment) -> str:
    """The module that defines it."""
    return experiment.run.__module__
