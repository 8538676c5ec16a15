"""Pictures of the scores and of what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox
from sklearn.metrics import roc_curve

from .evaluation import Outcome
from .files import replace
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
    folder.mkdir(parents=True, exist_ok=True)
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
        low, high = _range([outcome.scored[images.name].scores for images in (suite.in_distribution, *sets)])
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
    return _save(figure, path)


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
    return _save(figure, path)


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
        panel.set_xlim(0.65 * rows["forwards"].min(), 2.2 * rows["forwards"].max())
        ticks = [
            tick
            for tick in (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200)
            if panel.get_xlim()[0] <= tick <= panel.get_xlim()[1]
        ]
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("time in plain forward passes", fontsize=9)
        panel.set_title(f"{group.title}: AUROC, %", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        _label(figure, panel, rows, colours)
    return _save(figure, path)


def _label(figure: Figure, panel: Axes, rows: pd.DataFrame, colours: Sequence[str]) -> None:
    """Name every point, each at the nearest place that no other name or point takes, with a line to it if far off."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]  # settles the layout, which places in pixels depend on
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    figure.set_layout_engine("none")
    points = panel.transData.transform(rows[["forwards", "AUROC"]].to_numpy())
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    frame = panel.get_window_extent()
    # Names in the densest spots are placed first, while there is room.
    for at in np.argsort([np.hypot(*(points - point).T).sum() for point in points]):
        (x, y), colour = points[at], colours[at]
        text = panel.annotate(
            rows["method"].iloc[at],
            (rows["forwards"].iloc[at], rows["AUROC"].iloc[at]),
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=7.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        size = text.get_window_extent(renderer)
        places = [
            (Bbox.from_bounds(x + right, y + up, size.width, size.height), (right, up)) for right, up in _offsets(size)
        ]
        inside = [
            (box, offset)
            for box, offset in places
            if frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        ]
        free = [place for place in inside if not any(place[0].padded(2).overlaps(other) for other in taken)]
        box, offset = (free or inside or places)[0]
        text.set_position(offset)
        taken.append(box)


def _offsets(size: Bbox) -> Iterator[tuple[float, float]]:
    """Lower left corners of a text of that size around a point, in pixels, near ones first."""
    width, height = size.width, size.height
    for distance in (7, 12, 20, 30, 42, 56, 72, 90, 110, 140, 170):
        for turn in np.arange(0, 2 * np.pi, np.pi / 8):
            right, up = distance * np.cos(turn), distance * np.sin(turn)
            yield right - width * (1 - np.cos(turn)) / 2, up - height * (1 - np.sin(turn)) / 2


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    replace(path, lambda partial: figure.savefig(partial, format="png"))
    return path
