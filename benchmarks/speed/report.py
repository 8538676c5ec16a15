"""Measurements against their goals, as a table on the screen, and as CSV, Markdown and JSON in a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from comparison.files import replace
from comparison.report import markdown

from .measuring import Measurement
from .methods import METHODS
from .networks import NETWORKS

LEGEND = """\
- forwards: time over that of a plain forward pass (no gradients) of the same batch, in turn with it; median, quartiles.
- of MSP: share of MSP's images/s at that batch size, by the ratio of their forwards.
- FLOPs: floating point operations of convolutions and matrix products over those of a plain forward pass.
- launches: ATen operators that ran, those that only make a view left out.
- peak: most memory held at one time beyond weights and images; /kept: over that of the method "kept". On a CPU, of
  tensors: what an operator takes and returns while it runs is not seen.
- counts differing, tau difference: from the naive loop, on a few images: channels whose count of non-zero gradients is
  another (Z), and the largest relative difference of scores.
- goal: the most it should cost, as time in forwards or as peak /kept, or the least share of MSP's images/s.

Methods: forward = the plain forward pass against itself (what differs from 1 is noise); kept = a forward pass with the
autograd graph for gradients of the weights; gaia-z, gaia-a, sandi-z (count, union, intersection; T=2), sandi-z-t5
(count, T=5) and sandi-a (T=2) = SandI as it comes; sandi-z-exact = sandi-z without the rectifier shortcut; naive = one
split at a time by a hook and whole forward passes; released = what the authors' release spends: one split at a time,
its prefix once, then the suffix and two create_graph backward passes for each step."""


FREE_SHARE = 0.6
"""The most of the free memory that ``SandI`` should hold with its defaults."""


def table(measurements: Sequence[Measurement], on_gpu: bool) -> pd.DataFrame:
    """One row for each measurement at full precision, with what follows from its goals and from MSP's row."""
    msp = {(m.network, m.batch): m.forwards for m in measurements if m.method == "msp"}
    largest = {network: max(m.batch for m in measurements if m.network == network) for network, _ in msp}
    rows = []
    for m in measurements:
        share = msp.get((m.network, m.batch), math.nan) / m.forwards
        judged = on_gpu and m.batch == largest.get(m.network)
        goals = _goals(m, share if judged else None)
        verdict = {"goal": "; ".join(text for text, _ in goals), "met": _verdict(goals)}
        rows.append({**asdict(m), "of_msp": share, **verdict})
    frame = pd.DataFrame(rows)
    return frame.astype({"differing_counts": "Int64", "score_difference": "float"}) if rows else frame


def _goals(m: Measurement, share: float | None) -> list[tuple[str, bool]]:
    goal = METHODS[m.method].goal
    found = []
    if goal.forwards is not None:
        found.append((f"<= {goal.forwards:g} forwards", m.forwards <= goal.forwards))
    if goal.of_arithmetic is not None:
        limit = goal.of_arithmetic * m.flops
        found.append((f"<= {goal.of_arithmetic:g} x FLOPs = {limit:.0f} forwards", m.forwards <= limit))
    if goal.memory is not None:
        found.append((f"<= {goal.memory:g} kept", m.peak_of_kept <= goal.memory))
    if goal.of_msp is not None and share is not None:
        found.append((f">= {goal.of_msp:.0%} of MSP", share >= goal.of_msp))
    return found


def _verdict(goals: list[tuple[str, bool]]) -> str:
    return ", ".join("yes" if met else "no" for _, met in goals)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with few columns and few digits, all text."""

    def text(column: str, pattern: str) -> pd.Series[str]:
        return frame[column].map(lambda value: "" if pd.isna(value) else pattern.format(value))

    return pd.DataFrame(
        {
            "network (splits)": [
                f"{NETWORKS[name].title} ({splits})"
                for name, splits in zip(frame["network"], frame["splits"], strict=True)
            ],
            "method": frame["method"],
            "batch": text("batch", "{:d}"),
            "forwards": text("forwards", "{:.2f}"),
            "(Q1-Q3)": text("forwards_q1", "{:.2f}") + "-" + text("forwards_q3", "{:.2f}"),
            "images/s": text("images_per_second", "{:.3g}"),
            "of MSP": text("of_msp", "{:.0%}"),
            "FLOPs": text("flops", "{:.2f}"),
            "launches": text("launches", "{:d}"),
            "peak MiB": (frame["peak_bytes"] / 2**20).map("{:.1f}".format),
            "/kept": text("peak_of_kept", "{:.2f}"),
            "counts differing": text("differing_counts", "{:d}"),
            "tau difference": text("score_difference", "{:.1g}"),
            "goal": frame["goal"],
            "met": frame["met"],
        }
    )


def screen(frame: pd.DataFrame) -> str:
    """The table for a terminal, one block for each network."""
    rows = readable(frame)
    blocks = []
    for network, block in rows.groupby("network (splits)", sort=False):
        blocks.append(f"{network}\n{block.drop(columns='network (splits)').to_string(index=False)}")
    return "\n\n".join(blocks)


def heading(run: dict[str, Any]) -> str:
    """How the results were made, in a sentence or two."""
    hardware = run["hardware"]
    where = hardware["processor"] if hardware["device"] == "cpu" else hardware["device"]
    made = f"Made by `{run['command']}` on {where}, {hardware['torch_threads']} CPU thread(s), "
    made += f"torch {run['versions']['torch']}, float32; "
    chosen = {"paper": "the paper's split points", "norms": "Z split at the normalisation layers"}
    made += f"{chosen[run['splits']]}."
    if run["width"] != 1:
        made += f" Every number of channels is multiplied by {run['width']:g}: these are not the published networks."
    return made


def memory(frame: pd.DataFrame) -> str:
    """The goal that concerns all of SandI's rows together."""
    ours = frame[[METHODS[method].kind in ("sandi", "exact") for method in frame["method"]]]
    if ours.empty:
        return "SandI was not among the methods."
    share = ours["peak_of_free"].max()
    verdict = "met" if share <= FREE_SHARE else "missed"
    return f"SandI's peak memory was {share:.2%} of what was free, or less (goal: at most {FREE_SHARE:.0%}, {verdict})."


def write(folder: Path, frame: pd.DataFrame, sweeps: dict[str, pd.DataFrame], run: dict[str, Any]) -> None:
    """Write ``throughput.csv``, ``.md`` and ``.json``; ``run`` says how the results were made."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = ["# What S&I costs", heading(run) + " Everything else about the run is in `throughput.json`."]
    if len(frame):
        sections += [markdown(readable(frame)), memory(frame), LEGEND, "![time of every method](cost.png)"]
        replace(folder / "throughput.csv", frame.to_csv(index=False))
    for name, sweep in sweeps.items():
        sections += [
            f"## Cost against {name}",
            f"Otherwise: {run['sweeps']}.",
            f"![cost against {name}](scaling_{file_name(name)}.png)",
        ]
        replace(folder / f"scaling_{file_name(name)}.csv", sweep.to_csv(index=False))
    record = {
        **run,
        "results": json.loads(frame.to_json(orient="records", double_precision=15)),
        "scaling": {name: sweep.to_dict(orient="records") for name, sweep in sweeps.items()},
    }
    replace(folder / "throughput.md", "\n\n".join(sections) + "\n")
    replace(folder / "throughput.json", json.dumps(record, indent=2) + "\n")


def file_name(sweep: str) -> str:
    return sweep.replace(" ", "_")
