"""Outcomes as one table of numbers at full precision: a row for each method on each OOD set and on each average."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd

from . import bootstrap
from .bootstrap import Draws, Floats
from .evaluation import Outcome, Scored
from .expense import Expense
from .metrics import detection
from .progress import progress
from .suite import ImageSet, Suite

FPR_OPENOOD = "FPR95 ID lost (OpenOOD)"
FPR_PAPER = "FPR95 OOD let in (paper)"
METRICS = dict(zip(bootstrap.METRICS, ("AUROC", "AUPR-in", "AUPR-out", FPR_OPENOOD, FPR_PAPER), strict=True))
"""Columns of the metrics, in percent. Each has its spread beside it: ``low`` and ``high``, or ``std``."""
AVERAGE = "average"
"""The name, as an OOD set, of the mean over a group's sets."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Run:
    """All methods' outcomes with one network; ``seed`` is that of its training."""

    seed: int
    suite: Suite
    outcomes: Mapping[str, Outcome]


@dataclass(frozen=True)
class Group:
    """Near- or far-OOD: the sets at hand, and the names of those that the protocol has and that are missing."""

    name: str
    sets: tuple[ImageSet, ...]
    missing: tuple[str, ...]

    @property
    def title(self) -> str:
        """``far (2 of 4: svhn, places365 missing)``: what an average is over."""
        return f"{self.count[:-1]}: {', '.join(self.missing)} missing)" if self.missing else self.count

    @property
    def count(self) -> str:
        """``far (2 of 4)``."""
        return f"{self.name} ({len(self.sets)} of {len(self.sets) + len(self.missing)})"


def groups(suite: Suite) -> list[Group]:
    """The suite's groups that have a set."""
    missing = [
        match.groups() for sentence in suite.missing if (match := re.match(r"(\S+) \((near|far)-OOD\)", sentence))
    ]
    found = [
        Group(
            name,
            tuple(images for images in suite.out_of_distribution if images.group == name),
            tuple(absent for absent, group in missing if group == name),
        )
        for name in ("near", "far")
    ]
    return [group for group in found if group.sets]


def results(runs: Sequence[Run], resamples: int = RESAMPLES) -> pd.DataFrame:
    """The table, in percent but for cost; rows by group, averages first, then by set and method.

    With one run the spread is a 95 % bootstrap interval over images; with several, the mean over runs is given and
    its spread is their standard deviation (of the population, as OpenOOD's). Costs are those of the first run.
    """
    if len(runs) == 1:
        rows = _with_intervals(runs[0], resamples)
        metrics = [name + end for name in METRICS.values() for end in ("", " low", " high")]
    else:
        rows = _over_runs(runs)
        metrics = [name + end for name in METRICS.values() for end in ("", " std")]
    of_id = ["ID accuracy"] if len(runs) == 1 else ["ID accuracy", "ID accuracy std"]
    frame = pd.DataFrame(rows, columns=["group", "OOD set", "images", "method", *metrics, *of_id, *_costs(None)])
    places = [
        (group.name, name) for group in groups(runs[0].suite) for name in (AVERAGE, *(s.name for s in group.sets))
    ]
    rank = {place: index for index, place in enumerate(places)}
    by_set = [rank[place] for place in zip(frame["group"], frame["OOD set"], strict=True)]
    return frame.iloc[np.argsort(by_set, kind="stable")].reset_index(drop=True)


def accuracy(known: Scored) -> float:
    """The share of ID images whose class is predicted."""
    return float(np.mean(known.pred == known.labels))


def point_metrics(outcome: Outcome, suite: Suite) -> dict[tuple[str, str], Floats]:
    """Metrics (5,) in 0..1 by group and OOD set, averages included."""
    known = outcome.scored[suite.in_distribution.name].scores
    found: dict[tuple[str, str], Floats] = {}
    for group in groups(suite):
        by_set = {
            (group.name, images.name): np.array(astuple(detection(known, outcome.scored[images.name].scores)))
            for images in group.sets
        }
        found |= {(group.name, AVERAGE): np.mean(list(by_set.values()), axis=0), **by_set}
    return found


def _with_intervals(run: Run, resamples: int) -> list[dict[str, object]]:
    rows = []
    id_draws = bootstrap.draws(len(run.suite.in_distribution), resamples, 0, 0)
    for name, outcome in progress(list(run.outcomes.items()), "bootstrap", "method"):
        spread = _resampled(outcome, run.suite, id_draws)
        for place, values in point_metrics(outcome, run.suite).items():
            low, high = bootstrap.interval(spread[place])
            cells: dict[str, float] = {}
            for metric, value, lower, upper in zip(METRICS.values(), values, low, high, strict=True):
                cells |= {metric: 100 * value, f"{metric} low": 100 * lower, f"{metric} high": 100 * upper}
            rows.append(_row(name, place, run, 100 * accuracy(_known(run, name))) | cells)
    return rows


def _resampled(outcome: Outcome, suite: Suite, id_draws: Draws) -> dict[tuple[str, str], Floats]:
    """Resampled metrics (resamples, 5) by group and OOD set, averages included."""
    known = outcome.scored[suite.in_distribution.name].scores
    found: dict[tuple[str, str], Floats] = {}
    stratum = 0
    for group in groups(suite):
        by_set = {}
        for images in group.sets:
            stratum += 1
            ood_draws = bootstrap.draws(len(images), len(id_draws), 0, stratum)
            scores = outcome.scored[images.name].scores
            by_set[group.name, images.name] = bootstrap.resampled(known, scores, id_draws, ood_draws)
        found |= {(group.name, AVERAGE): np.mean(list(by_set.values()), axis=0), **by_set}
    return found


def _over_runs(runs: Sequence[Run]) -> list[dict[str, object]]:
    rows = []
    for name in runs[0].outcomes:
        accuracies = [accuracy(_known(run, name)) for run in runs]
        by_run = [point_metrics(run.outcomes[name], run.suite) for run in runs]
        for place in by_run[0]:
            values = np.stack([found[place] for found in by_run])
            cells: dict[str, float] = {}
            for metric, mean, std in zip(METRICS.values(), values.mean(axis=0), values.std(axis=0), strict=True):
                cells |= {metric: 100 * mean, f"{metric} std": 100 * std}
            cells["ID accuracy std"] = 100 * float(np.std(accuracies))
            rows.append(_row(name, place, runs[0], 100 * float(np.mean(accuracies))) | cells)
    return rows


def _known(run: Run, method: str) -> Scored:
    return run.outcomes[method].scored[run.suite.in_distribution.name]


def _row(method: str, place: tuple[str, str], run: Run, id_accuracy: float) -> dict[str, object]:
    group, name = place
    sets = [s for s in run.suite.out_of_distribution if s.group == group and name in (AVERAGE, s.name)]
    return {
        "group": group,
        "OOD set": name,
        "images": sum(map(len, sets)),
        "method": method,
        "ID accuracy": id_accuracy,
        **_costs(run.outcomes[method].expense),
    }


def _costs(expense: Expense | None) -> dict[str, float]:
    nothing = float("nan")
    lower, median, upper = expense.cost.forwards if expense else (nothing, nothing, nothing)
    return {
        "images/s": expense.cost.images_per_second if expense else nothing,
        "forwards": median,
        "forwards (Q1)": lower,
        "forwards (Q3)": upper,
        "peak MiB": expense.peak_bytes / 2**20 if expense else nothing,
    }
