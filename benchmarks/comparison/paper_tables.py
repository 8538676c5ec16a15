"""The S&I paper's Tables 1 to 7 in their own layout, what was published beside what was measured.

``published.csv`` has every number of the paper's tables. Its networks, their training and its selections of images are
other ones than a run's, so published and measured values stand beside each other for the eye and not for a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from openood_sandi import SandI
from openood_sandi.detectors.options import options_of

from .files import markdown
from .suite import Suite
from .table import AVERAGE, FPR_PAPER, Run

PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str, keep_default_na=False)
TITLES = {
    "1": "CIFAR-100",
    "2": "ImageNet",
    "3": "ImageNet, ablation: no attack, layer splitting",
    "4": "ImageNet, ablation: attack, no layer splitting",
    "5": "ImageNet, ablation: neither attack nor layer splitting",
    "6": "images per second on ImageNet",
    "7": "CIFAR-100, step sizes of S&I, and SCALE (Appendix D)",
}
"""What each of the paper's tables is of, by its number."""
NOTES = {
    "5": (
        "Of one gradient at the clean activations, Eq. 9 walks no path that could be split: by the paper's equations "
        "its Table 5 is its Table 3, and so it is here.",
    )
}
"""More to say of a table, by its number."""
SPEED = "6"
COLUMNS = {"FPR95": FPR_PAPER, "AUROC": "AUROC"}
"""The paper's metrics and our columns."""
UNMEASURED = "not measured"
ROUNDING = 0.02
"""In percent: published averages are of values that were not rounded yet."""

CIFAR_SETS = {"SVHN": "svhn", "LSUN": "lsun", "TinyImageNet": "tin", "Places": "places365", "Textures": "texture"}
IMAGENET_SETS = {"iNaturalist": "inaturalist", "Textures": "textures", "SUN": "sun", "Places": "places"}
SETS = {"cifar100": CIFAR_SETS, "imagenet": IMAGENET_SETS}
"""The paper's OOD sets and ours, by the suite's name."""
OTHER_METHODS = {"Energy": "ebo"}
"""Methods of others whose name here is not the paper's in small letters."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "S&I": {},
    "S&I, no attack, layer splitting": {"steps": 1},
    "S&I, attack, no layer splitting": {"splitting": False},
    "S&I, no attack, no layer splitting": {"steps": 1, "splitting": False},
    **{f"S&I, step size {eta}": {"step_size": float(eta)} for eta in ("0.0005", "0.001", "0.0015", "0.002")},
}
"""The paper's settings of S&I, as options that differ from the defaults."""


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables: ``title``, ``notes`` on how here differs from there, and ``cells``, all text."""

    title: str
    notes: str
    cells: pd.DataFrame


def tables(frame: pd.DataFrame, run: Run) -> list[PaperTable]:
    """Those of the paper's tables that this run has something to say in; ``frame`` is :func:`.table.results`."""
    numbers = PUBLISHED[PUBLISHED["data"] == run.suite.name]["table"].unique()
    found = [_detection(number, frame, run) for number in numbers if number != SPEED]
    return [*found, *_speed(frame, run)]


def sections(frame: pd.DataFrame, run: Run) -> list[str]:
    """Markdown of :func:`tables`."""
    found = tables(frame, run)
    return [INTRODUCTION] * bool(found) + [f"### {t.title}\n\n{t.notes}\n\n{markdown(t.cells)}" for t in found]


INTRODUCTION = """\
## The paper's tables

Rows with a network alone are published (Zhang et al., ICML 2025); rows with "here" are this run's. FPR95 is the
paper's, OOD let in when 95 % of ID is kept. Networks, their training and the choice of images differ."""


def _detection(number: str, frame: pd.DataFrame, run: Run) -> PaperTable:
    """A table of FPR95 and AUROC: each of the paper's rows, and below it those measured here."""
    published = PUBLISHED[PUBLISHED["table"] == number]
    sets = list(published["set"].unique())
    columns = pd.MultiIndex.from_product([sets, COLUMNS])
    cells = published.pivot(index=["method", "network"], columns=["set", "metric"], values="value")[columns]
    rows: dict[tuple[str, str], Any] = {}
    for name in published["method"].unique():
        rows |= {(name, network): values for network, values in cells.loc[name].iterrows()}
        rows |= _measured(frame, run, name, sets)
    index = pd.MultiIndex.from_tuples(rows, names=["method", "network"])
    table = pd.DataFrame(list(rows.values()), index=index, columns=columns)
    notes = " ".join([_sets_here(run.suite), *_averages_that_are_none(published), *NOTES.get(number, ())])
    return PaperTable(f"Table {number}: {TITLES[number]}", notes, _flat(table))


