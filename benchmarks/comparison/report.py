"""The table for readers: a summary on the screen, and everything as CSV, Markdown and JSON in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from openood_sandi.runs.files import replace

from .environment import described
from .evaluation import Failure
from .files import markdown
from .methods import Method
from .suite import Suite
from .table import AVERAGE, DECISION, FPR_OPENOOD, FPR_PAPER, METRICS, RESAMPLES, Run, groups

COSTS = {"forwards": "{:.2f}", "images/s": "{:.0f}", "peak MiB": "{:.1f}"}


def legend(runs: int) -> str:
    """What the columns mean, a line each."""
    spread = f"[ , ] or low, high: 95 % percentile bootstrap interval over images ({RESAMPLES} stratified resamples)."
    if runs > 1:
        spread = f"+- or std: standard deviation over {runs} networks; values are means over them. {spread}"
    return f"""\
AUROC to ID accuracy are percentages. ID = in-distribution, OOD = out-of-distribution. Averages weigh sets alike.
{spread}
ID accuracy: of the classes that the method itself predicts; some do so after changing the network's features.
{FPR_OPENOOD}: share of ID images rejected when 95 % of the OOD images are caught; OOD is the positive class.
{FPR_PAPER}: share of OOD images accepted when 95 % of the ID images are kept; ID is the positive class.
{", ".join(DECISION)}: of test images, at the threshold that keeps 95 % of the validation ID images.
AUPR-in, AUPR-out: area under the precision-recall curve with ID, OOD as the positive class.
forwards: time of scoring a batch over that of a plain forward pass of it, in turn; median and quartiles.
peak: most memory held beyond network and images; on a CPU that of torch's tensors, as operators leave them."""


def summary(frame: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """A row for each method, all text, under two header lines: averages, AUROC of every set, cost."""
    wide = {"index": "method", "columns": ["group", "OOD set"]}
    full, short = _text(frame).pivot(**wide), _text(frame, spread=False).pivot(**wide)
    found = groups(suite)
    columns = {("AUROC", group.title): full["AUROC", group.name, AVERAGE] for group in found}
    columns |= {("AUROC", s.name): short["AUROC", group.name, s.name] for group in found for s in group.sets}
    for metric in (FPR_OPENOOD, FPR_PAPER):
        columns |= {(metric, group.count): short[metric, group.name, AVERAGE] for group in found}
    columns |= {(DECISION[1], group.count): short[DECISION[1], group.name, AVERAGE] for group in found}
    columns |= {(name, ""): short[name, found[0].name, AVERAGE] for name in (DECISION[0], "ID accuracy", *COSTS)}
    return pd.DataFrame(columns).loc[frame["method"].unique()]


def screen(frame: pd.DataFrame, suite: Suite) -> str:
    """The summary for a terminal: AUROC in one block, the rest in another."""
    text = summary(frame, suite)
    first = text.columns.get_level_values(0) == "AUROC"
    return "\n\n".join(text.loc[:, columns].reset_index().to_string(index=False) for columns in (first, ~first))


def full(frame: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """Every row, all text, with each metric's spread beside it."""
    titles = {group.name: group.title for group in groups(suite)}
    averages = frame["OOD set"] == AVERAGE
    text = _text(frame)
    text["group"] = text["group"].where(~averages, text["group"].map(titles))
    text["OOD set"] = text["OOD set"].where(~averages, f"*{AVERAGE}*")
    quartiles = (frame[f"forwards ({quartile})"].map("{:.2f}".format) for quartile in ("Q1", "Q3"))
    text["(Q1-Q3)"] = pd.Series(map("-".join, zip(*quartiles, strict=True))).where(frame["forwards"].notna(), "")
    costs = ["images/s", "peak MiB", "forwards", "(Q1-Q3)"]
    return text[["group", "OOD set", "method", *METRICS.values(), *DECISION, "ID accuracy", *costs]]


def _text(frame: pd.DataFrame, spread: bool = True) -> pd.DataFrame:
    """The table with all values as text, those of metrics with their spread."""
    text = frame[["group", "OOD set", "method"]].copy()
    for metric in METRICS.values():
        ends = [end for end in ("", " std", " low", " high") if metric + end in frame]
        value, *others = (frame[metric + end].map("{:.2f}".format) for end in ends)
        text[metric] = value
        if spread:
            *deviation, low, high = others
            for std in deviation:  # of several networks
                text[metric] += " +- " + std
            text[metric] += " [" + low + ", " + high + "]"
    for name, pattern in {**dict.fromkeys((*DECISION, "ID accuracy"), "{:.2f}"), **COSTS}.items():
        text[name] = ["" if pd.isna(value) else pattern.format(value) for value in frame[name]]
    return text


def remarks(suite: Suite, failures: Sequence[Failure]) -> list[str]:
    """What is not in the tables, and why: a line each."""
    lines = [*suite.notes, *(f"Missing: {sentence}" for sentence in suite.missing)]
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
        "\n".join(f"- {s.name} ({s.group}, {len(s)} images): {s.description}" for s in suite.test_sets),
        "\n".join(f"- {method.name}: {method.title}, by {method.source}{_options(method)}" for method in methods),
    ]
    replace(folder / "results.csv", frame.to_csv(index=False))
    replace(folder / "results.md", "\n\n".join(sections) + "\n")
    replace(folder / "results.json", json.dumps(record(frame, runs, failures, about), indent=2) + "\n")


def _made(runs: Sequence[Run], about: Mapping[str, Any]) -> str:
    """How the results were made, in a sentence or two."""
    made = f"Made by `{about['command']}` with torch {about['versions']['torch']} on {described(about['hardware'])}."
    timed = {
        f"{described(expense.hardware)} (batches of {expense.batch_size})"
        for outcome in runs[0].outcomes.values()
        if (expense := outcome.expense)
    }
    return made + (f" Costs measured on {' and '.join(sorted(timed))}." if timed else " Costs were not measured.")


def _options(method: Method) -> str:
    return "".join(f", {name}={value!r}" for name, value in method.options.items())


def record(
    frame: pd.DataFrame, runs: Sequence[Run], failures: Sequence[Failure], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything about the run, ready for JSON."""
    suite = runs[0].suite
    return {
        **about,
        "data": suite.name,
        "protocol": suite.protocol,
        "missing": list(suite.missing),
        "notes": list(suite.notes),
        "network": suite.network_name,
        "network_description": suite.network_description,
        "weights": [run.suite.weights for run in runs],
        "sets": [
            {name: getattr(images, name) for name in ("name", "group")}
            | {"images": len(images), "description": images.description, "fingerprint": images.fingerprint}
            for images in suite.test_sets
        ],
        "methods": [
            {name: getattr(outcome.method, name) for name in ("name", "title", "source")}
            | {"options": {name: _plain(value) for name, value in outcome.method.options.items()}}
            | {"cost": asdict(outcome.expense) if outcome.expense else None}
            for outcome in runs[0].outcomes.values()
        ],
        "failures": [asdict(failure) for failure in failures],
        # pandas writes null for what is not a number; the json module would write NaN, which is no JSON
        "results": json.loads(frame.to_json(orient="records", double_precision=15)),
    }


def _plain(value: object) -> object:
    return value if isinstance(value, (bool, int, float, str)) or value is None else repr(value)
