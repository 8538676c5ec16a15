"""Pictures of the scores and of what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from sklearn.metrics import roc_curve
from torch import Tensor

from openood_sandi import SandI

from .evaluation import Outcome
from .files import save_figure
from .suite import ImageSet, Suite
from .table import AVERAGE, Run, groups

SHOWN = ("msp", "ebo", "gaia-z", "gaia-a", "sandi-z", "sandi-a")
"""Methods that pictures with room for a few show first."""
COLOURS = dict(zip(SHOWN, ("#555555", "#d98e04", "#7fc8f8", "#f4a6a0", "#1b6ca8", "#b03a2e"), strict=True))
OTHERS = ("#5aa469", "#8e6bb0", "#8c564b", "#e377c2", "#bcbd22", "#17becf")
"""For as many as there is room for."""
EXAMPLES, SPLITS, ROOM = 2, 4, 5
"""What heat maps show: ID images, splits evenly spread over the network, and at most so many OOD sets, by an image."""
T = TypeVar("T")
ID_COLOUR, OOD_COLOUR, OURS_COLOUR = "#8a8a8a", "#b03a2e", "#1b6ca8"


def draw(folder: Path, frame: pd.DataFrame, run: Run) -> list[Path]:
    """Write all pictures; the paths written."""
    names = [name for name in SHOWN if name in run.outcomes]
    names += [name for name in run.outcomes if name not in names]
    outcomes = [run.outcomes[name] for name in names[: len(OTHERS)]]
    figures = {"histograms": histograms(outcomes, run.suite), "roc": roc_curves(outcomes, run.suite)}
    if frame["forwards"].notna().any():
        figures["cost_auroc"] = cost_against_auroc(frame, run)
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def histograms(outcomes: Sequence[Outcome], suite: Suite) -> Figure:
    """Scores of ID images behind those of each OOD set: a row of panels for each method."""
    sets = suite.out_of_distribution
    figure = Figure((1.1 + 2.3 * len(sets), 0.9 + 1.35 * len(outcomes)), layout="constrained")
    panels = figure.subplots(len(outcomes), len(sets), squeeze=False)
    for row, outcome in zip(panels, outcomes, strict=True):
        scored = [outcome.scored[images.name].scores for images in suite.test_sets]
        # without the outermost scores, which would squeeze the others into a few bins
        low, high = min(np.percentile(some, 0.5) for some in scored), max(np.percentile(some, 99.5) for some in scored)
        low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
        for panel, unknown in zip(row, scored[1:], strict=True):
            for scores, colour in ((scored[0], ID_COLOUR), (unknown, OOD_COLOUR)):
                shares, bins = np.full(len(scores), 1 / len(scores)), np.linspace(low, high, 51)
                panel.hist(np.clip(scores, low, high), bins, weights=shares, color=colour, alpha=0.6, linewidth=0)
            panel.set_yticks([])
            _plain(panel, "")
            panel.spines["left"].set_visible(False)
        row[0].set_ylabel(outcome.method.title, fontsize=9)
    for panel, images in zip(panels[0], sets, strict=True):
        panel.set_title(_name(images), fontsize=9)
    handles = [Patch(color=ID_COLOUR, alpha=0.6), Patch(color=OOD_COLOUR, alpha=0.6)]
    labels = [f"ID: {suite.in_distribution.name}", "OOD: the set that the column names"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    figure.supxlabel("score (larger = more OOD), the outermost 0.5 % gathered at the ends", fontsize=9)
    return figure


def roc_curves(outcomes: Sequence[Outcome], suite: Suite) -> Figure:
    """ROC curves with OOD as the positive class, a panel for each OOD set."""
    sets = suite.out_of_distribution
    columns = 2 if len(sets) in (2, 4) else min(len(sets), 3)
    rows = math.ceil(len(sets) / columns)
    figure = Figure((3.1 * columns, 0.6 + 3.1 * rows), layout="constrained")
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
        _plain(panel, _name(images))
    for panel in panels[len(sets) :]:
        panel.set_axis_off()
    figure.supxlabel("ID images lost, %", fontsize=9)
    figure.supylabel("OOD images caught, %", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def cost_against_auroc(frame: pd.DataFrame, run: Run) -> Figure:
    """AUROC against time in plain forward passes, a panel for near- and one for far-OOD."""
    found = groups(run.suite)
    figure = Figure((6.0 * len(found), 5.4), layout="constrained")
    for panel, group in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        rows = frame[(frame["group"] == group.name) & (frame["OOD set"] == AVERAGE)].dropna(subset=["forwards"])
        ours = [run.outcomes[name].method.source == "openood-sandi" for name in rows["method"]]
        colours = [OURS_COLOUR if own else ID_COLOUR for own in ours]
        panel.scatter(rows["forwards"], rows["AUROC"], c=colours, s=22, zorder=3)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("time in plain forward passes", fontsize=9)
        panel.grid(alpha=0.25, linewidth=0.5)
        _plain(panel, f"{group.title}: AUROC, %")
        _label(panel, rows, colours)
    return figure


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


def _name(images: ImageSet) -> str:
    return f"{images.name} ({images.group})"


def _plain(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def heat_maps(path: Path, suite: Suite, device: torch.device) -> Path:
    """Attribution maps (Eq. 10) over example images, as the S&I paper's Figure 2 shows them.

    Images, the maps of some splits, and the sum over all splits: a row for each image, ID first.
    """
    known, unknown = suite.in_distribution, _spread(suite.out_of_distribution, ROOM)
    images = torch.cat([_examples(known, EXAMPLES), *(_examples(one, 1) for one in unknown)])
    labels = [f"{known.name}\n(ID)"] * EXAMPLES + [f"{one.name}\n({one.group}-OOD)" for one in unknown]
    found = SandI(suite.network.to(device)).explain(images.to(device))
    maps = {name: _upsampled(one.cpu(), images.shape[-2:]) for name, one in found.items()}
    columns = {name: maps[name] for name in _spread(list(maps), SPLITS)}
    columns[f"all {len(maps)} splits"] = torch.stack(list(maps.values())).sum(0)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in suite.normalisation)
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).squeeze(-1).float().numpy()

    height, width = len(images), 1 + len(columns)
    figure = Figure((0.4 + 1.05 * width, 0.3 + 1.05 * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    for row, label in enumerate(labels):
        panels[row, 0].imshow(pixels[row], cmap="gray", vmin=0, vmax=1)
        panels[row, 0].set_ylabel(label, fontsize=8)
        for panel, one in zip(panels[row, 1:], columns.values(), strict=True):
            panel.imshow(one[row].numpy(), cmap="inferno", vmin=0, vmax=max(float(one[row].max()), 1e-12))
    for panel, name in zip(panels[0], ("image", *columns), strict=True):
        panel.set_title(name, fontsize=8)
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
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


def _upsampled(found: Tensor, side: torch.Size) -> Tensor:
    """Magnitudes of a split's maps (B, R, S) at the size of the images, each image's with a mean of 1.

    So every split has the same say in the sum: A_j is a sum over channels, of which later splits have more.
    """
    magnitude = found.abs().double()
    magnitude = magnitude / magnitude.mean(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    return F.interpolate(magnitude[:, None], size=side, mode="bilinear", align_corners=False)[:, 0]
