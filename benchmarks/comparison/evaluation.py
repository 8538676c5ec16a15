"""Methods over all sets of a suite: images are decoded once for all, scores kept on disk as they come."""

from __future__ import annotations

import functools
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from networks import SourceError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openood_sandi import score_dataset
from openood_sandi.runs import keys
from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.progress import Lines
from openood_sandi.runs.unreadable import UnreadableImage

from . import methods
from .console import progress
from .cost import Expense, kept_expense
from .environment import free_memory, library_version
from .methods import Method, Scorer
from .methods.shared import nothing_shared
from .suite import ImageSet, Suite, is_marked, marked

SHARE = 0.5
"""Of the free memory, what images may take: a set that does not fit is decoded anew for each method."""


class Decoded(Dataset[tuple[Tensor, Tensor]]):
    """A set's images and labels, in memory from the first one asked for on."""

    def __init__(self, images: ImageSet, batch_size: int, workers: int) -> None:
        self._images, self._batch_size, self._workers = images, batch_size, workers
        self.contents = images.contents
        """See :attr:`.suite.ImageSet.contents`."""

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self._all
        return images[index], labels[index]

    @functools.cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        batches = self._images.loader(self._batch_size, self._workers)
        images, labels = zip(*progress(batches, f"decoding {self._images.name}", "batches"), strict=True)
        if replace(self._images).contents != self.contents:  # looked at anew
            raise RuntimeError(f"The images of {self._images.name} have changed while they were read; start again.")
        return torch.cat(images), torch.cat(labels)


class Decoder:
    """Decodes what suites share once for all of them: several networks are compared on the same images."""

    def __init__(self, batch_size: int, workers: int) -> None:
        self._batch_size, self._workers = batch_size, workers
        self._free = SHARE * free_memory(torch.device("cpu"))
        self._known: dict[str, Dataset[Any]] = {}

    def suite(self, suite: Suite) -> Suite:
        """The suite with its images decoded once, set by set, where they fit in memory."""
        return suite.mapped(self._images, training=True)

    def _images(self, images: ImageSet) -> ImageSet:
        if images.contents not in self._known:
            taken = len(images) * images.dataset[0][0].nbytes
            fits = taken <= self._free
            self._known[images.contents] = Decoded(images, self._batch_size, self._workers) if fits else images.dataset
            self._free -= taken if fits else 0
        return replace(images, dataset=self._known[images.contents])


@dataclass(frozen=True)
class Scored:
    """Predicted classes, labels (-1 if OOD) and scores of a set, (N,) each, in its order; larger score = more OOD."""

    pred: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """The share of images whose class is predicted."""
        return float(np.mean(self.pred == self.labels))


@dataclass(frozen=True)
class Outcome:
    """What a method says of every image, by the set's name, and what that costs; None where it was not measured."""

    method: Method
    scored: Mapping[str, Scored]
    expense: Expense | None = None


@dataclass(frozen=True)
class Failure:
    """A method that stopped with an error, or that cannot run here, and why."""

    method: str
    reason: str


