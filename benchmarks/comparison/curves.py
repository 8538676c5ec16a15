"""Scores of two sets as a few numbers to draw: a threshold, a binned histogram, a thin ROC curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_curve

from .metrics import Floats

KEPT = 0.95
BINS = 50
POINTS = 200
"""Of a ROC curve: thinned, it is nowhere further than a percent or two from all of its points."""
OUTERMOST = 0.5
"""Percent of the scores at either end, which would squeeze the others into a few bins."""


@dataclass(frozen=True)
class Histogram:
    """Shares of ID and OOD images in ``BINS`` equal bins from ``low`` to ``high``, the last with what lies beyond."""

    low: float
    high: float
    known: Floats
    unknown: Floats


def threshold(known: Floats) -> float:
    """The smallest of the ID scores (N,) at which ``KEPT`` of them are kept: a larger one is called OOD."""
    return float(np.quantile(known, KEPT, method="inverted_cdf"))


def histogram(known: Floats, unknown: Floats, others: tuple[Floats, ...] = ()) -> Histogram:
    """Of ID and OOD scores, (N,) and (M,), over the range of both and of ``others``, to compare histograms by."""
    scored = (known, unknown, *others)
    low = min(float(np.percentile(some, OUTERMOST)) for some in scored)
    high = max(float(np.percentile(some, 100 - OUTERMOST)) for some in scored)
    if not low < high:
        low, high = low - 0.5, high + 0.5
    shares = [np.histogram(np.clip(some, low, high), BINS, (low, high))[0] / len(some) for some in (known, unknown)]
    return Histogram(low, high, *shares)


def roc(known: Floats, unknown: Floats, points: int = POINTS) -> tuple[Floats, Floats]:
    """Shares of ID images lost and of OOD images caught, both rising from 0 to 1, at ``points`` thresholds at most."""
    is_ood = np.repeat([False, True], [len(known), len(unknown)])
    lost, caught, _ = roc_curve(is_ood, np.concatenate([known, unknown]))
    way = lost + caught  # from 0 to 2, rising: points at equal distances on it are nowhere far apart
    kept = np.unique(np.searchsorted(way, np.linspace(0, 2, points)).clip(max=len(way) - 1))
    return lost[kept], caught[kept]
