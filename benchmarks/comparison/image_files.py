"""Image sets from files, preprocessed as OpenOOD's evaluator does."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from networks import SourceError
from networks.architecture import Input, Normalisation
from torch import Tensor
from torch.utils.data import Dataset

from .reading import Reading
from .suite import Group, ImageSet, digest, marked


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """(image (3, H, W) float32, label) of each of ``names`` under ``folder``; a ``transform`` takes a PIL image.

    The label of a damaged file is :func:`.suite.marked`.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], labels: Sequence[int], transform: Any, reading: Reading
    ) -> None:
        self._folder, self.names, self._transform, self._reading = folder, names, transform, reading
        self.labels = torch.tensor(labels, dtype=torch.int64)

    @functools.cached_property
    def files(self) -> list[str]:
        """The path of each, by which :mod:`openood_sandi.runs.contents` tells what is in it."""
        return [os.path.join(self._folder, name) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, damage = self._reading.read(self._folder / self.names[index])
        label = self.labels[index]
        return self._transform(image), label if damage is None else marked(label)


def image_set(
    name: str,
    group: Group,
    folder: Path,
    entries: Sequence[tuple[str, int]],
    shape: Input,
    normalisation: Normalisation,
    description: str,
    reading: Reading,
) -> ImageSet:
    """A set of files, named below ``folder``, with their labels.

    The fingerprint is that of names, labels, sizes in bytes and preprocessing: it is the same wherever the folder lies,
    and another once files have been replaced by others. Raises SourceError if a file is not there.
    """
    sizes = [_size(folder / file) for file, _ in entries]
    absent = [file for (file, _), size in zip(entries, sizes, strict=True) if size is None]
    if absent:
        raise SourceError(f"{len(absent)} of {len(entries)} images are missing, the first is {folder / absent[0]}")
    lines = "".join(f"{file} {label} {size}\n" for (file, label), size in zip(entries, sizes, strict=True))
    names, labels = zip(*entries, strict=True)
    dataset = ImageFiles(folder, names, labels, replace(shape, normalisation=normalisation), reading)
    fingerprint = digest(lines, repr((shape, normalisation, reading)))
    return ImageSet(name, group, dataset, description, fingerprint, names, reading.unreadable)


def _size(path: Path) -> int | None:
    """In bytes; None if it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None
