"""The table for readers: a summary on the screen, and everything as CSV, Markdown and JSON in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from .environment import described
from .evaluation import Failure
from .files import replace
from .methods import Method
from .suite import Suite
from .table import AVERAGE, FPR_OPENOOD, FPR_PAPER, METRICS, RESAMPLES, Group, Run, groups

AVERAGED = ("AUROC", FPR_OPENOOD, FPR_PAPER)
"""What the summary gives as averages over a group's sets."""


def legend(runs: int) -> str:
    """What the columns mean, a line each."""
    if runs == 1:
        spread = (
            f"[ , ] or low, high: 95 % percentile bootstrap interval over images ({RESAMPLES} stratified resamples)."
        )
    else:
        spread = f"+- or std: standard deviation over {runs} networks; values are means over them."
    return f"""\
AUROC to ID accuracy are percentages. ID = in-distribution, OOD = out-of-distribution. Averages weigh sets alike.
{spread}
ID accuracy: of the classes that the method itself predicts; some do so after changing the network's features.
{FPR_OPENOOD}: share of ID images rejected when 95 % of the OOD images are caught; OOD is the positive class.
{FPR_PAPER}: share of OOD images accepted when 95 % of the ID images are kept; ID is the positive class.
AUPR-in, AUPR-out: area under the precision-recall curve with ID, OOD as the positive class.
forwards: time of scoring a batch over that of a plain forward pass of it, in turn; median and quartiles.
peak: most memory held beyond network and images; on a CPU that of torch's tensors, as operators leave them."""


