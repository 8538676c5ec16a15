"""Image sets from files, preprocessed as OpenOOD's evaluator does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from networks import SourceError
from networks.catalogue import Input, Normalisation
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from .suite import Group, ImageSet, digest

# As OpenOOD: what is missing of a file cut short is grey. Its download has such files, and scores are to be its own.
ImageFile.LOAD_TRUNCATED_IMAGES = True

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """(image (3, H, W) float32, label) of each of ``names`` under ``folder``; a ``transform`` takes a PIL image."""

    def __init__(self, folder: Path, names: Sequence[str], labels: Sequence[int], transform: Any) -> None:
        self._folder, self.names, self._transform = folder, names, transform
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self._folder / self.names[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a damaged file
            raise OSError(f"{path} cannot be read as an image: {error}") from error
        return self._transform(image), self.labels[index]


def transform(shape: Input, normalisation: Normalisation) -> Any:
    """From a PIL image in RGB to the network's input: torchvision's resize, centre crop, tensor and normalisation."""
    try:
        from torchvision import transforms
    except ImportError as error:
        raise SourceError(f"Reading images needs torchvision ({error}): pip install torchvision.") from error
    return transforms.Compose(
        [
            transforms.Resize(shape.resize, transforms.InterpolationMode(shape.interpolation)),
            transforms.CenterCrop(shape.crop),
            transforms.ToTensor(),
            transforms.Normalize(*normalisation),
        ]
    )


def image_set(
    name: str,
    group: Group,
    folder: Path,
    entries: Sequence[tuple[str, int]],
    shape: Input,
    normalisation: Normalisation,
    description: str,
) -> ImageSet:
    """A set of files, named below ``folder``, with their labels.

    The fingerprint is that of names, labels, sizes in bytes and preprocessing: it is the same wherever the folder lies,
    and another once files have been replaced by others. Raises SourceError if a file is not there.
    """
    sizes = []
    absent = []
    for file, _ in entries:
        try:
            sizes.append(os.stat(folder / file).st_size)
        except OSError:
            absent.append(file)
    if absent:
        raise SourceError(f"{len(absent)} of {len(entries)} images are missing, the first is {folder / absent[0]}")
    lines = "".join(f"{file} {label} {size}\n" for (file, label), size in zip(entries, sizes, strict=True))
    names, labels = zip(*entries, strict=True)
    return ImageSet(
        name,
        group,
        ImageFiles(folder, names, labels, transform(shape, normalisation)),
        description,
        digest(lines, repr((shape, normalisation))),
    )
