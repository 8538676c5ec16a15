"""Results as arrays of all batches do what a dictionary of single batches would."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest

from openood_sandi.runs.contents import RECORD, UNKNOWN
from openood_sandi.runs.results import BatchScores, Results
from openood_sandi.runs.unreadable import Unreadable


def batch(rng: random.Random) -> BatchScores:
    """Of 0 to 3 images with scores, and perhaps one without; some failed for now only, some changed meanwhile."""
    count, left_out = rng.randrange(4), rng.random() < 0.3
    lasting = rng.random() < 0.7
    unreadable = (Unreadable(rng.randrange(99), "name", "reason", lasting),) if left_out else ()
    known = [(1, rng.randrange(99), 3, 4, rng.randrange(1, 9), 6) if rng.random() < 0.9 else UNKNOWN]
    values = [rng.random() for _ in range(count)]
    return BatchScores(
        np.array([rng.randrange(9) for _ in range(count)], np.int64),
        np.array(values, np.float32 if count else np.int64),  # without images nobody knows the dtype
        np.array([rng.randrange(9) for _ in range(count)], np.int64),
        unreadable,
        np.array(known * (count + len(unreadable)), RECORD),
    )


def batches(rng: random.Random) -> dict[int, BatchScores]:
    return {number: batch(rng) for number in rng.sample(range(20), rng.randrange(8))}


def lasts(one: BatchScores) -> bool:
    return all(record != UNKNOWN for record in one.contents.tolist()) and all(image.lasting for image in one.unreadable)


def require_same(results: Results, expected: dict[int, BatchScores]) -> None:
    assert list(results) == sorted(expected) and len(results) == len(expected)
    for number, right in expected.items():
        found = results[number]
        assert number in results and found.unreadable == right.unreadable
        for ours, theirs in zip((*found[:3], found.contents), (*right[:3], right.contents), strict=True):
            assert ours.tolist() == theirs.tolist()
    if any(len(one.pred) for one in expected.values()):
        assert results.all.score.dtype == np.float32


@pytest.mark.parametrize("seed", range(100))
def test_as_a_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    one, other = batches(rng), batches(rng)
    first, second = Results.of(one), Results.of(other)
    require_same(first, one)
    require_same(first.joined(second), one | other)
    require_same(first.lasting, {number: each for number, each in one.items() if lasts(each)})
    require_same(pickle.loads(pickle.dumps(first)), one)
    assert first.is_part_of(second.joined(first)) and first.equals(Results.of(one))
    if other:
        assert second.is_part_of(first) == (not other)
        assert -1 not in second


def test_a_difference_in_any_part_is_seen() -> None:
    rng = random.Random(0)
    one = {number: batch(rng) for number in range(30)}
    first = Results.of(one)
    number = next(n for n, each in one.items() if len(each.pred) and each.unreadable)
    before = one[number]
    for changed in (
        before._replace(pred=before.pred + 1),
        before._replace(score=np.nextafter(before.score, np.float32(9))),
        before._replace(label=before.label + 1),
        before._replace(unreadable=(before.unreadable[0]._replace(reason="another"),)),
        before._replace(contents=np.array([(1, 2, 3, 4, 77, 6)] * len(before.contents), RECORD)),
    ):
        other = Results.of({**one, number: changed})
        assert not first.equals(other) and not first.is_part_of(other)
    moved = np.array([(9, 9, 9, 9, *record[4:]) for record in before.contents.tolist()], RECORD)
    assert first.equals(Results.of({**one, number: before._replace(contents=moved)})), (
        "where files are is no difference"
    )
