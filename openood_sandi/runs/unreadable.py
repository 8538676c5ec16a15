"""Images that cannot be read: the run stops and names them, or goes on without them and records them.

Never does another image, or half of one, stand in: OpenOOD has Pillow fill what a truncated file lacks with grey, and
its ``skip_broken`` data sets take the next image; both are undone here. Needs Pillow only where a data set does.
"""

from __future__ import annotations

import copy
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Subset, default_collate

__all__ = ["Batch", "Collate", "Readable", "Unreadable", "UnreadableImage", "name_of", "name_without_score", "record"]

_log = logging.getLogger(__name__)

STOP, SKIP = "stop", "skip"
# Trouble of the machine, not of a file: leaving images out would hide it.
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableImage(RuntimeError):
    """An image, or its line in the list of images, cannot be read."""


class Unreadable(NamedTuple):
    """An item that could not be read."""

    number: int
    """Its index in the data set."""
    name: str
    """Its file and line as far as the data set tells."""
    reason: str


class Batch(NamedTuple):
    """What :class:`Collate` makes of items."""

    data: Any
    """The batch of those that could be read; None if none could."""
    unreadable: tuple[Unreadable, ...]


class Readable(Dataset[Any]):
    """``dataset``, a map-style data set, with items that it cannot read named.

    Args:
        dataset: it is copied, not changed.
        unreadable: "stop" raises :class:`UnreadableImage`; with "skip" the item is an :class:`Unreadable`, which
            :class:`Collate` keeps out of the batch.
    """

    def __init__(self, dataset: Any, unreadable: str = STOP) -> None:
        if unreadable not in (STOP, SKIP):
            raise ValueError(f"unreadable={unreadable!r}: expected one of 'stop', 'skip'")
        self.dataset = copy.copy(dataset)
        if getattr(self.dataset, "skip_broken", False):
            self.dataset.skip_broken = False
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            with _truncated_images_refused():
                return self.dataset[index]
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _MACHINE:
                raise
            found = Unreadable(int(index), name_of(self.dataset, int(index)), f"{type(error).__name__}: {error}")
            if self.unreadable == SKIP:
                return found
            raise UnreadableImage(
                f"{found.name} cannot be read ({found.reason}); replace it, take it off its list, or set unreadable to "
                "'skip' to score the others without it"
            ) from error


class Collate:
    """A ``collate_fn`` for :class:`Readable` items: those that could be read go to ``collate``, the rest is told of."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.collate = collate or default_collate

    def __call__(self, items: Sequence[Any]) -> Batch:
        read = [item for item in items if not isinstance(item, Unreadable)]
        unreadable = tuple(item for item in items if isinstance(item, Unreadable))
        return Batch(self.collate(read) if read else None, unreadable)


def name_of(dataset: Any, index: int) -> str:
    """What item ``index`` is, for people: its file, its line of an OpenOOD list, or its number.

    Files are known of OpenOOD's lists, torchvision's folders, and any data set with ``files``, the paths in order.
    """
    while isinstance(dataset, (Subset, Readable)):
        index = int(dataset.indices[index]) if isinstance(dataset, Subset) else index
        dataset = dataset.dataset
    lines, samples = getattr(dataset, "imglist", None), getattr(dataset, "samples", None)
    files = getattr(dataset, "files", None) if samples is None else [path for path, _ in samples]
    if lines is not None and index < len(lines):
        line = str(lines[index]).strip("\n")
        folder = str(getattr(dataset, "data_dir", ""))
        return f"image {os.path.join(folder, line.split(' ', 1)[0])!r} (line {index + 1} of its list, {line!r})"
    if files is not None and index < len(files):
        return f"image {str(files[index])!r}"
    return f"image {index} of {type(dataset).__name__}"


def record(unreadable: Sequence[Unreadable], of: int, file: Path | None = None) -> None:
    """Logs how many of the ``of`` images were left out, and which; with ``file``, all of them are written there.

    Raises:
        UnreadableImage: if none is left.
    """
    if not unreadable:
        return
    if len(unreadable) >= of:
        raise UnreadableImage(
            f"none of the {of} images can be read; the first is {unreadable[0].name}: {unreadable[0].reason}"
        )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{item.number}\t{item.name}\t{item.reason}\n" for item in unreadable))
    shown = "; ".join(f"{item.name}: {item.reason}" for item in unreadable[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    where = f" (all in {file})" if file is not None else ""
    _log.warning("%d of %d images cannot be read and were left out: %s%s%s", len(unreadable), of, shown, more, where)


def name_without_score(
    scores: npt.NDArray[Any], dataset: Any, batches: Sequence[Any] | None, unreadable: Sequence[Unreadable]
) -> None:
    """Logs which images have the score NaN, as their own numbers, or the network's, are not finite.

    Args:
        scores: (N,), in the order of ``batches``, without those ``unreadable``.
        dataset: what the images are items of.
        batches: the indices of every batch; None if these are not known.
    """
    wrong = np.flatnonzero(np.isnan(scores))
    if not len(wrong):
        return
    left_out = {item.number for item in unreadable}
    indices = [int(index) for batch in batches or () for index in batch if int(index) not in left_out]
    shown = [name_of(dataset, indices[place]) if indices else f"image {place}" for place in wrong[:5]]
    more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    _log.warning(
        "%d of %d images have no score (NaN), as they or the network's outputs are not finite: %s%s",
        *(len(wrong), len(scores), "; ".join(shown), more),
    )


@contextmanager
def _truncated_images_refused() -> Iterator[None]:
    """Keeps Pillow from filling in what a truncated file lacks; ``openood.datasets`` tells it to."""
    pillow = sys.modules.get("PIL.ImageFile")
    if pillow is None:
        yield
        return
    before = pillow.LOAD_TRUNCATED_IMAGES
    pillow.LOAD_TRUNCATED_IMAGES = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pillow.LOAD_TRUNCATED_IMAGES = before  # type: ignore[attr-defined]
