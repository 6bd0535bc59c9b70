"""What `bnext.doctor` returns."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bnext._table import Table
from bnext.diagnosis.rules import RULES, Rule

__all__ = ["Evaluation", "Finding", "Layer", "Report"]

_WIDTH = 88


@dataclass(frozen=True)
class Finding:
    """One rule that one layer breaks.

    Attributes
    ----------
    code : str
    layer : str
        Dotted name; "" for the whole network.
    figure : float
    severity : "warning" or "critical"
    detail : str
        What the figure does not say, such as the name of another layer.
    """

    code: str
    layer: str
    figure: float
    severity: str
    detail: str = ""

    @property
    def rule(self) -> Rule:
        return RULES[self.code]

    @property
    def threshold(self) -> float:
        return self.rule.threshold

    @property
    def meaning(self) -> str:
        return self.rule.meaning

    @property
    def advice(self) -> str:
        return self.rule.advice

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "title": self.rule.title,
            "layer": self.layer,
            "severity": self.severity,
            "figure": _json(self.figure),
            "what": self.rule.figure,
            "side": self.rule.side,
            "threshold": self.threshold,
            "critical": self.rule.critical,
            "detail": self.detail,
            "meaning": self.meaning,
            "advice": self.advice,
        }


class Evaluation(NamedTuple):
    """Loss and accuracy without dropout, under one choice of statistics; NaN: not measured."""

    data: str
    statistics: str
    samples: int
    loss: float
    accuracy: float


class Layer(NamedTuple):
    """The figures of one BatchNorm; NaN: not measured. See the rules for what they are.

    Medians over channels, but for `gap`, an average, `constant`, `dead` and `gamma`, shares, and
    `growth`. `correlation` is that of two pixels of one image.
    """

    layer: str
    channels: int
    values: int
    gap: float = math.nan
    rse: float = math.nan
    correlation: float = math.nan
    kurtosis: float = math.nan
    imbalance: float = math.nan
    shift: float = math.nan
    dead: float = math.nan
    dead_predicted: float = math.nan
    constant: float = math.nan
    gamma: float = math.nan
    growth: float = math.nan


@dataclass(frozen=True)
class Report:
    """Findings, and the figures behind them; ``print`` shows all of it.

    Attributes
    ----------
    framework : "bnext" or "torch"
    batch_size, samples : int
        Of the batches that were looked at; `samples` 0: no data.
    findings : list of Finding
        In order of code, then of the layers in the network.
    layers : list of Layer
    evaluations : list of Evaluation
        Batch, running and re-estimated statistics side by side.
    skipped : dict
        Codes that could not be checked, and why.
    """

    framework: str
    batch_size: int
    samples: int
    findings: list[Finding]
    layers: Table[Layer]
    evaluations: Table[Evaluation]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    @property
    def codes(self) -> list[str]:
        """Codes of the findings, each once."""
        return list(dict.fromkeys(finding.code for finding in self.findings))

    def only(self, select: Iterable[str] | None, ignore: Iterable[str] = ()) -> Report:
        """The same with findings of the codes in `select` (None: all) but not in `ignore`."""
        wanted = set(RULES if select is None else select) - set(ignore)
        return Report(
            self.framework,
            self.batch_size,
            self.samples,
            [finding for finding in self.findings if finding.code in wanted],
            self.layers,
            self.evaluations,
            {code: why for code, why in self.skipped.items() if code in wanted},
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has; figures that are missing are None."""

        def rows(table: Iterable[Any]) -> list[dict[str, Any]]:
            return [{k: _json(v) for k, v in row._asdict().items()} for row in table]

        return {
            "version": 1,
            "ok": self.ok,
            "framework": self.framework,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": rows(self.layers),
            "evaluations": rows(self.evaluations),
            "skipped": dict(self.skipped),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        data = f"{self.samples} samples" if self.samples else "no data"
        parts = [
            f"{len(self.layers)} BatchNorm layers ({self.framework}), {data}, "
            f"batches of {self.batch_size}"
        ]
        if self.evaluations:
            parts.append(str(self.evaluations))
        if self.samples:
            parts.append(str(_measured(self.layers)))
        for code in self.codes:
            parts.append(self._paragraph(code))
        if not self.findings:
            parts.append("No findings.")
        if self.skipped:
            lines = [
                f"{', '.join(codes)}: {reason}"
                for reason, codes in _by_reason(self.skipped).items()
            ]
            parts.append("Not checked:\n" + "\n".join(f"  {line}" for line in lines))
        return "\n\n".join(parts)

    def _paragraph(self, code: str) -> str:
        rule = RULES[code]
        rows = [
            _Row(
                finding.layer or "(network)",
                finding.figure,
                rule.limits,
                finding.severity,
                finding.detail,
            )
            for finding in self.findings
            if finding.code == code
        ]
        table = textwrap.indent(str(Table(_Row, rows)), "  ")
        return "\n".join(
            [
                f"{code} {rule.title}",
                f"  figure: {rule.figure}",
                table,
                textwrap.fill(rule.meaning, _WIDTH, initial_indent="  ", subsequent_indent="  "),
                textwrap.fill(
                    "What to do: " + rule.advice,
                    _WIDTH,
                    initial_indent="  ",
                    subsequent_indent="  ",
                ),
            ]
        )


class _Row(NamedTuple):
    layer: str
    figure: float
    threshold: str
    severity: str
    detail: str


def _measured(layers: Table[Layer]) -> Table[Any]:
    """The table without columns that hold nothing."""
    fields = [
        name
        for name in Layer._fields
        if any(not (isinstance(v := getattr(row, name), float) and math.isnan(v)) for row in layers)
    ]
    kind: Any = NamedTuple("Measured", [(name, Any) for name in fields])  # type: ignore[misc]
    return Table(
        kind,
        [
            kind(
                *(
                    None if isinstance(v := getattr(row, name), float) and math.isnan(v) else v
                    for name in fields
                )
            )
            for row in layers
        ],
    )


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for code, reason in skipped.items():
        reasons.setdefault(reason, []).append(code)
    return reasons


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
