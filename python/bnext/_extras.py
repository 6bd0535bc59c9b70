"""Optional dependencies: imported where they are needed, with one message when missing."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str, extra: str = "train") -> Any:
    """Import `module`, which ``bnext[<extra>]`` brings.

    Raises
    ------
    ImportError
        If it is not installed; says what needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{purpose} needs {package}: pip install "bnext[{extra}]"') from error
