"""Results of batches: of one, and of many as arrays of all, so that small batches cost no more than their images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from openood_sandi.runs import contents
from openood_sandi.runs.unreadable import Unreadable

__all__ = ["BatchScores", "Results"]

Integers = npt.NDArray[np.int64]


class BatchScores(NamedTuple):
    """The results of one batch of a loader; images that could not be read are left out of the arrays."""

    pred: Integers
    """Predicted classes (n,)."""
    score: npt.NDArray[Any]
    """Out-of-distribution scores (n,) in the dtype of the scorer."""
    label: Integers
    """Labels (n,)."""
    unreadable: tuple[Unreadable, ...] = ()
    contents: contents.Records = contents.records(())
    """What the files hold of all images, of those that could not be read too; (0,) where the images are no files."""


class Results(Mapping[int, BatchScores]):
    """{number of a batch: its results}, in one array for each column; a batch is cut out when it is asked for.

    Args:
        numbers: of the batches (n,).
        sizes: how many images of each have a score, and of how many it is told what their files hold, (n, 2).
        all: the batches one behind the other, as one.
        owners: for every unreadable image of ``all``, the place of its batch among ``numbers``.
    """

    def __init__(self, numbers: Integers, sizes: Integers, all: BatchScores, owners: Integers) -> None:
        self.numbers, self.sizes, self.all, self.owners = numbers, sizes, all, owners
        self._starts = np.cumsum(sizes, 0) - sizes
        self._places = dict(zip(numbers.tolist(), range(len(numbers)), strict=True))

    @staticmethod
    def of(batches: Mapping[int, BatchScores]) -> Results:
        """These batches, in the order of their numbers. One without images has no say in the dtype of scores."""
        if isinstance(batches, Results):
            return batches
        numbers = sorted(batches)
        every = [batches[number] for number in numbers]
        scores = [batch.score for batch in every if len(batch.pred)] or [batch.score for batch in every[:1]]
        whole = BatchScores(
            np.concatenate([np.empty(0, np.int64), *(batch.pred for batch in every)]),
            np.concatenate(scores) if scores else np.empty(0, np.float32),
            np.concatenate([np.empty(0, np.int64), *(batch.label for batch in every)]),
            tuple(image for batch in every for image in batch.unreadable),
            np.concatenate([contents.records(()), *(batch.contents for batch in every)]),
        )
        sizes = np.array([(len(batch.pred), len(batch.contents)) for batch in every], np.int64).reshape(-1, 2)
        owners = np.repeat(np.arange(len(every)), [len(batch.unreadable) for batch in every])
        return Results(np.array(numbers, np.int64), sizes, whole, owners)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __contains__(self, number: object) -> bool:
        return number in self._places

    def __getitem__(self, number: int) -> BatchScores:
        place = self._places[number]
        images, files = (slice(start, start + size) for start, size in zip(*self._extent(place), strict=True))
        unreadable = tuple(self.all.unreadable[at] for at in np.flatnonzero(self.owners == place))
        pred, score, label = self.all.pred[images], self.all.score[images], self.all.label[images]
        return BatchScores(pred, score, label, unreadable, self.all.contents[files])

    def where(self, chosen: npt.NDArray[np.bool_]) -> Results:
        """The batches that are ``chosen`` (n,)."""
        return self if chosen.all() else self._taken(np.flatnonzero(chosen))

    def joined(self, others: Results) -> Results:
        """These and ``others``, in the order of their numbers; of two of a number that of ``others``."""
        if not len(self) or not len(others):
            return self if len(self) else others
        both = _behind(self, others)
        order = np.argsort(both.numbers, kind="stable")
        sorted_numbers = both.numbers[order]
        return both._taken(order[np.append(sorted_numbers[1:] != sorted_numbers[:-1], True)])

    @property
    def lasting(self) -> Results:
        """Those that the same files always give: nothing failed for now only, or changed meanwhile."""
        known = contents.known(self.all.contents)
        lasts = np.array([image.lasting for image in self.all.unreadable], np.bool_)
        return self.where(self.in_all(known) & _none(self.owners[~lasts], len(self)))

    def in_all(self, holds: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Of which batches (n,) something ``holds`` for every file."""
        batches = np.repeat(np.arange(len(self)), self.sizes[:, 1])
        return _none(batches[~holds], len(self))

    def looked_at(self, now: contents.Records) -> Results:
        """With what the files are found to hold ``now``."""
        return Results(self.numbers, self.sizes, self.all._replace(contents=now), self.owners)

    def equals(self, other: Results) -> bool:
        """Whether every bit is the same, and what the files hold; not where these are."""
        return self._bits() == other._bits() and self.all.unreadable == other.all.unreadable

    def is_part_of(self, other: Results) -> bool:
        """Whether ``other`` has all of these batches, the same to the last bit."""
        return self.equals(other.where(np.isin(other.numbers, self.numbers)))

    def _bits(self) -> list[tuple[str, bytes]]:
        held = self.all.contents["low"], self.all.contents["high"]
        arrays = *self.all[:3], *held, self.numbers, self.sizes, self.owners
        return [(array.dtype.str if len(array) else "", array.tobytes()) for array in arrays]

    def _extent(self, place: int) -> tuple[list[int], list[int]]:
        """Where a batch's images and files begin, and how many there are."""
        return self._starts[place].tolist(), self.sizes[place].tolist()

    def _taken(self, places: Integers) -> Results:
        """The batches at these places, in this order."""
        starts, sizes = self._starts[places], self.sizes[places]
        images, files = (_ranges(starts[:, kind], sizes[:, kind]) for kind in (0, 1))
        where = {place: new for new, place in enumerate(places.tolist())} if len(self.owners) else {}
        found = ((where[owner], at) for at, owner in enumerate(self.owners.tolist()) if owner in where)
        owned = sorted(found, key=lambda pair: pair[0])
        unreadable = tuple(self.all.unreadable[at] for _, at in owned)
        pred, score, label = self.all.pred[images], self.all.score[images], self.all.label[images]
        whole = BatchScores(pred, score, label, unreadable, self.all.contents[files])
        return Results(self.numbers[places], sizes, whole, np.array([owner for owner, _ in owned], np.int64))


def _behind(one: Results, other: Results) -> Results:
    """Both, one behind the other: some numbers may be there twice."""
    scores = [part.all.score for part in (one, other) if len(part.all.score)] or [one.all.score]
    whole = BatchScores(
        np.concatenate([one.all.pred, other.all.pred]),
        np.concatenate(scores),
        np.concatenate([one.all.label, other.all.label]),
        one.all.unreadable + other.all.unreadable,
        np.concatenate([one.all.contents, other.all.contents]),
    )
    owners = np.concatenate([one.owners, len(one) + other.owners])
    return Results(
        np.concatenate([one.numbers, other.numbers]), np.concatenate([one.sizes, other.sizes]), whole, owners
    )


def _none(places: Integers, count: int) -> npt.NDArray[np.bool_]:
    """Which of 0 to ``count`` - 1 are not among ``places``."""
    left = np.ones(count, np.bool_)
    left[places] = False
    return left


def _ranges(starts: Integers, lengths: Integers) -> Integers:
    """Ranges of these lengths from these starts on, one behind the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
