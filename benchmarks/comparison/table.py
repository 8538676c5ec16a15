"""Outcomes as one table of numbers at full precision: a row for each method on each OOD set and on each average."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd

from . import curves, metrics
from .console import progress
from .cost import Expense
from .evaluation import Outcome
from .metrics import Floats, detection
from .suite import ImageSet, Suite

FPR_OPENOOD = "FPR95 ID lost (OpenOOD)"
FPR_PAPER = "FPR95 OOD let in (paper)"
METRICS = dict(zip(metrics.METRICS, ("AUROC", "AUPR-in", "AUPR-out", FPR_OPENOOD, FPR_PAPER), strict=True))
"""Columns of the metrics, in percent. Beside each is its spread: ``low`` and ``high``; of several runs ``std``, ``min``
and ``max``."""
DECISION = ("ID lost at threshold", "OOD let in at threshold")
"""Columns of what the fitted threshold does to test images, in percent."""
AVERAGE = "average"
"""The name, as an OOD set, of the mean over a group's sets."""
RESAMPLES = 1000

Place = tuple[str, str]
"""A group, and one of its OOD sets or ``AVERAGE``."""


@dataclass(frozen=True)
class Run:
    """All methods' outcomes with one network; ``seed`` is that of its training."""

    seed: int
    suite: Suite
    outcomes: Mapping[str, Outcome]


@dataclass(frozen=True)
class OodGroup:
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

    @property
    def places(self) -> tuple[str, ...]:
        """The average, then each set."""
        return (AVERAGE, *(images.name for images in self.sets))


def groups(suite: Suite) -> list[OodGroup]:
    """The suite's groups that have a set."""
    missing = [
        match.groups() for sentence in suite.missing if (match := re.match(r"(\S+) \((near|far)-OOD\)", sentence))
    ]
    found = [
        OodGroup(
            name,
            tuple(images for images in suite.out_of_distribution if images.group == name),
            tuple(absent for absent, group in missing if group == name),
        )
        for name in ("near", "far")
    ]
    return [group for group in found if group.sets]


def results(runs: Sequence[Run], resamples: int = RESAMPLES) -> pd.DataFrame:
    """The table, in percent but for cost; rows by group, averages first, then by set and method.

    Beside each metric are the ends of its 95 % bootstrap interval over images, and with several runs, whose mean is
    given, their standard deviation (of the population, as OpenOOD's), minimum and maximum. Costs are those
    of the first run.
    """
    rows = []
    for name in progress(list(runs[0].outcomes), "metrics", "methods"):
        spreads = _spreads(runs, name, resamples)
        costs = _costs(runs[0].outcomes[name].expense)
        for group in groups(runs[0].suite):
            counts = {AVERAGE: sum(map(len, group.sets)), **{images.name: len(images) for images in group.sets}}
            for place, count in counts.items():
                of = {"group": group.name, "OOD set": place, "images": count, "method": name}
                rows.append({**of, **spreads[group.name, place], **costs})
    frame = pd.DataFrame(rows)
    order = frame.groupby(["group", "OOD set"], sort=False).ngroup().argsort(kind="stable")
    return frame.iloc[order].reset_index(drop=True)


def point_metrics(outcome: Outcome, suite: Suite) -> dict[Place, Floats]:
    """Metrics (5,) in 0..1 by group and OOD set, averages included."""
    known = outcome.scored[suite.in_distribution.name].scores
    return _averaged(suite, lambda images: np.array(astuple(detection(known, outcome.scored[images.name].scores))))


def _averaged(suite: Suite, of: Callable[[ImageSet], Floats]) -> dict[Place, Floats]:
    """What ``of`` gives for each set, and its mean over each group."""
    found: dict[Place, Floats] = {}
    for group in groups(suite):
        by_set = {(group.name, images.name): of(images) for images in group.sets}
        found |= {(group.name, AVERAGE): np.mean(list(by_set.values()), axis=0), **by_set}
    return found


def decisions(outcome: Outcome, suite: Suite) -> dict[Place, Floats]:
    """(ID lost, OOD let in) in 0..1 at the threshold that keeps 95 % of the validation ID images; NaN without any."""
    if not suite.validation or suite.validation[0].name not in outcome.scored:
        return _averaged(suite, lambda _: np.full(2, np.nan))
    fitted = outcome.scored[suite.validation[0].name].scores
    threshold = curves.threshold(fitted)
    lost = np.mean(outcome.scored[suite.in_distribution.name].scores > threshold)
    return _averaged(suite, lambda images: np.array([lost, np.mean(outcome.scored[images.name].scores <= threshold)]))


def _spreads(runs: Sequence[Run], method: str, resamples: int) -> dict[Place, dict[str, float]]:
    """Percentages, means over runs, with their spreads, by group and OOD set."""
    by_run = [point_metrics(run.outcomes[method], run.suite) for run in runs]
    decided = [decisions(run.outcomes[method], run.suite) for run in runs]
    resampled = [_resampled(run, method, resamples) for run in runs]
    accuracies = [run.outcomes[method].scored[run.suite.in_distribution.name].accuracy for run in runs]
    of_id = {"ID accuracy": 100 * float(np.mean(accuracies))}
    if len(runs) > 1:
        of_id["ID accuracy std"] = 100 * float(np.std(accuracies))
    found = {}
    for place in by_run[0]:
        values = np.stack([metrics[place] for metrics in by_run])
        low, high = np.percentile(np.mean([drawn[place] for drawn in resampled], axis=0), [2.5, 97.5], axis=0)
        over_runs = {" std": values.std(axis=0), " min": values.min(axis=0), " max": values.max(axis=0)}
        deviation = over_runs if len(runs) > 1 else {}
        decision = 100 * np.mean([one[place] for one in decided], axis=0)
        cells = _cells({"": values.mean(axis=0), **deviation, " low": low, " high": high})
        found[place] = {**cells, **dict(zip(DECISION, map(float, decision), strict=True)), **of_id}
    return found


def _resampled(run: Run, method: str, resamples: int) -> dict[Place, Floats]:
    """Metrics (resamples, 5) of a run; every run and method sees the same draws of images."""
    outcome, suite = run.outcomes[method], run.suite
    known = outcome.scored[suite.in_distribution.name].scores
    id_draws = metrics.draws(len(known), resamples, 0, 0)
    strata = [images.name for group in groups(suite) for images in group.sets]

    def of(images: ImageSet) -> Floats:
        ood_draws = metrics.draws(len(images), resamples, 0, 1 + strata.index(images.name))
        return metrics.resampled(known, outcome.scored[images.name].scores, id_draws, ood_draws)

    return _averaged(suite, of)


def _cells(values: Mapping[str, Floats]) -> dict[str, float]:
    """{column: percentage} of metrics (5,) in 0..1 by what their columns' names end with."""
    columns = [(at, metric, end) for at, metric in enumerate(METRICS.values()) for end in values]
    return {metric + end: 100 * float(values[end][at]) for at, metric, end in columns}


def _costs(expense: Expense | None) -> dict[str, float]:
    names = ("images/s", "forwards", "forwards (Q1)", "forwards (Q3)", "peak MiB")
    if expense is None:
        return dict.fromkeys(names, float("nan"))
    lower, median, upper = expense.cost.forwards
    values = (expense.cost.images_per_second, median, lower, upper, expense.peak_bytes / 2**20)
    return dict(zip(names, values, strict=True))
