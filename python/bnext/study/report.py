"""The study's results as files: ``report.html``, ``results.json`` and ``runs.csv``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import bnext
from bnext import checkpoint
from bnext.data import Dataset
from bnext.study import plots, runner
from bnext.study.anchors import ANCHORS, NOT_REPEATED
from bnext.study.claims import CLAIMS
from bnext.study.experiment import (
    LEVEL,
    Experiment,
    Judged,
    Results,
    Scale,
    Verdict,
    combined,
    judge,
)

__all__ = ["Study", "study", "write"]

_TOPICS = {
    "when": "When to use which",
    "where": "Where to put them",
    "how much": "How much",
}
_OUTCOMES = {
    "higher": "higher",
    "lower": "lower",
    "same": "no difference that matters",
    "open": "open",
}


@dataclass(frozen=True)
class Study:
    """All that a report shows.

    Attributes
    ----------
    found : dict of experiment to (Results, list of Judged)
    """

    dataset: Dataset
    scale: Scale
    records: list[runner.Record]
    found: dict[Experiment, tuple[Results, list[Judged]]]
    command: str

    @property
    def judged(self) -> list[tuple[Experiment, Judged]]:
        return [
            (experiment, item) for experiment, (_, items) in self.found.items() for item in items
        ]

    def about(self, claim: str) -> list[tuple[Experiment, Judged]]:
        """The contrasts that decide a claim."""
        return [pair for pair in self.judged if claim in pair[1].contrast.claims]

    def verdict(self, claim: str) -> Verdict | None:
        """What comes out for a claim; None if no experiment about it was run."""
        about = self.about(claim)
        return combined(item.verdict(claim) for _, item in about) if about else None


def study(
    chosen: Sequence[Experiment],
    records: list[runner.Record],
    dataset: Dataset,
    scale: Scale,
    command: str = "bnext study",
) -> Study:
    """Judge what the runner returned."""
    found = {}
    for experiment in chosen:
        results = runner.results(experiment, records, scale)
        found[experiment] = (results, judge(experiment.contrasts(results)))
    return Study(dataset, scale, records, found, command)


def write(study: Study, out: Path) -> Path:
    """Write all three files into `out`; return the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("runs.csv", _csv(study)),
        ("results.json", json.dumps(_json(study), indent=1, ensure_ascii=False) + "\n"),
        ("report.html", page(study)),
    ):
        checkpoint.write_atomically(out / name, text.encode())
    return out / "report.html"


# -- data --------------------------------------------------------------------------------
def _csv(study: Study) -> str:
    """A row for each run; of metrics that are curves, the file of runs has the values."""
    metrics = sorted(
        {
            name
            for record in study.records
            for name, value in record["metrics"].items()
            if not isinstance(value, list)
        }
    )
    columns = ["experiment", "arm", "seed", *metrics, "seconds", "data", "version", "key"]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in study.records:
        values = {
            name: "" if value is None else f"{value:.6g}"
            for name, value in record["metrics"].items()
            if not isinstance(value, list)
        }
        writer.writerow({**record, "data": record["data"][:12], **values})
    return file.getvalue()


def _json(study: Study) -> dict[str, Any]:
    return {
        "bnext": bnext.__version__,
        "command": study.command,
        "scale": study.scale.name,
        "data": {"name": study.dataset.name, "digest": study.dataset.digest},
        "experiments": {
            experiment.name: {
                "version": runner.code_version(experiment.name),
                "seeds": results.seeds,
                "contrasts": [_contrast(item) for item in items],
            }
            for experiment, (results, items) in study.found.items()
        },
        "claims": {
            name: {
                "chinese": claim.chinese,
                "english": claim.english,
                "literature": claim.literature,
                "here": study.verdict(name),
            }
            for name, claim in CLAIMS.items()
        },
    }


def _contrast(item: Judged) -> dict[str, Any]:
    known = item.difference is not None
    middle, low, high = item.figures
    return {
        "name": item.contrast.name,
        "unit": item.contrast.unit,
        "estimate": middle if known else None,
        "low": low if known else None,
        "high": high if known else None,
        "n": item.difference.n if item.difference else 0,
        "p_t": item.difference.p_t if item.difference else None,
        "p_holm": item.p_holm,
        "p_sign_flip": item.difference.p_sign_flip if item.difference else None,
        "margin": item.contrast.margin,
        "p_equivalence": item.p_equivalence,
        "outcome": item.outcome,
        "sentence": item.sentence,
    }


# -- the page ----------------------------------------------------------------------------
def page(study: Study) -> str:
    """The report, as one HTML page that needs nothing else."""
    template = Template(resources.files("bnext.study").joinpath("page.html").read_text("utf-8"))
    seconds = sum(record["seconds"] for record in study.records)
    seeds = max(len(results.seeds) for results, _ in study.found.values())
    return template.substitute(
        data=escape(study.dataset.name),
        runs=f"{len(study.records):,}",
        seeds=seeds,
        minutes=f"{seconds / 60:.0f}",
        version=escape(bnext.__version__),
        command=escape(study.command),
        level=f"{LEVEL:.0%}",
        answers=_answers(study),
        claims=_claims(study),
        anchors=_anchors(study),
        contents=_contents(study),
        experiments="".join(_section(study, experiment) for experiment in study.found),
    )


