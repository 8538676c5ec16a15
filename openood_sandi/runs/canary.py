"""A canary: before cached scores are believed, one batch of them, drawn at random, is scored again.

A key tells what its author could describe. What it misses (a library edited by hand, a function that draws on
something outside Python) mostly moves scores far more than another processor does.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from openood_sandi.runs import ranks
from openood_sandi.runs.cache import Entry
from openood_sandi.runs.results import BatchScores

__all__ = ["TOLERANCE", "difference", "sing"]

#: How far a score may be from the one that is kept, as a part of the largest of its batch. Other processors, threads
#: and libraries of arithmetic stay below it.
TOLERANCE = 1e-3


def sing(
    known: Mapping[int, BatchScores], score: Callable[[Sequence[int]], list[BatchScores]], entry: Entry | None
) -> bool:
    """Score a batch of ``known`` again, on rank 0.

    Args:
        known: {number of the batch: its results}.
        score: numbers of batches to their results anew. The loader's first batch is asked for first, as some scorers
            study the first images they see.
        entry: where the results are from; it is voided if the batch comes out otherwise.

    Returns:
        Whether the results are to be believed, on all ranks.
    """
    why = None
    if ranks.rank() == 0:
        drawn = secrets.choice(list(known))  # no random generator of anybody else's moves
        numbers = [0, drawn] if drawn else [0]
        scored = score(numbers)
        compared = [number for number in dict.fromkeys(numbers) if number in known]
        differing = [(number, difference(known[number], scored[numbers.index(number)])) for number in compared]
        why = next((f"batch {number}, scored again, {what}" for number, what in differing if what), None)
    why = ranks.broadcast("canary", why)
    if why is not None and ranks.rank() == 0 and entry is not None and entry.found:
        entry.void(why)
    return why is None


def difference(kept: BatchScores, anew: BatchScores) -> str | None:
    """How the results of a batch differ by more than :data:`TOLERANCE`, in words; None if they do not."""
    if [image.number for image in kept.unreadable] != [image.number for image in anew.unreadable]:
        return "has other images that cannot be read"
    if not (np.array_equal(kept.label, anew.label) and kept.score.shape == anew.score.shape):
        return "has other labels"
    finite = np.abs(kept.score[np.isfinite(kept.score)].astype(np.float64))
    allowed = TOLERANCE * (finite.max() if len(finite) else 0.0)
    if not np.allclose(anew.score, kept.score, rtol=0.0, atol=allowed, equal_nan=True):
        with np.errstate(invalid="ignore"):
            apart = np.nanmax(np.abs(anew.score.astype(np.float64) - kept.score.astype(np.float64)))
        return f"has scores up to {apart:.3g} off those that are kept; expected {allowed:.3g} at most"
    if not np.array_equal(kept.pred, anew.pred):
        return "has other predicted classes"
    return None
