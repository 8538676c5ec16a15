"""Images from wherever a person has them, as batches: loaders of tuples or dicts, arrays, folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from openood_sandi.runs import pictures
from openood_sandi.runs.batches import images_and_labels
from openood_sandi.runs.unreadable import Collate, Readable, Unreadable, record

__all__ = ["Folder", "batches_of", "folder", "loader_of", "readable"]

_log = logging.getLogger(__name__)


def loader_of(source: Any, batch_size: int = 64) -> Any:
    """``source`` as a loader of batches: an array or tensor of images (N, C, H, W), or a loader, which stays itself.

    Raises:
        TypeError: it is something else.
        ValueError: it is an array of another shape or of integers.
    """
    if isinstance(source, np.ndarray):
        source = torch.from_numpy(source)
    if isinstance(source, Tensor):
        if source.dim() != 4 or not source.is_floating_point():
            raise ValueError(
                f"images are an array of {source.dtype} and shape {tuple(source.shape)}; expected floating-point "
                "numbers (N, C, H, W), normalised as the network takes them"
            )
        return DataLoader(TensorDataset(source), batch_size=batch_size)
    if isinstance(source, (str, Path)):
        raise TypeError(f"{str(source)!r} is a path; pass openood_sandi.folder({str(source)!r}, transform)")
    if not isinstance(source, Iterable):
        raise TypeError(
            f"images are given as {type(source).__name__}; expected a DataLoader or another iterable of batches, an "
            "array (N, C, H, W), or openood_sandi.folder(path, transform)"
        )
    return source


def batches_of(source: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and classes (B,), -1 without a label, of every batch of what :func:`loader_of` takes."""
    for batch in loader_of(source):
        yield images_and_labels(batch)


def readable(loader: DataLoader[Any], unreadable: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, in its data set's order, with images that cannot be read named, or skipped and named.

    Raises:
        UnreadableImage: one cannot be read, or with "skip" none can.
    """
    left_out: list[Unreadable] = []
    items = Readable(loader.dataset, unreadable)
    collate, size = Collate(loader.collate_fn), loader.batch_size
    for batch in DataLoader(items, batch_size=size, num_workers=loader.num_workers, collate_fn=collate):
        left_out += batch.unreadable
        if batch.data is not None:
            yield images_and_labels(batch.data)
    record(left_out, len(items))


class Folder(Dataset[tuple[Any, int]]):
    """The images below a folder, in sorted order, each with the number of its subfolder among the sorted ones.

    Args:
        path: the folder; images may lie in it or in subfolders of any depth, links included. Where all lie below
            first-level subfolders, these are the classes; otherwise no image has a label, which is -1. Hidden folders
            and files, and what systems leave, do not count; other files are left out, and the log says how many.
        transform: an image of Pillow's, in RGB, to a tensor (C, H, W), as test images are transformed.

    Attributes:
        files: the paths of the images.
        classes: the names of the subfolders.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """

    def __init__(self, path: str | Path, transform: Callable[[Any], Tensor]) -> None:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"{str(path)!r} is no folder; expected one with images in it or in its subfolders")
        below, others = pictures.below(root)
        if not below:
            kinds = ", ".join(pictures.suffixes())
            raise FileNotFoundError(f"no images in {str(path)!r}; expected files that end in {kinds}")
        if others:
            _log.warning("%s: left out, as they are no images: %s", path, pictures.in_words(others))
        firsts = [name.partition("/")[0] for name in below]
        self.files = [root / name for name in below]
        self.classes = sorted({*firsts}) if all("/" in name for name in below) else []
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers.get(first, -1) for first in firsts]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return self.transform(pictures.rgb(image)), self.labels[index]


def folder(
    path: str | Path, transform: Callable[[Any], Tensor], batch_size: int = 64, num_workers: int = 0
) -> DataLoader[Any]:
    """A loader of the images below a folder, in sorted order: :class:`Folder` says which, and what their labels are.

    Args:
        path: the folder.
        transform: an image of Pillow's, in RGB, to a tensor (C, H, W), as the network's test images are transformed.
        batch_size: how many images a batch has.
        num_workers: how many processes read images.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    return DataLoader(Folder(path, transform), batch_size=batch_size, num_workers=num_workers)
