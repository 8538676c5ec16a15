"""Detection metrics, computed with scikit-learn and equal to OpenOOD's on the same scores.

Two conventions of FPR95 are in use, and the same scores can give 90 % by one and 40 % by the other, so both
are reported under names that say what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    is_ood = np.concatenate([np.zeros(len(id_scores), dtype=bool), np.ones(len(ood_scores), dtype=bool)])
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
