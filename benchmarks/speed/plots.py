"""Pictures of the results."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from .methods import METHODS
from .networks import NETWORKS
from .report import file_name

COLOURS = {"sandi": "#1b6ca8", "exact": "#5aa469", "naive": "#d98e04", "released": "#b03a2e"}
PLAIN = "#8a8a8a"
PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")


def costs(folder: Path, frame: pd.DataFrame) -> None:
    """``cost.png``: time of every method in forwards, one panel for each network, with its quartiles and FLOPs."""
    networks = list(dict.fromkeys(frame["network"]))
    figure = Figure(figsize=(4.2 * len(networks), 4.6), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for panel, network in zip(panels, networks, strict=True):
        # of several batch sizes the largest
        rows = frame[frame["network"] == network].sort_values("batch").drop_duplicates("method", keep="last")
        rows = rows.set_index("method").reindex([name for name in METHODS if name in set(rows["method"])])
        places = range(len(rows))[::-1]
        spread = [rows["forwards"] - rows["forwards_q1"], rows["forwards_q3"] - rows["forwards"]]
        colours = [COLOURS.get(METHODS[name].kind, PLAIN) for name in rows.index]
        panel.barh(places, rows["forwards"], color=colours, xerr=spread, error_kw={"elinewidth": 1}, height=0.7)
        panel.scatter(rows["flops"], places, marker="|", color="black", s=120, zorder=3, label="FLOPs, in forwards")
        for place, (_, row) in zip(places, rows.iterrows(), strict=True):
            end = max(row["forwards_q3"], row["flops"])
            text = f"{row['forwards']:.3g}"
            panel.annotate(text, (end, place), va="center", fontsize=8, xytext=(5, 0), textcoords="offset points")
        labels = [f"{name}, batch {batch}" for name, batch in zip(rows.index, rows["batch"], strict=True)]
        panel.set_yticks(places, labels, fontsize=8)
        panel.set_xscale("log")
        panel.set_xlim(0.5, 4 * rows[["forwards", "flops"]].max(axis=None))
        panel.xaxis.set_major_formatter(PLAIN_NUMBERS)
        panel.set_title(f"{NETWORKS[network].title}, {rows['splits'].iloc[0]} splits", fontsize=10)
        panel.set_xlabel("time in plain forward passes")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower left", frameon=False)
    _save(figure, folder / "cost.png")


def scaling(folder: Path, name: str, sweep: pd.DataFrame) -> None:
    """``scaling_<name>.png``: time in forwards against the quantity swept, FLOPs dashed."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    for method, rows in sweep.groupby("method", sort=False):
        colour = COLOURS[METHODS[str(method)].kind]
        axes.plot(rows["value"], rows["forwards"], marker="o", color=colour, label=method)
        axes.fill_between(rows["value"], rows["forwards_q1"], rows["forwards_q3"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(rows["value"], rows["flops"], linestyle="--", linewidth=1, color=colour)
    axes.plot([], [], linestyle="--", linewidth=1, color="black", label="FLOPs, in forwards")
    values = sorted(set(sweep["value"]))
    if min(values) > 0 and max(values) / min(values) > 8:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)
    axes.set_ylabel("time in plain forward passes")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    _save(figure, folder / f"scaling_{file_name(name)}.png")


def _save(figure: Figure, path: Path) -> None:
    """Save aside and rename: an interruption leaves no half picture."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=150, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
