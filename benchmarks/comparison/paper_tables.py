"""The S&I paper's tables in their own layout, what was published beside what was measured.

Published values are those of ``published.csv``, each with its source there; a cell without one says so. They are
of other networks, trained otherwise, and of other selections of images, so they are beside the measured ones for
the eye and not for a difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from openood_sandi import SandI

from .methods import Method
from .report import markdown
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
METHODS = {
    "MSP": "msp",
    "ODIN": "odin",
    "Energy": "ebo",
    "GradNorm": "gradnorm",
    "RankFeat": "rankfeat",
    "ReAct": "react",
    "SCALE": "scale",
    "GAIA": "gaia",
    "S&I": "sandi",
}
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
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SandI).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


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
    networks = list(dict.fromkeys(published["network"]))
    rows = []
    for name in METHODS:
        of_method = published[published["method"] == name]
        known = [network for network in networks if network in set(of_method["network"])]
        absent = [network for network in networks if network not in known]
        # Networks without any value share a row.
        for shown in [*([network] for network in known), *([absent] if absent else [])]:
            values = of_method[of_method["network"].isin(shown)]
            rows.append(
                {("", "method"): name, ("", "network"): f"{', '.join(shown)}, published"}
                | {
                    (place, metric): _published(values, place, metric)
                    for place in (*sets, AVERAGE)
                    for metric in COLUMNS
                }
            )
        here = {("", "method"): name, ("", "network"): f"{run.suite.network_name}, here"}
        rows.append(here | _measured(frame, run, name, sets))
    yield f"### {title}: {run.suite.name}"
    if not networks:
        yield f"No published value for {run.suite.name} is at hand."
    yield markdown(pd.DataFrame(rows))


def _published(values: pd.DataFrame, shown: str, metric: str) -> str:
    found = values[(values["set"] == shown) & (values["metric"] == metric)]["value"]
    return str(found.iloc[0]) if len(found) else ABSENT


def _measured(frame: pd.DataFrame, run: Run, name: str, sets: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """The measured cells of a method; an average says over how many sets it is if some are missing."""
    rows = frame[frame["method"] == _ours(METHODS[name], run)].set_index("OOD set")
    found = rows.loc[[ours for ours in sets.values() if ours in rows.index], list(COLUMNS.values())]
    cells = {
        (shown, metric): f"{found.loc[ours, column]:.2f}" if ours in found.index else UNMEASURED
        for shown, ours in sets.items()
        for metric, column in COLUMNS.items()
    }
    share = "" if len(found) == len(sets) else f" ({len(found)} of {len(sets)})"
    for metric, column in COLUMNS.items():
        cells[AVERAGE, metric] = f"{found[column].mean():.2f}{share}" if len(found) else UNMEASURED
    return cells


def _ours(name: str, run: Run) -> str:
    """GAIA and S&I with the variant that the paper uses for so many classes."""
    variant = "a" if run.suite.classes > 100 else "z"
    return f"{name}-{variant}" if name in ("gaia", "sandi") else name


def _settings(method: Method) -> dict[str, object]:
    """All options of S&I that a method of ours stands for."""
    return _DEFAULTS | dict(method.options)


def _ablations(frame: pd.DataFrame, run: Run) -> Iterator[str]:
    methods = [outcome.method for outcome in run.outcomes.values() if outcome.method.source == "openood-sandi"]
    methods = [method for method in methods if set(method.options) <= set(_DEFAULTS)]
    base = next((method for method in methods if method.name == _ours("sandi", run)), None)
    if base is None:
        return
    for title, options in ABLATIONS.items():
        alike: dict[tuple[object, ...], Method] = {}
        for method in methods:  # of several names for the same settings the first
            if _differing(method, base) <= set(options):
                alike.setdefault(_place(method, options), method)
        rows = {place: _here(frame, method) for place, method in alike.items()}
        published = _published_ablation(run, title)
        if len(rows) > 1 or published:
            yield f"### Tables 3-5: {title}"
            if not published:
                yield "Published values: not at hand."
            places = sorted({*rows, *published}, key=_order)
            yield markdown(
                pd.DataFrame(
                    [
                        dict(zip(options, map(str, place), strict=True))
                        | {"method": alike[place].name if place in alike else ""}
                        | rows.get(place, dict.fromkeys(next(iter(rows.values())), UNMEASURED))
                        | (published.get(place, dict.fromkeys(PUBLISHED_COLUMNS, ABSENT)) if published else {})
                        for place in places
                    ]
                )
            )


def _differing(method: Method, base: Method) -> set[str]:
    ours, theirs = _settings(method), _settings(base)
    return {name for name in ours if ours[name] != theirs[name]}


def _place(method: Method, options: Sequence[str]) -> tuple[object, ...]:
    """The method's values of the options that vary."""
    values = (_settings(method)[name] for name in options)
    return tuple(f"{len(value)} modules" if isinstance(value, list) else value for value in values)


def _order(place: tuple[object, ...]) -> list[tuple[float, str]]:
    return [(float(value), "") if isinstance(value, (int, float)) else (0.0, str(value)) for value in place]


def _here(frame: pd.DataFrame, method: Method) -> dict[str, str]:
    averages = frame[(frame["method"] == method.name) & (frame["OOD set"] == AVERAGE)]
    return {
        f"{row['group']} {metric}, here": f"{row[column]:.2f}"
        for _, row in averages.iterrows()
        for metric, column in COLUMNS.items()
    }


def _published_ablation(run: Run, title: str) -> dict[tuple[object, ...], dict[str, str]]:
    """What the authors give, by the value that varies: of step sizes only, as far as is known here."""
    rows = PUBLISHED[(PUBLISHED["table"] == "3-5") & (PUBLISHED["data"] == run.suite.name)]
    found: dict[tuple[object, ...], dict[str, str]] = {}
    for (method, metric), values in rows.groupby(["method", "metric"])["value"]:
        option, _, value = method.removeprefix("S&I ").rpartition(" ")
        if option == title:
            cells = found.setdefault((float(value),), dict.fromkeys(PUBLISHED_COLUMNS, ABSENT))
            cells[f"average {metric}, {PUBLISHED_ON}"] = values.iloc[0]
    return found


def _throughput(frame: pd.DataFrame, run: Run) -> Iterator[str]:
    speeds = frame.drop_duplicates("method").set_index("method")["images/s"].dropna()
    published = PUBLISHED[PUBLISHED["table"] == "6"].set_index("method")["value"].astype(float)
    names = {name: _ours(METHODS[name], run) for name in published.index}
    if "msp" not in speeds or not any(ours in speeds for name, ours in names.items() if name != "MSP"):
        return
    rows = []
    for name, ours in names.items():
        here = speeds.get(ours)
        rows.append(
            {
                "method": name,
                "images/s, published": f"{published[name]:.1f}",
                "times slower than MSP, published": f"{published['MSP'] / published[name]:.2f}",
                "images/s, here": f"{here:.1f}" if here else UNMEASURED,
                "times slower than MSP, here": f"{speeds['msp'] / here:.2f}" if here else UNMEASURED,
            }
        )
    yield "### Table 6: throughput"
    yield markdown(pd.DataFrame(rows))
