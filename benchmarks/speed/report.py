"""Measurements as a table on the screen, and as CSV, Markdown, JSON and pictures in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from comparison.environment import described
from comparison.files import markdown, save_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from openood_sandi.runs.files import replace

from .networks import NETWORKS

LEGEND = """\
- forwards: time over that of a plain forward pass (no gradients) of the same batch, in turn with it; median, quartiles.
- of MSP: share of MSP's images/s at that batch size, by the ratio of their forwards.
- FLOPs: floating point operations of convolutions and matrix products over those of a plain forward pass.
- launches: ATen operators that ran, those that only make a view left out.
- peak: most memory held at one time beyond weights and images; /kept: over that of the method "kept"; /free: over what
  was free. On a CPU, of tensors: what an operator takes and returns while it runs is not seen.
- counts differing, tau difference: from the naive loop, on a few images: channels whose count of non-zero gradients is
  another (Z), and the largest relative difference of scores.

Methods: forward = the plain forward pass against itself (what differs from 1 is noise); kept = a forward pass with the
autograd graph for gradients of the weights; gaia-z, gaia-a, sandi-z (count, union, intersection; T=2), sandi-z-t5
(count, T=5) and sandi-a (T=2) = SandI as it comes; bounds-z, bounds-z-t5 = its bounds at T=2 and 5; decisions-z =
is_ood at a threshold that 5 % of the images exceed, and decisions-z-estimates without proof of the lower bounds (T=2);
sandi-z-exact = sandi-z without the rectifier shortcut; naive = one
split at a time by a hook and whole forward passes; released = what the authors' release spends: one split at a time,
its prefix once, then the suffix and two create_graph backward passes for each step."""

COLUMNS = {
    "method": ("method", "{}"),
    "batch": ("batch", "{:d}"),
    "forwards": ("forwards", "{:.2f}"),
    "(Q1-Q3)": ("spread", "{}"),
    "images/s": ("images_per_second", "{:.3g}"),
    "of MSP": ("of_msp", "{:.0%}"),
    "FLOPs": ("flops", "{:.2f}"),
    "launches": ("launches", "{:d}"),
    "peak MiB": ("peak_mib", "{:.1f}"),
    "/kept": ("peak_of_kept", "{:.2f}"),
    "/free": ("peak_of_free", "{:.2%}"),
    "counts differing": ("differing_counts", "{:d}"),
    "tau difference": ("score_difference", "{:.1g}"),
}
"""By the readable table's column, the full table's and its format."""


def table(measurements: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each measurement at full precision, beside MSP's row of the same network and batch size."""
    frame = pd.DataFrame(measurements)
    if frame.empty:
        return frame
    place = ["network", "batch"]
    msp = frame[frame["method"] == "msp"].set_index(place)["forwards"]
    frame["of_msp"] = msp.reindex(pd.MultiIndex.from_frame(frame[place])).to_numpy() / frame["forwards"]
    return frame.astype({"differing_counts": "Int64", "score_difference": "float"})


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with few columns and few digits, all text."""
    quartiles = zip(frame["forwards_q1"], frame["forwards_q3"], strict=True)
    frame = frame.assign(
        spread=[f"{low:.2f}-{high:.2f}" for low, high in quartiles], peak_mib=frame["peak_bytes"] / 2**20
    )
    titles = frame["network"].map(lambda name: NETWORKS[name].architecture.title)
    text = {"network (splits)": titles + " (" + frame["splits"].astype(str) + ")"}
    for name, (column, pattern) in COLUMNS.items():
        text[name] = pd.Series(["" if pd.isna(value) else pattern.format(value) for value in frame[column]])
    return pd.DataFrame(text)


def screen(frame: pd.DataFrame) -> str:
    """The table for a terminal, one block for each network."""
    blocks = readable(frame).set_index("network (splits)").groupby(level=0, sort=False)
    return "\n\n".join(f"{network}\n{block.to_string(index=False)}" for network, block in blocks)


def heading(run: dict[str, Any]) -> str:
    """How the results were made, in a sentence or two."""
    made = f"Made by `{run['command']}` on {described(run['hardware'])}, torch {run['versions']['torch']}, float32; "
    chosen = {"paper": "the paper's split points", "norms": "Z split at the normalisation layers"}
    made += f"{chosen[run['splits']]}."
    if run["width"] != 1:
        made += f" Every number of channels is multiplied by {run['width']:g}: these are not the published networks."
    return made


def write(folder: Path, frame: pd.DataFrame, sweeps: dict[str, pd.DataFrame], run: dict[str, Any]) -> None:
    """Write ``throughput.csv``, ``.md`` and ``.json``, and pictures; ``run`` says how the results were made."""
    sections = ["# What S&I costs", heading(run) + " Everything else about the run is in `throughput.json`."]
    if len(frame):
        sections += [markdown(readable(frame)), LEGEND, "![time of every method](cost.png)"]
        replace(folder / "throughput.csv", frame.to_csv(index=False))
        _draw_costs(folder / "cost.png", frame)
    for name, sweep in sweeps.items():
        stem = f"scaling_{name.replace(' ', '_')}"
        sections += [f"## Cost against {name}", f"Otherwise: {run['sweeps']}.", f"![cost against {name}]({stem}.png)"]
        replace(folder / f"{stem}.csv", sweep.to_csv(index=False))
        _draw_sweep(folder / f"{stem}.png", name, sweep)
    record = {
        **run,
        "results": json.loads(frame.to_json(orient="records", double_precision=15)),
        "scaling": {name: sweep.to_dict(orient="records") for name, sweep in sweeps.items()},
    }
    replace(folder / "throughput.md", "\n\n".join(sections) + "\n")
    replace(folder / "throughput.json", json.dumps(record, indent=2) + "\n")


def _draw_costs(path: Path, frame: pd.DataFrame) -> None:
    """Time of every method in forwards with its quartiles, and its FLOPs: a panel for each network."""
    networks = list(frame["network"].unique())
    figure = Figure(figsize=(4.2 * len(networks), 4.6), layout="constrained")
    for panel, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        rows = frame[frame["network"] == network].sort_values("batch", kind="stable")
        rows = rows.drop_duplicates("method", keep="last")  # of several batch sizes the largest
        rows = rows.sort_index(ascending=False).reset_index(drop=True)
        spread = [rows["forwards"] - rows["forwards_q1"], rows["forwards_q3"] - rows["forwards"]]
        bars = panel.barh(rows["method"] + ", batch " + rows["batch"].astype(str), rows["forwards"], xerr=spread)
        panel.bar_label(bars, fmt="%.3g", padding=5, fontsize=8)
        panel.plot(rows["flops"], rows.index, "k|", markersize=11, label="FLOPs, in forwards")
        panel.set_title(f"{NETWORKS[network].architecture.title}, {rows['splits'].iloc[0]} splits", fontsize=10)
        panel.set(xlim=(0.5, 4 * rows[["forwards", "flops"]].max(axis=None)), xlabel="time in plain forward passes")
        _logarithmic(panel, "x")
        panel.tick_params(labelsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower left", frameon=False)
    save_figure(figure, path)


def _draw_sweep(path: Path, name: str, sweep: pd.DataFrame) -> None:
    """Time in forwards with its quartiles against the quantity swept, FLOPs dashed."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    for method, rows in sweep.groupby("method", sort=False):
        (line,) = axes.plot(rows["value"], rows["forwards"], marker="o", label=method)
        axes.fill_between(rows["value"], rows["forwards_q1"], rows["forwards_q3"], color=line.get_color(), alpha=0.2)
        axes.plot(rows["value"], rows["flops"], "--", linewidth=1, color=line.get_color())
    axes.plot([], [], "k--", linewidth=1, label="FLOPs, in forwards")
    axes.set(xlabel=name, ylabel="time in plain forward passes", xticks=sorted(set(sweep["value"])))
    _logarithmic(axes, "y")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)


def _logarithmic(axes: Axes, which: str) -> None:
    """Such a scale on the axis "x" or "y", with plain numbers."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
