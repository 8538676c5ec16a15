"""The S&I paper's tables in their own layout, what was published beside what was measured.

Published values are those of ``published.csv``, each with its source there; a cell without one says so. They are
of other networks, trained otherwise, and of other selections of images, so they are beside the measured ones for
the eye and not for a difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from openood_sandi import SandI

from .files import markdown
from .table import AVERAGE, FPR_PAPER, Run

PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str, keep_default_na=False)
COLUMNS = {"FPR95": FPR_PAPER, "AUROC": "AUROC"}
"""The paper's metrics and our columns."""
ABSENT = "not at hand"
UNMEASURED = "not measured"

CIFAR_SETS = {"SVHN": "svhn", "LSUN": "lsun", "TinyImageNet": "tin", "Places": "places365", "Textures": "texture"}
IMAGENET_SETS = {"iNaturalist": "inaturalist", "SUN": "sun", "Places": "places", "Textures": "textures"}
MAIN: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "cifar10": ("Table 1", CIFAR_SETS),
    "cifar100": ("Table 1", CIFAR_SETS),
    "imagenet": ("Table 2", IMAGENET_SETS),
}
"""By the suite's name, the main comparison there and its OOD sets: the paper's name and ours."""
COMPARED = ("MSP", "ODIN", "Energy", "GradNorm", "RankFeat", "ReAct", "SCALE", "GAIA", "S&I")
METHODS = {name: {"Energy": "ebo", "S&I": "sandi"}.get(name, name.lower()) for name in COMPARED}
"""What the authors compare, by the paper's name; of GAIA and S&I, Z on CIFAR and A on ImageNet."""
ABLATIONS = {
    "attack (T = 1 is none) and layer splitting": ("steps", "splitting"),
    "step size": ("step_size",),
    "split points": ("splits", "feature"),
    "integration of the gradients": ("combine",),
}
"""The paper's Tables 3-5 as far as they are known here: the options of S&I that vary, others as published."""
PUBLISHED_ON = "published (ResNet-34, five sets)"
PUBLISHED_COLUMNS = [f"average {metric}, {PUBLISHED_ON}" for metric in COLUMNS]
DEFAULTS: dict[str, Any] = SandI.__init__.__kwdefaults__ or {}


def sections(frame: pd.DataFrame, run: Run) -> list[str]:
    """Markdown of the tables that this run has something to say in."""
    found = [*_main(frame, run), *_ablations(frame, run), *_throughput(frame, run)]
    if not found:
        return []
    heading = (
        "## The paper's tables\n\nPublished values are the authors': of the paper's abstract or Table 6, or of their "
        f'repository (README, additional results). Where none was found, the cell says "{ABSENT}". FPR95 is the '
        "paper's, OOD let in. Networks, their training and the choice of images differ."
    )
    return [heading, *found]


def _main(frame: pd.DataFrame, run: Run) -> Iterator[str]:
    if run.suite.name not in MAIN:
        return
    title, sets = MAIN[run.suite.name]
    published = PUBLISHED[(PUBLISHED["data"] == run.suite.name) & PUBLISHED["table"].isin(["1", "2"])]
    cells = published.pivot(index=["method", "network"], columns=["set", "metric"], values="value")
    rows: dict[tuple[str, str], Mapping[Any, Any]] = {}
    for name in METHODS:
        known = [network for network in published["network"].unique() if (name, network) in cells.index]
        rows |= {(name, f"{network}, published"): cells.loc[(name, network)].to_dict() for network in known}
        if absent := ", ".join(network for network in published["network"].unique() if network not in known):
            rows[name, f"{absent}, published"] = {}  # networks without any value share a row
        rows[name, f"{run.suite.network_name}, here"] = _measured(frame, run, name, sets)
    table = pd.DataFrame(
        list(rows.values()),
        index=pd.MultiIndex.from_tuples(rows, names=["method", "network"]),
        columns=pd.MultiIndex.from_product([[*sets, AVERAGE], COLUMNS]),
    )
    yield f"### {title}: {run.suite.name}"
    if published.empty:
        yield f"No published value for {run.suite.name} is at hand."
    yield markdown(table.fillna(ABSENT).reset_index())


