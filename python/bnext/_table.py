"""Lists of named tuples that print as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

Row = TypeVar("Row", bound=NamedTuple)


class Table(list[Row]):
    """A list of rows of one kind; ``print`` shows them under the names of their fields."""

    def __init__(self, kind: type[Row], rows: Iterable[Row]) -> None:
        super().__init__(rows)
        self._header: tuple[str, ...] = kind._fields

    def __str__(self) -> str:
        lines = [self._header, *(tuple(_shown(value) for value in row) for row in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
