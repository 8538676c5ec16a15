"""Pictures of the scores and of what they cost; methods are called what the table calls them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from . import curves
from .attribution import attribution_maps, over_all_splits, pixels
from .evaluation import Outcome
from .files import save_figure
from .suite import ImageSet, Suite
from .table import AVERAGE, Run, groups

SHOWN = ("msp", "ebo", "gaia-z", "gaia-a", "sandi-z", "sandi-a", "sandi_c")
"""Methods that a picture with room for a few shows first."""
COLOURS = dict(zip(SHOWN, ("#555555", "#d98e04", "#7fc8f8", "#f4a6a0", "#1b6ca8", "#b03a2e", "#3b1f5c"), strict=True))
OTHERS = ("#5aa469", "#8e6bb0", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#2f4f4f", "#7f7f00")
CURVES = len(OTHERS)
"""For as many as a panel has room for."""
EXAMPLES, SPLITS, ROOM = 2, 4, 5
"""What heat maps show: ID images, splits evenly spread over the network, and at most so many OOD sets, by an image."""
ITERATIONS = 1000
"""Of moving labels apart."""
FAR = 8
"""Pixels from which on a label needs a line to its point."""
T = TypeVar("T")
ID_COLOUR, OOD_COLOUR, OURS_COLOUR = "#8a8a8a", "#b03a2e", "#1b6ca8"


def draw(folder: Path, frame: pd.DataFrame, run: Run) -> list[Path]:
    """Write the pictures of ``frame``, which is :func:`.table.results`, and of the scores of ``run``; their paths."""
    figures = {"histograms": histograms(frame, run), "roc": roc_curves(frame, run)}
    if frame["forwards"].notna().any():
        figures["cost_auroc"] = cost_against_auroc(frame, run)
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def histograms(frame: pd.DataFrame, run: Run) -> Figure:
    """Scores of ID images behind those of each OOD set, with the AUROC: a row of panels for each method."""
    suite, outcomes, auroc = run.suite, list(run.outcomes.values()), _auroc(frame)
    sets = suite.out_of_distribution
    figure = Figure((1.4 + 2.1 * len(sets), 1.0 + 0.95 * len(outcomes)), layout="constrained")
    panels = figure.subplots(len(outcomes), len(sets), squeeze=False)
    for row, outcome in zip(panels, outcomes, strict=True):
        for panel, images in zip(row, sets, strict=True):
            _histogram(panel, outcome, suite, images)
            told = f"{auroc[outcome.method.name, images.name]:.1f}"
            panel.text(0.99, 0.97, told, transform=panel.transAxes, fontsize=8, ha="right", va="top")
        row[0].set_ylabel(outcome.method.name, fontsize=8, rotation=0, ha="right", va="center")
    for panel, images in zip(panels[0], sets, strict=True):
        panel.set_title(_name(images), fontsize=9)
    handles = [Patch(color=ID_COLOUR, alpha=0.6), Patch(color=OOD_COLOUR, alpha=0.6)]
    labels = [f"ID: {suite.in_distribution.name}", "OOD: the set that the column names"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    told = "score (larger = more OOD), the outermost 0.5 % gathered at the ends; in the corner: AUROC, %"
    figure.supxlabel(told + _of_one(frame, run), fontsize=9)
    return figure


def _of_one(frame: pd.DataFrame, run: Run) -> str:
    """What to say of scores where the table's values are means over several networks."""
    return f"\nscores of the network of seed {run.seed}, AUROC the mean over networks" if "AUROC std" in frame else ""


def _histogram(panel: Axes, outcome: Outcome, suite: Suite, images: ImageSet) -> None:
    known, unknown = (outcome.scored[one.name].scores for one in (suite.in_distribution, images))
    binned = curves.histogram(known, unknown, tuple(outcome.scored[one.name].scores for one in suite.test_sets))
    edges = np.linspace(binned.low, binned.high, len(binned.known) + 1)
    for shares, colour in ((binned.known, ID_COLOUR), (binned.unknown, OOD_COLOUR)):
        panel.stairs(shares, edges, fill=True, color=colour, alpha=0.6)
    panel.set_yticks([])
    panel.set_ylim(0, 1.35 * max(*binned.known, *binned.unknown))  # room for the AUROC
    _plain(panel, "")
    panel.locator_params(axis="x", nbins=4)
    panel.tick_params(labelsize=7)
    panel.spines["left"].set_visible(False)


