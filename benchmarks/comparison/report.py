"""Outcomes as a table on the screen, and as CSV, Markdown and JSON in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .evaluation import Outcome
from .suite import Suite

FPR_OPENOOD = "FPR95 ID lost (OpenOOD)"
FPR_PAPER = "FPR95 OOD let in (paper)"
DECIMALS = {"images/s": 0}  # all others have two

LEGEND = f"""\
AUROC to ID accuracy are percentages. ID = in-distribution, OOD = out-of-distribution.
{FPR_OPENOOD}: share of ID images rejected when 95 % of the OOD images are caught; OOD is the positive class.
{FPR_PAPER}: share of OOD images accepted when 95 % of the ID images are kept; ID is the positive class.
AUPR-in, AUPR-out: area under the precision-recall curve with ID, OOD as the positive class.
forwards: time of scoring a batch over that of a plain forward pass of it, in turn; median and quartiles."""


def table(outcomes: Sequence[Outcome], suite: Suite) -> pd.DataFrame:
    """One row for each OOD set and method, at full precision."""
    return pd.DataFrame(
        [
            {
                "group": images.group,
                "OOD set": images.name,
                "method": outcome.method,
                "AUROC": 100 * outcome.detection[images.name].auroc,
                "AUPR-in": 100 * outcome.detection[images.name].aupr_in,
                "AUPR-out": 100 * outcome.detection[images.name].aupr_out,
                FPR_OPENOOD: 100 * outcome.detection[images.name].fpr95_id_lost,
                FPR_PAPER: 100 * outcome.detection[images.name].fpr95_ood_let_in,
                "ID accuracy": 100 * outcome.accuracy,
                "images/s": outcome.cost.images_per_second,
                "forwards": outcome.cost.forwards[1],
                "forwards (Q1)": outcome.cost.forwards[0],
                "forwards (Q3)": outcome.cost.forwards[2],
            }
            for images in suite.out_of_distribution
            for outcome in outcomes
        ]
    )


def screen(frame: pd.DataFrame) -> str:
    """The table for a terminal: sets as row groups, what is in parentheses on a second header line."""
    rounded = _rounded(frame)
    row_groups = rounded.pop("group") + "-OOD: " + rounded.pop("OOD set")
    rounded.index = pd.MultiIndex.from_arrays([row_groups, rounded.pop("method")], names=[None, None])
    rounded.columns = pd.MultiIndex.from_tuples(
        [(head, rest and "(" + rest) for head, _, rest in (name.partition(" (") for name in rounded.columns)]
    )
    return str(rounded.to_string())


def markdown(frame: pd.DataFrame) -> str:
    """The table in Markdown."""
    rows = [list(frame.columns), ["---"] * len(frame.columns), *_rounded(frame).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def write(folder: Path, frame: pd.DataFrame, suite: Suite, run: dict[str, Any]) -> None:
    """Write ``results.csv``, ``results.md`` and ``results.json``; ``run`` says how the results were made."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = [suite.in_distribution, *suite.out_of_distribution]
    described = [f"- {s.name} ({s.group}, {len(s)} images): {s.description}" for s in sets]
    record = {
        **run,
        "network": suite.network_description,
        "sets": [{"name": s.name, "group": s.group, "images": len(s), "description": s.description} for s in sets],
        "results": frame.to_dict(orient="records"),
    }
    made = f"Made by `{run['command']}` on {run['hardware']['processor']}, torch {run['versions']['torch']}."
    sections = [
        f"# Side by side: {suite.name}",
        made + " Everything else about the run is in `results.json`.",
        markdown(frame),
        LEGEND.replace("\n", "\n\n"),
        f"Network: {suite.network_description}.",
        "\n".join(described),
    ]
    replace(folder / "results.csv", frame.to_csv(index=False))
    replace(folder / "results.md", "\n\n".join(sections) + "\n")
    replace(folder / "results.json", json.dumps(record, indent=2) + "\n")


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = frame.select_dtypes("float").columns
    return frame.assign(**{name: frame[name].map(f"{{:.{DECIMALS.get(name, 2)}f}}".format) for name in numbers})


def replace(path: Path, text: str) -> None:
    """Write ``text`` aside and rename, so that an interruption leaves the earlier file or the new one, never half."""
    partial = path.with_suffix(f"{path.suffix}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