def _answers(study: Study) -> str:
    parts = []
    for topic, title in _TOPICS.items():
        items = [
            f"<li>{_emphasized(item)} {_link(experiment)}</li>"
            for experiment, item in study.judged
            if item.contrast.topic == topic and item.sentence is not None
        ]
        if items:
            parts.append(f"<h3>{title}</h3><ul>{''.join(items)}</ul>")
    return "".join(parts) or "<p>No contrast came out clearly enough for a sentence.</p>"


def _emphasized(item: Judged) -> str:
    assert item.sentence is not None
    shown = escape(item.effect if item.effect in item.sentence else item.size)
    return escape(item.sentence).replace(shown, f'<b class="figure">{shown}</b>')


def _link(experiment: Experiment) -> str:
    return f'<a class="ref" href="#{experiment.name}">{experiment.number}</a>'


def _verdict(verdict: Verdict | None) -> str:
    shown = verdict or "not run"
    return f'<span class="verdict {shown.replace(" ", "-")}">{shown}</span>'


def _claims(study: Study) -> str:
    rows = []
    for claim in CLAIMS.values():
        about = study.about(claim.name)
        evidence = "".join(
            f"<li>{escape(item.contrast.name)}: <b>{escape(item.effect)}</b> "
            f"&rarr; {_verdict(item.verdict(claim.name))} {_link(experiment)}</li>"
            for experiment, item in about
        )
        details = f"<ul>{evidence}</ul>" if evidence else "its experiment was not run"
        rows.append(
            [
                f'<span id="{claim.name}">{claim.name}</span>',
                f'<span lang="zh">{escape(claim.chinese)}</span><br>{escape(claim.english)}',
                _verdict(study.verdict(claim.name)),
                f'{_verdict(claim.literature)} <span class="small">{escape(claim.evidence)}</span>',
                details,
            ]
        )
    return _table(("Line", "Claim of the article", "Here", "Literature", "Measured here"), rows)


def _agreement(item: Judged, published: str) -> str:
    if item.outcome == published:
        return '<span class="verdict supported">agrees</span>'
    if item.outcome == "open":
        return '<span class="verdict inconclusive">open here</span>'
    return '<span class="verdict refuted">disagrees</span>'


def _anchors(study: Study) -> str:
    rows = []
    for name, anchor in ANCHORS.items():
        about = [pair for pair in study.judged if name in pair[1].contrast.anchors]
        here = "".join(
            f"{_agreement(item, item.contrast.anchors[name])} {escape(item.contrast.name)}: "
            f"<b>{escape(item.effect)}</b> {_link(experiment)}<br>"
            for experiment, item in about
        )
        shown = here or _verdict(None)
        rows.append([escape(anchor.source), escape(anchor.result), shown, escape(anchor.caveat)])
    missing = '<span class="verdict not-run">not repeated</span>'
    rows += [
        [escape(source), escape(result), missing, escape(why)]
        for source, result, why in NOT_REPEATED
    ]
    return _table(("Source", "Published", "Here", "Why it may differ"), rows)


def _contents(study: Study) -> str:
    return "".join(
        f'<li value="{experiment.number}"><a href="#{experiment.name}">{escape(experiment.title)}'
        "</a></li>"
        for experiment in study.found
    )


def _section(study: Study, experiment: Experiment) -> str:
    results, items = study.found[experiment]
    options = " --quick" if study.scale.name == "quick" else ""
    command = f"bnext study{options} --data {study.dataset.name} --seeds {len(results.seeds)} "
    command += f"--only {experiment.name}"
    claims = ", ".join(f'<a href="#{name}">{name}</a>' for name in experiment.claims)
    return f"""
<section id="{experiment.name}">
<h3>{experiment.number}. {escape(experiment.title)}</h3>
<p><b>{escape(experiment.question)}</b> Claims: {claims}.</p>
<figure>{plots.svg(experiment, results)}
<figcaption>Means over {len(results.seeds)} seeds with 95&nbsp;% intervals.</figcaption></figure>
<p>{escape(experiment.design)}
<i>Expected from the literature:</i> {escape(experiment.expected)}</p>
{_contrasts(items)}
<details><summary>All {len(list(results))} arms</summary>{_arms(experiment, results)}</details>
<p>Again: <code>{escape(command)}</code></p>
</section>
"""


def _contrasts(items: Sequence[Judged]) -> str:
    rows = [
        [
            escape(item.contrast.name),
            f"<b>{escape(item.effect)}</b>",
            escape(_OUTCOMES[item.outcome]),
            _p(item.p_holm if item.difference else None),
            _p(item.difference.p_sign_flip if item.difference else None),
            _p(item.p_equivalence),
        ]
        for item in items
    ]
    titles = (
        "contrast",
        "effect, 95 % interval",
        "outcome",
        "p, t-test (Holm)",
        "p, sign flips",
        "p, equivalence (Holm)",
    )
    return _table(titles, rows)


def _arms(experiment: Experiment, results: Results) -> str:
    titles = ["arm", *(title for _, title in experiment.columns)]
    rows = []
    for arm in results:
        cells = [escape(arm.label)]
        for metric, _ in experiment.columns:
            if metric not in arm.runs[0]:
                cells.append("")
                continue
            values = arm.values(metric)
            cells.append(f"{values.mean():.4g} &plusmn; {values.std(ddof=1):.2g}")
        rows.append(cells)
    return _table(titles, rows)


def _table(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    titles = list(titles)
    head = "".join(f"<th>{escape(title)}" for title in titles)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(title)}">{cell}</td>'
            for title, cell in zip(titles, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="cards"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _p(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
