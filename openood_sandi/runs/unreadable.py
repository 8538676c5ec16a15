"""Images that cannot be read: the run stops and names them, or goes on without them and records them.

What a file holds decides whether it can be read; a disk that fails, or a right that is missing, does so for now only,
and is not kept. A pipe, a device and a file that is far too large are not opened at all. A label that is wrong is no
matter of the image: the list is to be mended, and :class:`WrongLabel` says where.

Never does another image, or half of one, stand in: OpenOOD has Pillow fill what a truncated file lacks with grey, and
its ``skip_broken`` data sets take the next image; both are undone here. Needs Pillow only where a data set does.
"""

from __future__ import annotations

import ast
import copy
import errno
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Subset, default_collate

from openood_sandi.runs import contents, files

__all__ = [
    "Batch",
    "Collate",
    "Item",
    "Readable",
    "Unreadable",
    "UnreadableImage",
    "WrongLabel",
    "name_of",
    "name_without_score",
    "record",
]

_log = logging.getLogger(__name__)

STOP, SKIP = "stop", "skip"
# Trouble of the machine, not of a file: leaving images out would hide it.
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
#: Pillow's own limit, for a process that has taken it away; it refuses images of more than twice as many pixels.
_PIXELS = 2**30 // 4 // 3


class UnreadableImage(RuntimeError):
    """An image cannot be read."""


class WrongLabel(ValueError):
    """A line in a list of images has no label, or one that is none of the classes."""


class Unreadable(NamedTuple):
    """An item that could not be read."""

    number: int
    """Its index in the data set."""
    name: str
    """Its file and line as far as the data set tells."""
    reason: str
    lasting: bool = True
    """Whether what the file holds is the reason, and not the machine, this time."""


class Item(NamedTuple):
    """An item that was read or not, and what its file holds."""

    value: Any
    """As the data set gives it, or :class:`Unreadable`."""
    content: contents.Record | None
    """None if it is not known to be a file's."""


class Batch(NamedTuple):
    """What :class:`Collate` makes of items."""

    data: Any
    """The batch of those that could be read; None if none could."""
    unreadable: tuple[Unreadable, ...]
    contents: contents.Records = contents.records(())
    """What the files hold, in order, of those that could not be read too; none where the items are no files."""


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

    def __getitem__(self, index: int) -> Item:
        path, content = contents.file_of(self.dataset, int(index)), None
        _require_label(self.dataset, int(index))
        try:
            if path is not None:
                content = contents.look(path)
            with _pillow_strict():
                value = self.dataset[index]
        except Exception as error:
            if isinstance(error, (MemoryError, WrongLabel)) or _errno(error) in _MACHINE:
                raise
            return Item(self._unreadable(int(index), error), content or contents.UNKNOWN if path else None)
        if path is not None and content is not None and not contents.same_file(path, content):
            content = contents.UNKNOWN  # it has changed meanwhile: who knows which of both was decoded
        return Item(value, content)

    def _unreadable(self, index: int, error: Exception) -> Unreadable:
        lasting = _errno(error) is None and not isinstance(error, contents.Refused)
        found = Unreadable(index, name_of(self.dataset, index), f"{type(error).__name__}: {error}", lasting)
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

    def __call__(self, items: Sequence[Item]) -> Batch:
        read = [item.value for item in items if not isinstance(item.value, Unreadable)]
        unreadable = tuple(item.value for item in items if isinstance(item.value, Unreadable))
        looked_at = contents.records(item.content for item in items if item.content is not None)
        return Batch(self.collate(read) if read else None, unreadable, looked_at)


def name_of(dataset: Any, index: int) -> str:
    """What item ``index`` is, for people: its file, its line of an OpenOOD list, or its number.

    Files are known of OpenOOD's lists, torchvision's folders, and any data set with ``files``, the paths in order.
    """
    while isinstance(dataset, (Subset, Readable)):
        index = int(dataset.indices[index]) if isinstance(dataset, Subset) else index
        dataset = dataset.dataset
    lines, file = getattr(dataset, "imglist", None), contents.file_of(dataset, index)
    if lines is not None and index < len(lines):
        line = str(lines[index]).strip("\n")
        return f"image {file!r} (line {index + 1} of its list, {line!r})"
    return f"image {index} of {type(dataset).__name__}" if file is None else f"image {file!r}"


def _require_label(dataset: Any, index: int) -> None:
    """Raises WrongLabel if the item's line in a list of OpenOOD's has none of its classes."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    lines, classes = getattr(dataset, "imglist", None), getattr(dataset, "num_classes", None)
    if not isinstance(lines, list) or not isinstance(classes, int):
        return
    _, _, text = str(lines[index]).strip("\n").partition(" ")
    try:
        label = ast.literal_eval(text)
        right = isinstance(label, dict) or int(text) < classes
    except (ValueError, SyntaxError):
        right = False
    if not right:
        raise WrongLabel(
            f"{name_of(dataset, index)} has the label {text!r}; expected a class, 0 to {classes - 1}, or -1 if it is "
            "out of distribution: mend the list"
        )


def _errno(error: BaseException | None) -> int | None:
    """The system's reason behind an error, or behind what it was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


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
    if file is not None and not _written(unreadable, file):
        file = None
    shown = "; ".join(f"{item.name}: {item.reason}" for item in unreadable[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    where = f" (all in {file})" if file is not None else ""
    _log.warning("%d of %d images cannot be read and were left out: %s%s%s", len(unreadable), of, shown, more, where)


def _written(unreadable: Sequence[Unreadable], file: Path) -> bool:
    try:
        files.replace(file, "".join(f"{item.number}\t{item.name}\t{item.reason}\n" for item in unreadable))
    except OSError as error:
        _log.warning("the list of the images that were left out cannot be written: %s", error)
        return False
    return True


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
def _pillow_strict() -> Iterator[None]:
    """Keeps Pillow from filling in what a truncated file lacks, which ``openood.datasets`` tells it to, and from
    unpacking images without a limit, as others do."""
    with ExitStack() as undo:
        for module, name, value in (
            ("PIL.ImageFile", "LOAD_TRUNCATED_IMAGES", False),
            ("PIL.Image", "MAX_IMAGE_PIXELS", _PIXELS),
        ):
            pillow = sys.modules.get(module)
            before = getattr(pillow, name, None)
            if pillow is not None and (name == "LOAD_TRUNCATED_IMAGES" or before is None):
                setattr(pillow, name, value)
                undo.callback(setattr, pillow, name, before)
        yield