def summary(frame: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """A row for each method, all text, under two header lines: averages, AUROC of every set, cost."""
    found = groups(suite)
    columns: dict[tuple[str, str], list[str]] = {}
    methods = list(dict.fromkeys(frame["method"]))
    for metric in AVERAGED:
        for group in found:
            cells = [_cell(frame, method, group, AVERAGE) for method in methods]
            if metric == "AUROC":
                columns[metric, group.title] = [_text(cell, metric) for cell in cells]
            else:
                columns[metric, group.count] = [f"{cell[metric]:.2f}" for cell in cells]
        if metric == "AUROC":
            for group in found:
                for images in group.sets:
                    cells = [_cell(frame, method, group, images.name) for method in methods]
                    columns[metric, images.name] = [f"{cell[metric]:.2f}" for cell in cells]
    rows = frame.drop_duplicates("method").set_index("method").loc[methods]
    columns["ID accuracy", ""] = [f"{value:.2f}" for value in rows["ID accuracy"]]
    for name, digits in (("forwards", ".2f"), ("images/s", ".0f"), ("peak MiB", ".1f")):
        columns[name, ""] = ["" if pd.isna(value) else f"{value:{digits}}" for value in rows[name]]
    return pd.DataFrame(columns, index=pd.Index(methods, name="method"))


def screen(frame: pd.DataFrame, suite: Suite) -> str:
    """The summary for a terminal: AUROC in one block, the rest in another."""
    text = summary(frame, suite)
    first = [column for column in text.columns if column[0] == "AUROC"]
    rest = [column for column in text.columns if column[0] != "AUROC"]
    return "\n\n".join(_flush(text[columns]) for columns in (first, rest))


def _flush(text: pd.DataFrame) -> str:
    """Two header lines: the metric, only where it changes, and what it is of."""
    heads = [column[0] for column in text.columns]
    top = [head if at == 0 or heads[at - 1] != head else "" for at, head in enumerate(heads)]
    table = text.reset_index()
    table.columns = pd.MultiIndex.from_tuples([("", "method"), *zip(top, (c[1] for c in text.columns), strict=True)])
    return str(table.to_string(index=False))


def full(frame: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """Every row, all text, with each metric's spread beside it."""
    titles = {group.name: group.title for group in groups(suite)}
    averages = frame["OOD set"] == AVERAGE
    text = pd.DataFrame(
        {
            "group": frame["group"].where(~averages, frame["group"].map(titles)),
            "OOD set": frame["OOD set"].where(~averages, f"*{AVERAGE}*"),
            "method": frame["method"],
        }
    )
    for metric in METRICS.values():
        text[metric] = [_text(row, metric) for _, row in frame.iterrows()]
    for name, digits in (("ID accuracy", 2), ("images/s", 0), ("peak MiB", 1), ("forwards", 2)):
        text[name] = ["" if pd.isna(value) else f"{value:.{digits}f}" for value in frame[name]]
    text["(Q1-Q3)"] = [
        "" if pd.isna(low) else f"{low:.2f}-{high:.2f}"
        for low, high in zip(frame["forwards (Q1)"], frame["forwards (Q3)"], strict=True)
    ]
    return text


def _cell(frame: pd.DataFrame, method: str, group: Group, name: str) -> Mapping[str, float]:
    row = frame[(frame["method"] == method) & (frame["group"] == group.name) & (frame["OOD set"] == name)]
    cells: Mapping[str, float] = row.iloc[0]
    return cells


def _text(row: Mapping[str, float], metric: str) -> str:
    """A value with its spread."""
    if f"{metric} std" in row:
        return f"{row[metric]:.2f} +- {row[f'{metric} std']:.2f}"
    return f"{row[metric]:.2f} [{row[f'{metric} low']:.2f}, {row[f'{metric} high']:.2f}]"


def markdown(frame: pd.DataFrame) -> str:
    """A table of text in Markdown; of two header lines, as one."""
    heads = [" ".join(filter(None, name)) if isinstance(name, tuple) else name for name in frame.columns]
    rows = [heads, ["---"] * len(heads), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def remarks(suite: Suite, failures: Sequence[Failure]) -> list[str]:
    """What is not in the tables, and why: a line each."""
    lines = [f"Missing: {sentence}" for sentence in suite.missing]
    return lines + [f"No row for {failure.method}: {failure.reason}" for failure in failures]


def write(
    folder: Path,
    frame: pd.DataFrame,
    runs: Sequence[Run],
    failures: Sequence[Failure],
    about: Mapping[str, Any],
    extra: Sequence[str] = (),
) -> None:
    """Write ``results.csv``, ``results.md`` and ``results.json``.

    Args:
        about: how the results were made, for JSON; ``command``, ``versions`` and ``hardware`` among it.
        extra: sections of Markdown to put before the full table.
    """
    suite = runs[0].suite
    methods = [outcome.method for outcome in runs[0].outcomes.values()]
    absent = remarks(suite, failures)
    sections = [
        f"# Side by side: {suite.name}, {suite.network_name}",
        _made(runs, about) + " Everything else about the run is in `results.json`.",
        *(["\n".join(f"- {line}" for line in absent)] if absent else []),
        markdown(summary(frame, suite).reset_index()),
        legend(len(runs)).replace("\n", "\n\n"),
        *extra,
        "## Every set",
        markdown(full(frame, suite)),
        "## Network, images, methods",
        f"Network: {suite.network_description}. Weights (SHA-256): {', '.join(run.suite.weights for run in runs)}.",
        "\n".join(_described_sets(suite)),
        "\n".join(f"- {method.name}: {method.title}, by {method.source}{_options(method)}" for method in methods),
    ]
    replace(folder / "results.csv", frame.to_csv(index=False))
    replace(folder / "results.md", "\n\n".join(sections) + "\n")
    replace(folder / "results.json", json.dumps(_record(frame, runs, failures, about), indent=2) + "\n")


def _made(runs: Sequence[Run], about: Mapping[str, Any]) -> str:
    """How the results were made, in a sentence or two."""
    made = f"Made by `{about['command']}` with torch {about['versions']['torch']} on {described(about['hardware'])}."
    timed = {
        f"{described(expense.hardware)} (batches of {expense.batch_size})"
        for outcome in runs[0].outcomes.values()
        if (expense := outcome.expense)
    }
    return made + (f" Costs measured on {' and '.join(sorted(timed))}." if timed else " Costs were not measured.")


def _described_sets(suite: Suite) -> list[str]:
    sets = [suite.in_distribution, *suite.out_of_distribution]
    return [f"- {s.name} ({s.group}, {len(s)} images): {s.description}" for s in sets]


def _options(method: Method) -> str:
    return "".join(f", {name}={value!r}" for name, value in method.options.items())


def _record(
    frame: pd.DataFrame, runs: Sequence[Run], failures: Sequence[Failure], about: Mapping[str, Any]
) -> dict[str, Any]:
    suite = runs[0].suite
    sets = [suite.in_distribution, *suite.out_of_distribution]
    return {
        **about,
        "data": suite.name,
        "protocol": suite.protocol,
        "missing": list(suite.missing),
        "network": suite.network_name,
        "network_description": suite.network_description,
        "weights": [run.suite.weights for run in runs],
        "sets": [
            {
                "name": s.name,
                "group": s.group,
                "images": len(s),
                "description": s.description,
                "fingerprint": s.fingerprint,
            }
            for s in sets
        ],
        "methods": [
            {
                "name": outcome.method.name,
                "title": outcome.method.title,
                "source": outcome.method.source,
                "options": {name: _plain(value) for name, value in outcome.method.options.items()},
                "cost": asdict(outcome.expense) if outcome.expense else None,
            }
            for outcome in runs[0].outcomes.values()
        ],
        "failures": [asdict(failure) for failure in failures],
        # pandas writes null for what is not a number; the json module would write NaN, which is no JSON
        "results": json.loads(frame.to_json(orient="records", double_precision=15)),
    }


def _plain(value: object) -> object:
    return value if isinstance(value, (bool, int, float, str)) or value is None else repr(value)