class Counted:
    """A scorer that tells ``lines`` of the images ``now`` scored."""

    def __init__(self, scorer: Scorer, lines: Lines | None, now: str) -> None:
        self._scorer, self._lines, self._now = scorer, lines, now
        self._scored = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes and scores."""
        found = self._scorer(images)
        self._tell(len(images))
        return found

    def finish(self, images: int) -> None:
        """Of so many images in all; those not scored here were at hand."""
        self._tell(images - self._scored, at_hand=True)

    def _tell(self, count: int, at_hand: bool = False) -> None:
        self._scored += count
        if self._lines:
            self._lines.add(count, self._now, at_hand)


class Evaluation:
    """One suite on one device; methods are scored and timed one after the other."""

    def __init__(self, suite: Suite, device: torch.device, batch_size: int, workers: int, cache: Path) -> None:
        self._suite = suite
        self._damaged: dict[str, npt.NDArray[np.bool_]] = {}
        suite.network.to(device)
        self._device, self._batch_size, self._workers = device, batch_size, workers
        self._scores = ScoreCache(cache / "scores")
        self._costs = cache / "costs"
        self._built: dict[str, Scorer] = {}

    @property
    def suite(self) -> Suite:
        """The suite with the images that have a score, and a note on those that are damaged; as far as is known yet."""
        bad = {name: damaged for name, damaged in self._damaged.items() if damaged.any()}
        notes = tuple(images.told(bad[images.name]) for images in self._suite.test_sets if images.name in bad)
        kept = self._suite.mapped(lambda images: images.without(bad[images.name]) if images.name in bad else images)
        return replace(kept, notes=(*kept.notes, *notes))

    def scores(self, method: Method, lines: Lines | None = None) -> dict[str, Scored]:
        """The method's scores of every test set, by name, ID first, and of the validation ID set for a threshold.

        Those that are kept are not computed again, but for a batch of a set drawn at random: see
        :mod:`openood_sandi.runs.canary`. ``lines`` are told of the images.

        Raises ValueError if a score is not finite, SourceError if all images of a set are damaged and left out.
        """
        found = {}
        # One that is fitted takes far longer to make than its scores take to read.
        fitted = any(need in method.options for need in ("training", "validation", "OOD validation"))
        checked = None if fitted else secrets.choice(self._suite.test_sets)
        for images in (*self._suite.test_sets, *(self._suite.validation or ())[:1]):
            pred, scores, labels = self._scored(method, images, images is checked, lines)
            damaged = self._damaged[images.name] = is_marked(labels)
            labels = np.where(damaged, marked(labels), labels)
            if images.unreadable == "skip":
                pred, scores, labels = (values[~damaged] for values in (pred, scores, labels))
            if not len(scores):
                raise SourceError(f"None of the {len(images)} images of {images.name} can be read.")
            bad = int(np.count_nonzero(~np.isfinite(scores)))
            if bad:
                raise ValueError(f"{bad} of {len(scores)} scores of {images.name} are not finite")
            found[images.name] = Scored(pred, labels, scores.astype(np.float64))
        return found

    def _scored(
        self, method: Method, images: ImageSet, canary: bool, lines: Lines | None
    ) -> tuple[npt.NDArray[Any], ...]:
        """Predictions, scores and labels, those of damaged images marked, from the cache or computed."""
        scorer = Counted(lambda batch: self._scorer(method)(batch), lines, f"{method.name} on {images.name}")
        try:
            found = score_dataset(
                scorer,
                self._loader(images),
                self._device,
                cache=self._scores,
                key=self._key(method, images),
                canary=canary,
                progress=f"{method.name} {images.name}" if sys.stderr.isatty() else False,
            )
        except UnreadableImage as error:  # no method can go on
            raise SourceError(str(error.__cause__ or error)) from error
        scorer.finish(len(images))
        return found

    def expense(self, method: Method) -> Expense:
        """What scoring ID images costs on this machine, measured once."""
        known = self._suite.in_distribution
        key = {**self._key(method, known), "code": keys.code()}

        def made() -> tuple[Scorer, Tensor]:
            return self._scorer(method), next(iter(self._loader(known)))[0]

        with nothing_shared():
            return kept_expense(self._costs, key, self._suite.network, made, self._device)

    def _scorer(self, method: Method) -> Scorer:
        """Built when first needed: with all scores at hand, never."""
        if method.name not in self._built:
            self._built[method.name] = method.build(self._suite, self._device, self._batch_size)
        return self._built[method.name]

    def _loader(self, images: ImageSet) -> DataLoader[Any]:
        return images.loader(self._batch_size, 0 if isinstance(images.dataset, Decoded) else self._workers)

    def _key(self, method: Method, images: ImageSet) -> dict[str, object]:
        """All that decides the scores; the cache adds the digest of the package's code."""
        suite = self._suite
        fitted = [part.contents for part in (suite.training, *(suite.validation or ())) if part is not None]
        others = {
            "source": [method.source, library_version(method.source)],
            "methods' code": _methods_code(),
            "contents": images.contents,
            "fitted on": fitted,
            "batch size": self._batch_size,
            "device": self._device.type,
        }
        return keys.score_key(method.name, method.options, suite.network, images, **others)


@functools.cache
def _methods_code() -> str:
    """A digest of the sources that turn methods' names into scorers, and of all that they import."""
    return keys.sources(methods.__name__)
