"""Detection metrics, equal to OpenOOD's on the same scores, and how much they would move with other images.

Two conventions of FPR95 are in use, and the same scores can give 90 % by one and 40 % by the other, so both
are reported under names that say what is counted.

By percentile bootstrap, ID and OOD images are resampled separately (stratified), each set to its own size. All methods
of a comparison see the same resamples, and one resample of the ID images serves every OOD set, so that averages over
sets and differences between methods vary as they would with other images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import metrics

Scores = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Detection:
    """How well scores tell in-distribution (ID) from out-of-distribution (OOD) images; all values in 0..1."""

    auroc: float
    """Probability that an OOD image scores above an ID image (ties count half)."""
    aupr_in: float
    """Area under the precision-recall curve with ID as the positive class (trapezoids, as OpenOOD)."""
    aupr_out: float
    """The same with OOD as the positive class."""
    fpr95_id_lost: float
    """Share of ID images rejected when 95 % of the OOD images are caught: OOD is positive, as in OpenOOD."""
    fpr95_ood_let_in: float
    """Share of OOD images let in when 95 % of the ID images are kept: ID is positive, as in GAIA and S&I."""


def detection(id_scores: Scores, ood_scores: Scores) -> Detection:
    """Metrics of scores (N,) and (M,), where a larger score means "more OOD".

    Raises ValueError if a set is empty or a score is NaN or infinite.
    """
    for name, scores in (("ID", id_scores), ("OOD", ood_scores)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} scores have shape {scores.shape}; expected (N,), one score an image.")
        bad = int(np.count_nonzero(~np.isfinite(scores)))
        if bad:
            raise ValueError(
                f"{bad} of {len(scores)} {name} scores are NaN or infinite; check the images and the network's output."
            )
    is_ood = np.repeat([False, True], [len(id_scores), len(ood_scores)])
    oodness = np.concatenate([id_scores, ood_scores])
    return Detection(
        auroc=float(metrics.roc_auc_score(is_ood, oodness)),
        aupr_in=_aupr(~is_ood, -oodness),
        aupr_out=_aupr(is_ood, oodness),
        fpr95_id_lost=_fpr95(is_ood, oodness),
        fpr95_ood_let_in=_fpr95(~is_ood, -oodness),
    )


def _aupr(positive: npt.NDArray[np.bool_], scores: Scores) -> float:
    precision, recall, _ = metrics.precision_recall_curve(positive, scores)
    return float(metrics.auc(recall, precision))


def _fpr95(positive: npt.NDArray[np.bool_], scores: Scores) -> float:
    """The false positive rate at the first threshold whose true positive rate is at least 95 %."""
    false_positive_rate, true_positive_rate, _ = metrics.roc_curve(positive, scores)
    return float(false_positive_rate[np.argmax(true_positive_rate >= 0.95)])


METRICS = tuple(field.name for field in fields(Detection))
"""The columns of :func:`resampled`, in order."""
CHUNK = 1 << 15  # counts held at a time: these stay in the processor's cache

Draws = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


def draws(count: int, resamples: int, seed: int, stratum: int) -> Draws:
    """Indices (resamples, count) of images drawn with replacement; each ``stratum`` of a ``seed`` has its own."""
    return np.random.default_rng([seed, stratum]).integers(count, size=(resamples, count), dtype=np.int32)


def resampled(id_scores: Scores, ood_scores: Scores, id_draws: Draws, ood_draws: Draws) -> Floats:
    """Metrics (resamples, 5) in the order of ``METRICS``, of scores (N,), (M,) at ``id_draws`` (resamples, N) and
    ``ood_draws`` (resamples, M).

    All scores are ranked once; a resample is then a count of ID and OOD images at each rank. FPR95 looks at every
    threshold, where scikit-learn leaves out collinear ones, which can differ if ID and OOD scores tie.
    """
    # Ranks run from the most OOD score down, as thresholds do.
    _, ranks = np.unique(-np.concatenate([id_scores, ood_scores]), return_inverse=True)
    count = int(ranks.max()) + 1
    id_ranks, ood_ranks = ranks[: len(id_scores)], ranks[len(id_scores) :]
    step = max(1, CHUNK // count)
    parts = [slice(at, at + step) for at in range(0, len(id_draws), step)]
    counted = ((_counted(id_ranks, id_draws[p], count), _counted(ood_ranks, ood_draws[p], count)) for p in parts)
    return np.concatenate([_metrics(known, unknown) for known, unknown in counted])


def _counted(ranks: npt.NDArray[np.signedinteger[Any]], drawn: Draws, count: int) -> Floats:
    """How often each rank was drawn: (resamples, count)."""
    cells = ranks[drawn] + count * np.arange(len(drawn))[:, None]
    return np.bincount(cells.ravel(), minlength=len(drawn) * count).reshape(len(drawn), count).astype(np.float64)


def _metrics(known: Floats, unknown: Floats) -> Floats:
    """From counts (resamples, ranks) of ID and OOD images."""
    id_total, ood_total = known[0].sum(), unknown[0].sum()
    id_above, ood_above = known.cumsum(axis=1), unknown.cumsum(axis=1)
    auroc = np.einsum("ru,ru->r", known, ood_above - unknown / 2) / (id_total * ood_total)
    # With ID positive, thresholds come from the other end, and what is accepted at a rank is that rank and below.
    id_below, ood_below = id_total - id_above + known, ood_total - ood_above + unknown
    id_first, ood_first = (id_below[:, ::-1], ood_below[:, ::-1]), (ood_above, id_above)
    aupr = [_aupr_by_rank(*id_first), _aupr_by_rank(*ood_first)]
    return np.stack([auroc, *aupr, _fpr95_by_rank(*ood_first), _fpr95_by_rank(*id_first)], axis=1)


def _aupr_by_rank(true: Floats, false: Floats) -> Floats:
    """Trapezoids between (recall, precision) from (0, 1) on; ``true``, ``false`` are positives by threshold."""
    accepted = true + false
    precision = np.divide(true, accepted, out=np.ones_like(true), where=accepted > 0)
    steps = np.diff(true, axis=1, prepend=0)
    before = np.concatenate([np.ones((len(true), 1)), precision[:, :-1]], axis=1)
    area: Floats = np.einsum("ru,ru->r", steps, precision + before) / 2 / true[0, -1]
    return area


def _fpr95_by_rank(true: Floats, false: Floats) -> Floats:
    total = true[0, -1]
    enough = next(caught for caught in np.arange(np.floor(0.95 * total) - 1, total + 1) if caught / total >= 0.95)
    first = np.argmax(true >= enough, axis=1)
    rate: Floats = false[np.arange(len(false)), first] / false[0, -1]
    return rate
