"""Pictures of the scores and of what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from sklearn.metrics import roc_curve

from .evaluation import Outcome
from .files import save_figure
from .suite import Suite
from .table import AVERAGE, Run, groups

SHOWN = ("msp", "ebo", "gaia-z", "gaia-a", "sandi-z", "sandi-a")
"""Methods that pictures with room for a few show first."""
ROOM = 6
ID_COLOUR = "#8a8a8a"
OOD_COLOUR = "#b03a2e"
OURS_COLOUR = "#1b6ca8"
COLOURS = {
    "msp": "#555555",
    "ebo": "#d98e04",
    "gaia-z": "#7fc8f8",
    "gaia-a": "#f4a6a0",
    "sandi-z": "#1b6ca8",
    "sandi-a": "#b03a2e",
}
OTHERS = ("#5aa469", "#8e6bb0", "#8c564b", "#e377c2", "#bcbd22", "#17becf")


def draw(folder: Path, frame: pd.DataFrame, run: Run) -> list[Path]:
    """Write all pictures; the paths written."""
    outcomes = selected(run)
    paths = [
        histograms(folder / "histograms.png", outcomes, run.suite),
        roc_curves(folder / "roc.png", outcomes, run.suite),
    ]
    if frame["forwards"].notna().any():
        paths.append(cost_against_auroc(folder / "cost_auroc.png", frame, run))
    return paths


def selected(run: Run) -> list[Outcome]:
    """The few outcomes that are shown: those of ``SHOWN``, then others as they come."""
    names = [name for name in SHOWN if name in run.outcomes]
    names += [name for name in run.outcomes if name not in names]
    return [run.outcomes[name] for name in names[:ROOM]]


def histograms(path: Path, outcomes: Sequence[Outcome], suite: Suite) -> Path:
    """Scores of ID images behind those of each OOD set: a row of panels for each method."""
    sets = suite.out_of_distribution
    figure = _figure(1.1 + 2.3 * len(sets), 0.9 + 1.35 * len(outcomes))
    panels = figure.subplots(len(outcomes), len(sets), squeeze=False)
    for row, outcome in zip(panels, outcomes, strict=True):
        known = outcome.scored[suite.in_distribution.name].scores
        low, high = _range([outcome.scored[images.name].scores for images in suite.test_sets])
        bins = np.linspace(low, high, 51)
        for panel, images in zip(row, sets, strict=True):
            for scores, colour in ((known, ID_COLOUR), (outcome.scored[images.name].scores, OOD_COLOUR)):
                shares = np.full(len(scores), 1 / len(scores))
                panel.hist(np.clip(scores, low, high), bins, weights=shares, color=colour, alpha=0.6, linewidth=0)
            panel.set_yticks([])
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right", "left"]].set_visible(False)
        row[0].set_ylabel(outcome.method.title, fontsize=9)
    for panel, images in zip(panels[0], sets, strict=True):
        panel.set_title(f"{images.name} ({images.group})", fontsize=9)
    handles = [Patch(color=ID_COLOUR, alpha=0.6), Patch(color=OOD_COLOUR, alpha=0.6)]
    labels = [f"ID: {suite.in_distribution.name}", "OOD: the set that the column names"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    figure.supxlabel("score (larger = more OOD), the outermost 0.5 % gathered at the ends", fontsize=9)
    return save_figure(figure, path)


def _range(scores: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Without the outermost scores, which would squeeze the others into a few bins."""
    low = min(np.percentile(some, 0.5) for some in scores)
    high = max(np.percentile(some, 99.5) for some in scores)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def roc_curves(path: Path, outcomes: Sequence[Outcome], suite: Suite) -> Path:
    """ROC curves with OOD as the positive class, a panel for each OOD set."""
    sets = suite.out_of_distribution
    columns = 2 if len(sets) in (2, 4) else min(len(sets), 3)
    rows = math.ceil(len(sets) / columns)
    figure = _figure(3.1 * columns, 0.6 + 3.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, images in zip(panels, sets, strict=False):
        for outcome, other in zip(outcomes, OTHERS, strict=False):
            known, unknown = outcome.scored[suite.in_distribution.name].scores, outcome.scored[images.name].scores
            is_ood = np.repeat([False, True], [len(known), len(unknown)])
            lost, caught, _ = roc_curve(is_ood, np.concatenate([known, unknown]))
            # GAIA's curves often lie on S&I's: dashed and on top, both are seen.
            style = {"linestyle": "--", "zorder": 3} if outcome.method.name.startswith("gaia") else {}
            colour = COLOURS.get(outcome.method.name, other)
            panel.plot(100 * lost, 100 * caught, color=colour, linewidth=1.5, label=outcome.method.title, **style)
        panel.axhline(95, color="black", linewidth=0.6, linestyle=":")
        panel.axvline(5, color="black", linewidth=0.6, linestyle=":")
        panel.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
        panel.set_title(f"{images.name} ({images.group})", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(sets) :]:
        panel.set_axis_off()
    figure.supxlabel("ID images lost, %", fontsize=9)
    figure.supylabel("OOD images caught, %", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, frameon=False)
    return save_figure(figure, path)


def cost_against_auroc(path: Path, frame: pd.DataFrame, run: Run) -> Path:
    """AUROC against time in plain forward passes, a panel for near- and one for far-OOD."""
    found = groups(run.suite)
    figure = _figure(6.0 * len(found), 5.4)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, group in zip(panels, found, strict=True):
        rows = frame[(frame["group"] == group.name) & (frame["OOD set"] == AVERAGE)].dropna(subset=["forwards"])
        ours = [run.outcomes[name].method.source == "openood-sandi" for name in rows["method"]]
        colours = [OURS_COLOUR if own else ID_COLOUR for own in ours]
        panel.scatter(rows["forwards"], rows["AUROC"], c=colours, s=22, zorder=3)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("time in plain forward passes", fontsize=9)
        panel.set_title(f"{group.title}: AUROC, %", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        _label(panel, rows, colours)
    return save_figure(figure, path)


def _label(panel: Axes, rows: pd.DataFrame, colours: Sequence[str]) -> None:
    """Name every point in a column beside the panel, in the order of their heights, with a line to it."""
    heights = np.linspace(0.01, 0.99, len(rows))[rows["AUROC"].argsort().argsort()]
    for (_, row), height, colour in zip(rows.iterrows(), heights, colours, strict=True):
        panel.annotate(
            row["method"],
            (row["forwards"], row["AUROC"]),
            xytext=(1.08, height),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "relpos": (0, 0.5)},
        )


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")
