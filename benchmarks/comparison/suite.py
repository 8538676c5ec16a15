"""What is compared on: a trained network, its in-distribution (ID) test set and the out-of-distribution (OOD) sets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from networks import SourceError
from networks.architecture import Normalisation
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from openood_sandi.runs import keys

from .reading import Policy
from .training import default_cache

Group = Literal["ID", "near", "far"]


@dataclass(frozen=True)
class ImageSet:
    """A named, sized dataset of (image, label).

    An image is (C, H, W) float32 as the network takes it; a label is an int64 scalar, -1 if OOD.
    """

    name: str
    group: Group
    dataset: Dataset[Any]
    description: str
    fingerprint: str
    """A hash of all that decides what is scored: the images, their order, their labels and their preprocessing."""
    names: Sequence[str] = ()
    """Of the images' files; none where they are not files."""
    unreadable: Policy = "grey"
    """What becomes of damaged files, see :class:`.reading.Reading`; their labels are :func:`marked`."""

    @functools.cached_property
    def contents(self) -> str:
        """:attr:`fingerprint` with what is in the files, if the images are files: all are read, if not known yet."""
        dataset: Any = self.dataset
        chosen: list[list[int]] = []
        while isinstance(dataset, Subset):
            dataset, chosen = dataset.dataset, [*chosen, list(dataset.indices)]
        known = getattr(dataset, "contents", None)
        if isinstance(known, str):
            return digest(known, chosen, self.fingerprint) if chosen else known
        return keys.contents(self.dataset, default_cache(), self.fingerprint)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # Dataset itself does not promise a length

    def limited(self, limit: int | None) -> ImageSet:
        """``limit`` images in equal steps through the set, as lists come sorted by class; all if there are not more."""
        if limit is None or limit >= len(self):
            return self
        chosen = [place * len(self) // limit for place in range(limit)]
        return replace(self.subset(chosen), fingerprint=digest(self.fingerprint, f"{limit} in equal steps"))

    def subset(self, chosen: Sequence[int]) -> ImageSet:
        """The images at these places; the fingerprint stays as it is."""
        names = [self.names[place] for place in chosen] if self.names else ()
        return replace(self, dataset=Subset(self.dataset, chosen), names=names)

    def loader(self, batch_size: int, workers: int = 0, collate: Callable[..., Any] | None = None) -> DataLoader[Any]:
        """Batches of images (B, C, H, W) and labels (B,) in the set's order, on the CPU."""
        # Its own generator, as it would draw seeds for its workers from the global one.
        own = torch.Generator()
        return DataLoader(self.dataset, batch_size, num_workers=workers, collate_fn=collate, generator=own)

    def to_fit_on(self, batch_size: int, collate: Callable[..., Any] = default_collate) -> DataLoader[Any]:
        """The batches without damaged images, or with them, as ``unreadable`` says; a method never sees their marks."""

        def unmarked(items: list[tuple[Tensor, Tensor]]) -> Any:
            kept = [(x, y) for x, y in items if self.unreadable == "grey" or not is_marked(y)]
            if not kept:
                raise SourceError(f"None of {len(items)} images in a row of {self.name} can be read.")
            return collate([(x, marked(y) if is_marked(y) else y) for x, y in kept])

        return self.loader(batch_size, collate=unmarked)

    def without(self, damaged: npt.NDArray[np.bool_]) -> ImageSet:
        """What there is a score of: all, or all but the damaged images, as ``unreadable`` says."""
        if self.unreadable == "grey" or not damaged.any():
            return self
        return self.subset(np.flatnonzero(~damaged).tolist())

    def told(self, damaged: npt.NDArray[np.bool_], shown: int = 5) -> str:
        """A sentence about the damaged images, by name."""
        names = [self.names[place] for place in np.flatnonzero(damaged).tolist()]
        done = "left out" if self.unreadable == "skip" else "what they lack is grey"
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        return f"{self.name}: {len(names)} of {len(self)} images are damaged, {done}: {', '.join(names[:shown])}{more}"


def marked(label: Any) -> Any:
    """The label (-1 if OOD) of a damaged image: -2 and below, which tells of the damage wherever labels go.

    Marked again it is what it was.
    """
    return -3 - label


def is_marked(label: Any) -> Any:
    return label < -1


@dataclass(frozen=True)
class Suite:
    """One comparison: ``network``, in eval mode, was trained on the classes of ``in_distribution``."""

    name: str
    network: nn.Module
    network_name: str
    network_description: str
    weights: str
    """A hash of the network's state, see :func:`state_digest`."""
    classes: int
    normalisation: Normalisation
    """Turns a network's input back into pixels: input * std + mean."""
    in_distribution: ImageSet
    out_of_distribution: tuple[ImageSet, ...]
    training: ImageSet | None = None
    """ID images that the network was trained on, preprocessed as test images are."""
    validation: tuple[ImageSet, ...] | None = None
    """ID and, after them, OOD images to choose options by; none of them is in a test set."""
    missing: tuple[str, ...] = ()
    """What was looked for and left out, one sentence each."""
    notes: tuple[str, ...] = ()
    """What a reader should know of the images: how classes are numbered, which files are damaged."""
    protocol: str = ""
    """Whose choice the OOD sets are."""
    paper_splits: tuple[str, ...] = ()
    """The S&I paper's split points on this network, by module name; none where it says nothing of its kind."""
    paper_feature: str | None = None
    """The paper's F of Eq. 12 on this network, by module name."""

    @property
    def test_sets(self) -> tuple[ImageSet, ...]:
        """ID first."""
        return (self.in_distribution, *self.out_of_distribution)

    def limited(self, limit: int | None) -> Suite:
        """The suite with every set cut to ``limit`` images in equal steps; training images are kept, all of them."""
        return self.mapped(lambda images: images.limited(limit))

    def fitted_to(self, count: int | None) -> Suite:
        """The suite with ``count`` training images in equal steps; all if there are not more, or for None."""
        return replace(self, training=self.training and self.training.limited(count))

    def mapped(self, change: Callable[[ImageSet], ImageSet], training: bool = False) -> Suite:
        """The suite with every set changed, that of training images only if asked to."""
        return replace(
            self,
            in_distribution=change(self.in_distribution),
            out_of_distribution=tuple(map(change, self.out_of_distribution)),
            training=change(self.training) if training and self.training else self.training,
            validation=self.validation and tuple(map(change, self.validation)),
        )


def digest(*parts: object) -> str:
    """A digest of texts, tensors and whatever else in turn: see :func:`openood_sandi.runs.keys.state`."""
    return keys.state({"parts": parts})


def state_digest(network: nn.Module) -> str:
    """A digest of the names and values of a network's parameters and buffers, in whatever order it has them."""
    return digest(dict(sorted(network.state_dict().items())))