def roc_curves(frame: pd.DataFrame, run: Run) -> Figure:
    """ROC curves with OOD as the positive class, a panel for each OOD set; the legends have the AUROC.

    Of many methods, those in ``SHOWN`` first, as many as can be told apart.
    """
    suite, sets = run.suite, run.suite.out_of_distribution
    names = sorted(run.outcomes, key=lambda name: name not in SHOWN)[:CURVES]  # sorting keeps the order of others
    columns = 2 if len(sets) in (2, 4) else min(len(sets), 3)
    rows = math.ceil(len(sets) / columns)
    figure = Figure((3.6 * columns, 0.5 + 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, images in zip(panels, sets, strict=False):
        _roc(panel, [run.outcomes[name] for name in names], suite, images, _auroc(frame))
    for panel in panels[len(sets) :]:
        panel.set_axis_off()
    left_out = len(run.outcomes) - len(names)
    more = f" ({left_out} more methods in report.html)" if left_out else ""
    figure.supxlabel("ID images lost, %" + more + _of_one(frame, run), fontsize=9)
    figure.supylabel("OOD images caught, %", fontsize=9)
    return figure


def _roc(panel: Axes, outcomes: Sequence[Outcome], suite: Suite, images: ImageSet, auroc: pd.Series) -> None:
    others = iter(OTHERS)
    for outcome in outcomes:
        name = outcome.method.name
        known, unknown = (outcome.scored[one.name].scores for one in (suite.in_distribution, images))
        lost, caught = curves.roc(known, unknown)
        # GAIA's curves often lie on S&I's: dashed and on top, both are seen.
        style, above = ("--", 3) if name.startswith("gaia") else ("-", 2)
        (line,) = panel.plot(
            100 * lost, 100 * caught, style, color=COLOURS.get(name) or next(others), linewidth=1.5, zorder=above
        )
        line.set_label(f"{name} {auroc[name, images.name]:.1f}")
    panel.axhline(95, color="black", linewidth=0.6, linestyle=":")
    panel.axvline(5, color="black", linewidth=0.6, linestyle=":")
    panel.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    panel.legend(loc="lower right", fontsize=7, title="AUROC, %", title_fontsize=7, framealpha=0.7)
    _plain(panel, _name(images))


def cost_against_auroc(frame: pd.DataFrame, run: Run) -> Figure:
    """AUROC against time in plain forward passes with the spread of both, a panel for near- and one for far-OOD."""
    found = groups(run.suite)
    figure = Figure((6.4 * len(found), 5.6), layout="constrained")
    FigureCanvasAgg(figure)  # which measures texts
    for panel, group in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        rows = frame[(frame["group"] == group.name) & (frame["OOD set"] == AVERAGE)].dropna(subset=["forwards"])
        rows = rows.assign(own=[run.outcomes[name].method.source == "openood-sandi" for name in rows["method"]])
        _points(panel, rows)
        panel.set_xlabel("time in plain forward passes (bars: quartiles)", fontsize=9)
        spread = "standard deviation over networks" if "AUROC std" in frame else "95 % interval over images"
        _plain(panel, f"{group.title}: AUROC, % (bars: {spread})")
    figure.draw_without_rendering()  # the layout, in which labels are then moved apart
    figure.set_layout_engine("none")
    for panel in figure.axes:
        _move_apart(panel)
    return figure


def _points(panel: Axes, rows: pd.DataFrame) -> None:
    for _, row in rows.iterrows():
        colour = OURS_COLOUR if row["own"] else ID_COLOUR
        times, auroc = row["forwards"], row["AUROC"]
        across = [[max(times - row["forwards (Q1)"], 0)], [max(row["forwards (Q3)"] - times, 0)]]
        if "AUROC std" in rows:
            upright = [[row["AUROC std"]], [row["AUROC std"]]]
        else:  # an interval by percentiles may leave its value out
            upright = [[max(auroc - row["AUROC low"], 0)], [max(row["AUROC high"] - auroc, 0)]]
        faint = (*to_rgb(colour), 0.45)
        panel.errorbar(times, auroc, upright, across, "o", ms=4.5, color=colour, elinewidth=0.7, ecolor=faint, zorder=3)
        panel.text(times, auroc, row["method"], fontsize=7.5, color=colour, zorder=4)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.margins(0.2, 0.12)
    panel.grid(alpha=0.25, linewidth=0.5)


def _move_apart(panel: Axes) -> None:
    """Labels off each other and off the points, each with a line to its point."""
    panel.autoscale(False)  # the layout has room for these ticks and no others
    texts = list(panel.texts)
    places = np.array([text.get_position() for text in texts])
    for room in (1.0, 1.2, 1.4, 1.6, 1.8):  # the more, the less likely that two are left on each other
        # not until a time is up, which would make pictures differ from machine to machine
        adjust_text(
            texts, *places.T, ax=panel, iter_lim=ITERATIONS, expand=(1.05 * room, 1.2 * room), force_text=(0.5, 1.0)
        )
        boxes = [text.get_window_extent() for text in texts]
        if not any(one.overlaps(other) for one, other in combinations(boxes, 2)):
            break
    for text, box, point in zip(texts, boxes, panel.transData.transform(places), strict=True):
        near = np.clip(point, box.min, box.max)
        if np.hypot(*(near - point)) > FAR:
            ends = panel.transData.inverted().transform([point, near])
            panel.plot(*ends.T, color=text.get_color(), linewidth=0.5, alpha=0.6, zorder=2)


def _auroc(frame: pd.DataFrame) -> pd.Series:
    """By method and OOD set."""
    return frame[frame["OOD set"] != AVERAGE].set_index(["method", "OOD set"])["AUROC"]


def _name(images: ImageSet) -> str:
    return f"{images.name} ({images.group})"


def _plain(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def heat_maps(path: Path, suite: Suite, device: torch.device) -> Path:
    """Attribution maps (Eq. 10) over example images, as the S&I paper's Figure 2 shows them.

    Images, the maps of some splits, and the mean over all splits, on one scale: a row for each image, ID first.
    """
    known, unknown = suite.in_distribution, _spread(suite.out_of_distribution, ROOM)
    images = torch.cat([_examples(known, EXAMPLES), *(_examples(one, 1) for one in unknown)])
    labels = [f"{known.name}\n(ID)"] * EXAMPLES + [f"{one.name}\n({one.group}-OOD)" for one in unknown]
    maps = attribution_maps(suite, images, device)
    columns = {name: maps[name] for name in _spread(list(maps), SPLITS)}
    columns[f"mean of {len(maps)} splits"] = over_all_splits(maps)
    # the few largest values would leave the others dark
    most = max(float(np.percentile(list(columns.values()), 99.5)), 1e-12)

    figure = Figure((0.9 + 1.1 * (1 + len(columns)), 0.3 + 1.1 * len(images)), layout="constrained")
    panels = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for row, label, image in zip(range(len(images)), labels, pixels(suite, images), strict=True):
        grey = image if image.ndim == 2 else image.mean(axis=-1)  # so that the map's colours are its own
        panels[row, 0].imshow(image, cmap="gray", vmin=0, vmax=1)
        panels[row, 0].set_ylabel(label, fontsize=8)
        for panel, one in zip(panels[row, 1:], columns.values(), strict=True):
            panel.imshow(grey, cmap="gray", vmin=0, vmax=1)
            drawn = panel.imshow(one[row], cmap="inferno", vmin=0, vmax=most, alpha=0.65)
    for panel, name in zip(panels[0], ("image", *columns), strict=True):
        panel.set_title(name, fontsize=7)
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
    bar = figure.colorbar(drawn, ax=panels, shrink=0.6, aspect=40, extend="max")
    bar.set_label("attribution, times the image's mean", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return save_figure(figure, path)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items at even distances, first and last among them; all if there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[int(at)] for at in np.linspace(0, len(items) - 1, count).round()]


def _examples(images: ImageSet, count: int) -> Tensor:
    """(count, C, H, W), evenly spread over the set, as sets are often sorted."""
    places = np.linspace(0, len(images) - 1, count + 2).round()[1:-1]
    return torch.stack([images.dataset[int(at)][0] for at in places])