def _measured(frame: pd.DataFrame, run: Run, name: str, sets: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """The measured cells of a method; an average says over how many sets it is if some are missing."""
    rows = frame[(frame["method"] == _ours(METHODS[name], run)) & (frame["OOD set"] != AVERAGE)].set_index("OOD set")
    found = rows.reindex(list(sets.values()))
    measured = int(found["AUROC"].count())
    share = "" if measured == len(sets) else f" ({measured} of {len(sets)})"
    cells: dict[tuple[str, str], str] = {}
    for metric, column in COLUMNS.items():
        text = [f"{value:.2f}" if pd.notna(value) else UNMEASURED for value in found[column]]
        cells |= {(place, metric): value for place, value in zip(sets, text, strict=True)}
        cells[AVERAGE, metric] = f"{found[column].mean():.2f}{share}" if measured else UNMEASURED
    return cells


def _ours(name: str, run: Run) -> str:
    """GAIA and S&I with the variant that the paper uses for so many classes."""
    variant = "a" if run.suite.classes > 100 else "z"
    return f"{name}-{variant}" if name in ("gaia", "sandi") else name


def _ablations(frame: pd.DataFrame, run: Run) -> Iterator[str]:
    of_sandi = {
        name: DEFAULTS | dict(outcome.method.options)
        for name, outcome in run.outcomes.items()
        if outcome.method.source == "openood-sandi" and set(outcome.method.options) <= set(DEFAULTS)
    }
    base = _ours("sandi", run)
    if base not in of_sandi:
        return
    settings = pd.DataFrame(of_sandi.values(), index=pd.Index(of_sandi, name="method"))
    settings["splits"] = settings["splits"].map(lambda s: f"{len(s)} modules" if isinstance(s, list) else s)
    averages = frame[frame["OOD set"] == AVERAGE].pivot(index="method", columns="group", values=list(COLUMNS.values()))
    here = {
        f"{group} {metric}, here": averages[column, group].map("{:.2f}".format)
        for group in frame["group"].unique()
        for metric, column in COLUMNS.items()
    }
    for title, varying in ABLATIONS.items():
        options = list(varying)
        others = settings.drop(columns=options).map(repr)
        alike = settings[others.eq(others.loc[base]).all(axis=1)].drop_duplicates(options)[options]
        alike = alike.join(pd.DataFrame(here)).reset_index()
        published = _published_ablation(run, title)
        if len(published):
            alike = alike.merge(published, how="outer", on=options)
        elif len(alike) < 2:
            continue
        yield f"### Tables 3-5: {title}"
        if published.empty:
            yield "Published values: not at hand."
        alike = alike.sort_values(options)[[*options, *alike.columns.drop(options)]]
        yield markdown(alike.astype(object).fillna({"method": "", **dict.fromkeys(here, UNMEASURED)}).fillna(ABSENT))


def _published_ablation(run: Run, title: str) -> pd.DataFrame:
    """What the authors give, by the value that varies: of step sizes only, as far as is known here."""
    rows = PUBLISHED[(PUBLISHED["table"] == "3-5") & (PUBLISHED["data"] == run.suite.name)]
    option = rows["method"].str.extract(rf"S&I {re.escape(title)} (?P<value>\S+)$")["value"].astype(float)
    rows = rows.assign(option=option).dropna(subset="option")
    values = rows.pivot(index="option", columns="metric", values="value").reindex(columns=list(COLUMNS))
    return values.set_axis(PUBLISHED_COLUMNS, axis=1).rename_axis(ABLATIONS[title][0]).reset_index()


def _throughput(frame: pd.DataFrame, run: Run) -> Iterator[str]:
    published = PUBLISHED[PUBLISHED["table"] == "6"].set_index("method")["value"].astype(float)
    speeds = frame.drop_duplicates("method").set_index("method")["images/s"]
    here = pd.Series({name: speeds.get(_ours(METHODS[name], run)) for name in published.index}, dtype=float)
    if pd.isna(here["MSP"]) or here.drop("MSP").isna().all():
        return
    table = {"method": published.index.to_series()}
    for speed, where in ((published, "published"), (here, "here")):
        for name, values, digits in (("images/s", speed, 1), ("times slower than MSP", speed["MSP"] / speed, 2)):
            text = values.map(f"{{:.{digits}f}}".format, na_action="ignore")
            table[f"{name}, {where}"] = text.astype(object).fillna(UNMEASURED)
    yield "### Table 6: throughput"
    yield markdown(pd.DataFrame(table))
