"""One method over all sets of a suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from .cost import Cost, measure
from .methods import METHODS, Scorer
from .metrics import Detection, detection
from .suite import ImageSet, Suite


@dataclass(frozen=True)
class Outcome:
    """A method's share of correct classes on the ID images, its cost, and its metrics by OOD set name."""

    method: str
    accuracy: float
    cost: Cost
    detection: dict[str, Detection]


@dataclass(frozen=True)
class Scored:
    """Predicted classes (N,), labels (N,) and scores (N,) of a set, in its order; larger score = more OOD."""

    pred: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]


def evaluate(method: str, suite: Suite, device: torch.device, batch_size: int) -> Outcome:
    """Score every set of the suite with one of ``METHODS``, then time it on the first batch of ID images."""
    network = suite.network.to(device)
    scorer = METHODS[method](network)
    total = len(suite.in_distribution) + sum(map(len, suite.out_of_distribution))
    with tqdm(total=total, desc=method, unit="image", disable=None) as progress:
        known = score(scorer, suite.in_distribution, device, batch_size, progress)
        metrics = {
            images.name: detection(known.scores, score(scorer, images, device, batch_size, progress).scores)
            for images in suite.out_of_distribution
        }
    batch, _ = next(suite.in_distribution.batches(batch_size))
    return Outcome(
        method=method,
        accuracy=float(np.mean(known.pred == known.labels)),
        cost=measure(network, scorer, batch.to(device)),
        detection=metrics,
    )


def score(scorer: Scorer, images: ImageSet, device: torch.device, batch_size: int, progress: tqdm[Any]) -> Scored:
    """Score a set batch by batch on ``device``."""
    preds, labels, scores = [], [], []
    for batch, label in images.batches(batch_size):
        pred, oodness = scorer(batch.to(device))
        preds.append(pred.cpu())
        labels.append(label)
        scores.append(oodness.double().cpu())
        progress.update(len(batch))
    return Scored(torch.cat(preds).numpy(), torch.cat(labels).numpy(), torch.cat(scores).numpy())