def _measured(frame: pd.DataFrame, run: Run, name: str, sets: list[str]) -> dict[tuple[str, str], pd.Series]:
    """By (method, network), the measured cells of the paper's method ``name``; one empty row if there is none."""
    here = f"{run.suite.network_name}, here"
    ours = _ours(name, run)
    if not ours:
        return {(name, here): pd.Series(UNMEASURED, pd.MultiIndex.from_product([sets, COLUMNS]))}
    rows = frame[frame["OOD set"] != AVERAGE].set_index(["method", "OOD set"])[list(COLUMNS.values())]
    rows = rows.rename(columns={ours: paper for paper, ours in COLUMNS.items()})
    found = {}
    for method in ours:
        values = rows.loc[method].reindex([SETS[run.suite.name][one] for one in sets if one != AVERAGE])
        values.index = pd.Index([one for one in sets if one != AVERAGE])
        found[name, f"{here} ({method})"] = _with_average(values)
    return found


def _with_average(values: pd.DataFrame) -> pd.Series:
    """Text by (set, metric), with the average, which says over how many sets it is if some are missing."""
    measured = int(values["AUROC"].count())
    share = "" if measured == len(values) else f" ({measured} of {len(values)})"
    average = values.mean().map("{:.2f}".format) + share if measured else UNMEASURED
    text = values.map("{:.2f}".format).where(values.notna(), UNMEASURED)
    text.loc[AVERAGE] = average
    return text.stack()


def _ours(name: str, run: Run) -> list[str]:
    """Our methods that are the paper's ``name``: of S&I and GAIA the variant that the paper uses for so many classes.

    S&I is also found with the paper's split points, if these were asked for.
    """
    variant = "A" if run.suite.classes > 100 else "Z"
    if name not in SETTINGS:
        own = f"gaia-{variant.lower()}" if name == "GAIA" else OTHER_METHODS.get(name, name.lower())
        return [own] if own in run.outcomes else []
    defaults = options_of(SandI)
    wanted = {**defaults, "variant": variant, **SETTINGS[name]}
    return [method for method, options in _settings(run, defaults) if _alike(options, wanted)]


def _settings(run: Run, defaults: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The run's settings of S&I and all their options; GAIA, which is one of them, is a method of its own."""
    for method, outcome in run.outcomes.items():
        of_sandi = outcome.method.source == "openood-sandi" and set(outcome.method.options) <= set(defaults)
        if of_sandi and not method.startswith("gaia"):
            yield method, {**defaults, **outcome.method.options}


def _alike(options: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether options are those wanted; a list of split points is the paper's, with its own feature map."""
    places = ("splits", "feature") if isinstance(options["splits"], list) else ()
    return all(options[option] == value for option, value in wanted.items() if option not in places)


def _sets_here(suite: Suite) -> str:
    """What the paper's sets are here, and which of them are missing."""
    known = {images.name: images for images in suite.out_of_distribution}
    told = [
        f"{paper} is `{ours}` ({len(known[ours])} images)" if ours in known else f"{paper} is missing"
        for paper, ours in SETS[suite.name].items()
    ]
    return f"Here: network {suite.network_name}; {'; '.join(told)}."


def _averages_that_are_none(published: pd.DataFrame) -> Iterator[str]:
    """Published averages that differ from the mean of their sets by more than rounding does."""
    for (method, network, metric), rows in published.groupby(["method", "network", "metric"], sort=False):
        values = rows.set_index("set")["value"].astype(float)
        mean = values.drop(AVERAGE).mean()
        if abs(values[AVERAGE] - mean) > ROUNDING:
            told = f"{metric} of {method} on {network}, {values[AVERAGE]:.2f}"
            yield f"The published average {told}, is not the mean of its sets, {mean:.2f}."


def _speed(frame: pd.DataFrame, run: Run) -> list[PaperTable]:
    """Images per second, and how many times slower than MSP, which travels between machines."""
    rows = PUBLISHED[PUBLISHED["table"] == SPEED]
    published = rows.set_index("method")["value"].astype(float)
    speeds = frame.drop_duplicates("method").set_index("method")["images/s"]
    ours = {name: next(iter(_ours(name, run)), None) for name in published.index}
    here = pd.Series({name: speeds.get(own) for name, own in ours.items()}, dtype=float)
    if pd.isna(here["MSP"]) or here.drop("MSP").isna().all():
        return []
    network = f"{run.suite.network_name}, here"
    table = {"method": published.index.to_series()}
    for values, where, digits in ((published, "published", 4), (here, network, 1)):
        table[f"images/s, {where}"] = values.map(f"{{:.{digits}f}}".format, na_action="ignore")
        slower = values["MSP"] / values
        table[f"times slower than MSP, {where}"] = slower.map("{:.2f}".format, na_action="ignore")
    text = pd.DataFrame(table).astype(object).fillna(UNMEASURED)
    notes = "Published: of another machine and a network that the paper does not name there; its other ImageNet tables "
    notes += f"are of {rows['network'].iloc[0]}."
    return [PaperTable(f"Table {SPEED}: {TITLES[SPEED]}", notes, text)]


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """With the index as columns, and one line of headers."""
    table = table.set_axis([" ".join(pair) for pair in table.columns], axis=1)
    return table.reset_index()
