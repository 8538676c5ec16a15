"""``report.html``: a run in one file that needs no server and no network.

A table to sort, each method's histograms and ROC curves, the images that it gets most wrong with their attribution
maps, the paper's tables, and how the run was made. Templates are in ``templates``; Plotly draws, from within the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from openood_sandi.runs.files import replace

from . import curves, mistakes, paper_tables, report
from .evaluation import Failure, Outcome
from .metrics import Floats
from .suite import Suite
from .table import AVERAGE, FPR_PAPER, Run

TEMPLATES = Path(__file__).with_name("templates")
PICTURES = 150
"""About so many images at most are in the file, whatever the number of methods."""
EACH = 6
"""Of a method: at most so many ID images, and as many OOD images."""


def write(
    path: Path,
    frame: pd.DataFrame,
    runs: Sequence[Run],
    failures: Sequence[Failure],
    about: Mapping[str, Any],
    device: torch.device,
) -> Path:
    """Write the report of ``frame``, which is :func:`.table.results`, and return its path.

    Curves and images are those of the first run. ``about`` is as :func:`.report.write` takes it. The same run gives the
    same bytes.
    """
    replace(path, html(frame, runs, failures, about, device))
    return path


def html(
    frame: pd.DataFrame,
    runs: Sequence[Run],
    failures: Sequence[Failure],
    about: Mapping[str, Any],
    device: torch.device,
) -> str:
    """The text of the report."""
    first = runs[0]
    data, no_maps = _data(frame, first, device)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        suite=first.suite,
        seed=first.seed if len(runs) > 1 else None,
        table=_table(frame, first.suite),
        legend=report.legend(len(runs)).splitlines(),
        remarks=report.remarks(first.suite, failures),
        no_maps=no_maps,
        paper=paper_tables.tables(frame, first),
        record={
            name: value for name, value in report.record(frame, runs, failures, about).items() if name != "results"
        },
        data=data,
        palette=["#" + bytes(colour).hex() for colour in mistakes.PALETTE[::16]],
        style=_file("report.css"),
        script=_file("report.js"),
        plotly=Markup(get_plotlyjs()),  # a library's own script, not ours to escape
    )


def _file(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _table(frame: pd.DataFrame, suite: Suite) -> dict[str, Any]:
    """The summary: two lines of headers, and for each cell its text and what it is sorted by."""
    summary = report.summary(frame, suite)
    heads = [
        (name, [second for _, second in pairs]) for name, pairs in groupby(summary.columns.to_list(), lambda p: p[0])
    ]
    rows = [(method, [(text, _number(text)) for text in row]) for method, *row in summary.itertuples()]
    return {"heads": heads, "rows": rows}


def _number(text: str) -> float | None:
    """What a cell's text begins with: "97.31 [96.80, 97.77]"."""
    return float(text.split()[0]) if text else None


def _data(frame: pd.DataFrame, run: Run, device: torch.device) -> tuple[dict[str, Any], str]:
    """What the page's script draws, ready for JSON, and why there are no attribution maps, if there are none."""
    suite, outcomes = run.suite, list(run.outcomes.values())
    each = min(EACH, max(1, PICTURES // (2 * len(outcomes))))
    wrong = {outcome.method.name: mistakes.worst(outcome, suite, each) for outcome in outcomes}
    places = sorted({one.place for sides in wrong.values() for side in sides for one in side})
    pictures, no_maps = mistakes.pictures(places, suite, device)
    numbers = {place: number for number, place in enumerate(places)}
    values = frame[frame["OOD set"] != AVERAGE].set_index(["method", "OOD set"])
    methods = [
        {
            "name": outcome.method.name,
            "title": outcome.method.title,
            "source": outcome.method.source,
            **_curves(outcome, suite, values.loc[outcome.method.name]),
            "wrong": [
                [asdict(one) | {"picture": numbers[one.place]} for one in side] for side in wrong[outcome.method.name]
            ],
        }
        for outcome in outcomes
    ]
    sets = [{"name": images.name, "group": images.group, "images": len(images)} for images in suite.test_sets]
    classes = mistakes.class_names(outcomes[0], suite)
    shown = [asdict(pictures[place]) for place in places]
    return {"sets": sets, "classes": classes, "methods": methods, "pictures": shown}, no_maps


def _curves(outcome: Outcome, suite: Suite, values: pd.DataFrame) -> dict[str, Any]:
    """A method's threshold, and by OOD set its histogram, ROC curve and metrics."""
    known = outcome.scored[suite.in_distribution.name].scores
    everything = tuple(outcome.scored[images.name].scores for images in suite.test_sets)
    least = curves.threshold(outcome.scored[_fitted_on(suite, outcome)].scores)
    found = {}
    for images in suite.out_of_distribution:
        unknown = outcome.scored[images.name].scores
        binned = curves.histogram(known, unknown, everything)
        lost, caught = curves.roc(known, unknown)
        found[images.name] = {
            "bins": [_short(binned.low), _short(binned.high)],
            "known": _shorts(binned.known),
            "unknown": _shorts(binned.unknown),
            "lost": _shorts(lost),
            "caught": _shorts(caught),
            "let_in": _short(float(np.mean(unknown <= least))),
            "auroc": _short(float(values.loc[images.name, "AUROC"])),
            "fpr": _short(float(values.loc[images.name, FPR_PAPER])),
        }
    return {
        "fitted": _fitted_on(suite, outcome),
        "threshold": _short(least),
        "kept": _short(float(np.mean(known <= least))),
        "sets": found,
    }


def _fitted_on(suite: Suite, outcome: Outcome) -> str:
    """The set of which the threshold keeps 95 %: validation ID images, as in the table, or the ID test images."""
    validation = suite.validation[0].name if suite.validation else ""
    return validation if validation in outcome.scored else suite.in_distribution.name


def _short(value: float) -> float | None:
    """As many digits as a picture shows; JSON has no NaN and no infinity."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _shorts(values: Floats) -> list[float | None]:
    return [_short(float(value)) for value in values]
