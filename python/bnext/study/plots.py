"""Parts of plots that several experiments draw."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnext import _extras
from bnext.study.experiment import Arm, Experiment, Judged, Results
from bnext.study.statistics import t_interval

__all__ = ["COLORS", "bars", "forest", "lines", "svg"]

# Okabe & Ito's, which colour-blind readers tell apart, mid-tones for light and dark pages.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")
# Text and axes take the colour of the page's text.
_INK = "#010203"


def svg(experiment: Experiment, results: Results) -> str:
    """The experiment's plot, as an element for an HTML page, in the page's own text colour."""
    return _drawn(experiment.name, lambda figure: experiment.plot(figure, results), (7.2, 3.6))


def _drawn(name: str, draw: Any, size: tuple[float, float]) -> str:
    matplotlib = _extras.require("matplotlib", "plots of the study", extra="study")
    figures = _extras.require("matplotlib.figure", "plots of the study", extra="study")
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.titlesize": 10,
        "axes.titlecolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": "#888888",
        "grid.alpha": 0.3,
        "axes.grid": True,
        "axes.prop_cycle": matplotlib.cycler(color=COLORS),
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    # The page sets the size.
    text = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1
    )
    return text.strip()


def lines(
    axes: Any,
    x: Sequence[float],
    arms: Sequence[Arm],
    metric: str,
    label: str,
    **style: Any,
) -> None:
    """`metric` of arms over `x`, with 95 % intervals; seeds without a value leave a gap."""
    middle, half = t_interval(np.stack([arm.values(metric) for arm in arms], axis=1))
    axes.errorbar(x, middle, half, label=label, marker="o", markersize=4, capsize=2, **style)


def bars(axes: Any, arms: Sequence[Arm], metric: str, labels: Sequence[str], title: str) -> None:
    """`metric` of arms as points with 95 % intervals, one row each, and every seed as a dot."""
    rows = np.arange(len(arms))[::-1]
    for row, arm in zip(rows, arms, strict=True):
        values = arm.values(metric)
        axes.plot(values, np.full(len(values), row), ".", color="#888888", markersize=3)
        middle, half = t_interval(values[:, np.newaxis])
        axes.errorbar(middle, [row], xerr=half, fmt="o", color=COLORS[0], capsize=3)
    axes.set_yticks(rows, labels)
    axes.set_xlabel(title)
    axes.margins(y=0.1)


def forest(name: str, judged: Sequence[Judged]) -> str:
    """Effects of contrasts in points of accuracy with their intervals, as SVG."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        rows = np.arange(len(judged))[::-1]
        colors = {"higher": COLORS[2], "lower": COLORS[1], "same": COLORS[0], "open": COLORS[6]}
        for row, item in zip(rows, judged, strict=True):
            middle, low, high = item.figures
            axes.plot([low, high], [row, row], color=colors[item.outcome])
            axes.plot([middle], [row], "o", color=colors[item.outcome])
        axes.axvline(0, color="#888888", linewidth=1)
        axes.set_yticks(rows, [item.contrast.name for item in judged])
        axes.set_xlabel("points of accuracy, 95 % interval")

    return _drawn(name, draw, (7.2, 0.8 + 0.32 * len(judged)))
