"""What is in the files of images: looked at while they are decoded, remembered by what the file system says of them.

A record tells device, inode, size and time of change (ctime, which nobody can set) of a file, and a digest of its
bytes. As long as the first four are the same the bytes are; else the file is read again, and only the digest counts:
a copy elsewhere is the same image. A rerun so costs one look at each file.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Subset

from openood_sandi.runs.files import replace

__all__ = [
    *("LARGEST", "RECORD", "UNKNOWN", "Record", "Records", "Refused"),
    *("file_of", "files_of", "known", "look", "records", "remembered", "same_file", "still_so"),
]

_log = logging.getLogger(__name__)

#: One image: what the file system says of its file, and 16 bytes of BLAKE2b of what is in it.
RECORD = np.dtype(
    [("device", "<u8"), ("inode", "<u8"), ("size", "<u8"), ("changed", "<i8"), ("low", "<u8"), ("high", "<u8")]
)
Records = npt.NDArray[np.void]
Record = tuple[int, int, int, int, int, int]
#: The record of an image whose bytes are not known: no file's.
UNKNOWN: Record = (0, 0, 0, 0, 0, 0)
#: Bytes that an image file may have.
LARGEST = 2**30
#: Seconds in which a file may change twice without another time of change, by the coarsest clock of a file system.
_TICK = 2.0


class Refused(ValueError):
    """A file that is not read, as it is no image: a pipe, a device, a folder, or far too large."""


def files_of(dataset: Any) -> list[str] | None:
    """The file of each item in order, None if its items are no files.

    Known are OpenOOD's ``ImglistDataset``, torchvision's ``ImageFolder`` and any with ``files``, the paths in order.
    """
    if isinstance(dataset, Subset):
        inner = files_of(dataset.dataset)
        return None if inner is None else [inner[int(index)] for index in dataset.indices]
    entries, path_of = _entries(dataset)
    return None if entries is None else [path_of(entry) for entry in entries]


def file_of(dataset: Any, index: int) -> str | None:
    """The file of one item, as :func:`files_of` knows it; None if there is none."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    entries, path_of = _entries(dataset)
    return None if entries is None or index >= len(entries) else path_of(entries[index])


def _entries(dataset: Any) -> tuple[Sequence[Any] | None, Callable[[Any], str]]:
    """What a data set has for each item, and how that names a file."""
    lines, samples, files = (getattr(dataset, name, None) for name in ("imglist", "samples", "files"))
    if isinstance(lines, list):
        folder = str(getattr(dataset, "data_dir", ""))
        return lines, lambda line: os.path.join(folder, str(line).strip("\n").split(" ", 1)[0])
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple) and len(samples[0]) == 2:
        return samples, lambda sample: os.fspath(sample[0])
    return files if isinstance(files, Sequence) and not isinstance(files, str) else None, os.fspath


def look(path: str) -> Record:
    """Read a file and tell what is in it.

    Raises:
        Refused: it is no regular file, or larger than :data:`LARGEST`; it has not been read.
        OSError: it cannot be read.
    """
    _require_regular(path)
    # should it have become a pipe, this does not wait for somebody to write into it
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        before = _checked(path, os.fstat(file.fileno()))
        told = hashlib.blake2b(file.read(before.st_size + 1), digest_size=16).digest()
        after = os.fstat(file.fileno())
    if _stamp(before) != _stamp(after):
        return UNKNOWN
    changed = before.st_ctime_ns if time.time() - before.st_ctime > _TICK else -1  # it may change again unseen
    device, inode, size, _ = _stamp(before)
    return device, inode, size, changed, int.from_bytes(told[:8], "little"), int.from_bytes(told[8:], "little")


def _require_regular(path: str) -> None:
    """Raises Refused for what must not be opened, OSError for what is not there."""
    _checked(path, os.stat(path))


def same_file(path: str, record: Record) -> bool:
    """Whether the file is still the one that ``record`` is of, by what the file system says."""
    try:
        device, inode, size, changed = _stamp(os.stat(path))
    except OSError:
        return False
    return record[:3] == (device, inode, size) and record[3] in (changed, -1)


def records(rows: Iterable[Record]) -> Records:
    """Records as an array (n,)."""
    return np.array(list(rows), RECORD)


def known(found: Records) -> npt.NDArray[np.bool_]:
    """Of which files (n,) it is known what is in them."""
    low, high = found["low"], found["high"]
    return np.asarray((low != 0) | (high != 0))


def still_so(kept: Records, paths: Sequence[str]) -> tuple[npt.NDArray[np.bool_], Records]:
    """Which files have in them what ``kept`` says, and the records that say so now.

    Args:
        kept: (n,) of the same images at another time, or elsewhere.
        paths: n files; those that the file system says something else of are read.
    """
    now = kept.copy()
    seen = np.array([_seen(path) for path in paths], np.int64).reshape(-1, 4).view(np.uint64)
    then = np.stack([kept[name].view(np.uint64) for name in ("device", "inode", "size", "changed")], 1)
    same = (seen == then).all(1)
    for place in np.flatnonzero(~same).tolist():
        try:
            now[place] = look(paths[place])
        except (OSError, ValueError):  # the image is scored again, and that says what is wrong
            now[place] = UNKNOWN
    return known(kept) & (now["low"] == kept["low"]) & (now["high"] == kept["high"]), now


def remembered(paths: Sequence[str], folder: Path) -> Records:
    """Records of files (n,); those that are not known from an earlier time, in ``folder``, are read.

    One that its disk does not give, or its owner, is :data:`UNKNOWN`, and the next time it is read again.

    Raises:
        Refused: one is no image file.
    """
    if not paths:
        return records(())
    memory = folder / "contents.npy"
    before = {row[:4]: row for row in _memory(memory)}
    found = [before.get(_seen(path)) or _look_if_given(path) for path in paths]
    new = {row[:4]: row for row in found if row[:4] not in before and row[3] >= 0 and row != UNKNOWN}
    if new:
        before |= new
        buffer = io.BytesIO()
        np.save(buffer, records(before.values()))
        try:
            replace(memory, buffer.getvalue())
        except OSError as error:
            _log.info("what is in images' files is not remembered: %s", error)
    return records(found)


def _look_if_given(path: str) -> Record:
    try:
        return look(path)
    except OSError:
        return UNKNOWN


def _memory(file: Path) -> list[Record]:
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # there is none, or it is damaged: files are read again
        return []
    return found.tolist() if found.dtype == RECORD and found.ndim == 1 else []


def _checked(path: str, found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"{path} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}; expected an image file")
    if found.st_size > LARGEST:
        raise Refused(f"{path} has {found.st_size} bytes; expected an image file of {LARGEST} at most")
    return found


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}


def _stamp(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev & (2**63 - 1), found.st_ino & (2**63 - 1), found.st_size, found.st_ctime_ns


def _seen(path: str) -> tuple[int, int, int, int]:
    try:
        return _stamp(os.stat(path))
    except (OSError, ValueError):
        return (0, 0, 0, -2)  # what no record has
