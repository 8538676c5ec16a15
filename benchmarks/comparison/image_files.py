"""Image sets from files, preprocessed as OpenOOD's evaluator does; folders of images, for ``--data folders``."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from networks import SourceError
from networks.catalogue import Input, Normalisation, imported
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

    @functools.cached_property
    def files(self) -> list[str]:
        """The path of each, by which :mod:`openood_sandi.runs.contents` tells what is in it."""
        return [os.path.join(self._folder, name) for name in self.names]

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
    transforms = imported("torchvision.transforms")
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
    sizes = [_size(folder / file) for file, _ in entries]
    absent = [file for (file, _), size in zip(entries, sizes, strict=True) if size is None]
    if absent:
        raise SourceError(f"{len(absent)} of {len(entries)} images are missing, the first is {folder / absent[0]}")
    lines = "".join(f"{file} {label} {size}\n" for (file, label), size in zip(entries, sizes, strict=True))
    names, labels = zip(*entries, strict=True)
    dataset = ImageFiles(folder, names, labels, transform(shape, normalisation))
    return ImageSet(name, group, dataset, description, digest(lines, repr((shape, normalisation))))


def _size(path: Path) -> int | None:
    """In bytes; None if it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


@dataclass(frozen=True)
class OodOption:
    """One value of ``--ood``: ``[near:|far:]NAME[=DIR]``."""

    name: str
    group: Group | None
    folder: Path | None

    @classmethod
    def parse(cls, text: str) -> OodOption:
        label, equals, folder = text.partition("=")
        before, colon, name = label.rpartition(":")
        if not name or (colon and before not in ("near", "far")) or (equals and not folder):
            raise argparse.ArgumentTypeError(f"{text!r} is not [near:|far:]NAME[=DIR]")
        group: Group | None = "near" if before == "near" else "far" if before == "far" else None
        return cls(name, group, Path(folder) if folder else None)


def classes_of(folder: Path) -> dict[str, int]:
    """The class of each subfolder: its name where all names are numbers, else its place in alphabetical order."""
    if not folder.is_dir():
        raise SourceError(f"--id {folder} is no folder.")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) < 2:
        raise SourceError(f"--id {folder} has {len(names)} subfolders; expected one for each class.")
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}
    return {name: number for number, name in enumerate(names)}


def id_set(folder: Path, classes: dict[str, int], shape: Input, normalisation: Normalisation) -> ImageSet:
    """The images in the subfolders of ``folder``, class by class."""
    entries = [(f"{name}/{file}", label) for name, label in classes.items() for file in _files(folder / name)]
    if not entries:
        raise SourceError(f"There is no image ({', '.join(SUFFIXES)}) in the subfolders of --id {folder}.")
    return image_set(folder.resolve().name, "ID", folder, entries, shape, normalisation, f"images in {folder}")


def folder_set(name: str, group: Group, folder: Path, shape: Input, normalisation: Normalisation) -> ImageSet:
    """The images anywhere below ``folder``, in the order of their paths."""
    if not folder.is_dir():
        raise SourceError(f"--ood {name}: {folder} is no folder.")
    entries = [(file, -1) for file in _files(folder)]
    if not entries:
        raise SourceError(f"--ood {name}: there is no image ({', '.join(SUFFIXES)}) below {folder}.")
    return image_set(name, group, folder, entries, shape, normalisation, f"images below {folder}")


def _files(folder: Path) -> list[str]:
    """Images below ``folder``, through links too, but none that is hidden."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names]
    shown = [path for path in paths if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")]
    return sorted(path.relative_to(folder).as_posix() for path in shown)
