"""Images decoded once for all methods."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .console import progress
from .environment import free_memory
from .suite import ImageSet, Suite

SHARE = 0.5
"""Of the free memory, what images may take: a set that does not fit is decoded anew for each method."""


class Decoded(Dataset[tuple[Tensor, Tensor]]):
    """A set's images and labels: if they fit, in memory from the first one asked for on.

    Attributes:
        fingerprint: the set's, by which the score cache knows the images.
        bytes: what the images take.
        fits: whether they are kept.
    """

    def __init__(self, images: ImageSet, batch_size: int, workers: int, free: float) -> None:
        self._images, self._batch_size, self._workers = images, batch_size, workers
        self.fingerprint = images.fingerprint
        image: Tensor = images.dataset[0][0]
        self.bytes = len(images) * image.nbytes
        self.fits = self.bytes <= free

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not self.fits:
            image, label = self._images.dataset[index]
            return image, label
        images, labels = self._all
        return images[index], labels[index]

    @functools.cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        batches = self._images.loader(self._batch_size, self._workers)
        images, labels = zip(*progress(batches, f"decoding {self._images.name}", "batch"), strict=True)
        return torch.cat(images), torch.cat(labels)


class Decoder:
    """Decodes what suites share once for all of them: several networks are compared on the same images."""

    def __init__(self, batch_size: int, workers: int) -> None:
        self._batch_size, self._workers = batch_size, workers
        self._free = SHARE * free_memory(torch.device("cpu"))
        self._known: dict[str, Decoded] = {}

    def suite(self, suite: Suite) -> Suite:
        """The suite with its images decoded once, set by set, where they fit in memory."""
        return suite.mapped(self._images, training=True)

    def _images(self, images: ImageSet) -> ImageSet:
        if images.fingerprint not in self._known:
            found = Decoded(images, self._batch_size, self._workers, self._free)
            self._known[images.fingerprint] = found
            self._free -= found.bytes if found.fits else 0
        return replace(images, dataset=self._known[images.fingerprint])
