"""Finished scores on disk: an interrupted run goes on where it was and gives, byte for byte, what it would have given.

A cache is a folder of ``<key>.<checksum>.npz`` files, flat, without pickle. The key stands for everything that decides
the scores (weights, options, images, code), so scores made otherwise are never used. The checksum is that of the
whole file. A file appears under its name when it is complete and on disk, never before; it is never changed, and it
is removed only when another one holds what it held, or when its scores do not come out again (:meth:`Entry.void`). So
a kill at any moment loses at most what was not written yet, several processes may share a folder without locks, and
bytes that changed on disk are not mistaken for scores.

With the scores of images in files stands what is in these: :mod:`openood_sandi.runs.contents`. A batch is used only
where the files still hold that. Sets of files with equal names share a key, and each has its own files here.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openood_sandi.runs import contents, files
from openood_sandi.runs.results import BatchScores, Results
from openood_sandi.runs.unreadable import Unreadable

__all__ = ["BatchScores", "Entry", "ScoreCache"]

_log = logging.getLogger(__name__)

#: Hexadecimal digits of SHA-256 that a file's name has of its key, and of its own bytes: 128 bits each.
_DIGITS = 32
#: A value in a key that is a digest: of the weights, the images, the code.
_DIGEST = re.compile("[0-9a-f]{64}")
#: Bytes that a file may have.
_LARGEST = 2**30
#: {number of a batch: the files of its images}
Paths = Mapping[int, Sequence[str]]
_NOTHING = Results.of({})


class ScoreCache:
    """A folder of finished scores.

    Args:
        folder: made when first written to. Any number of runs, methods and data sets can share one.
        seconds: how often a run writes what it has scored; that much work is lost at most.

    Raises:
        NotADirectoryError: ``folder`` is something else.
    """

    def __init__(self, folder: str | Path, seconds: float = 10.0) -> None:
        self.folder = Path(folder)
        self.seconds = seconds
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"the score cache {str(folder)!r} is a file; expected a folder, or a new name")

    def entry(self, key: Mapping[str, object], paths: Paths | None = None) -> Entry:
        """What the folder holds for ``key``, and where more goes.

        Args:
            key: names and values, such as JSON takes, of everything that decides the scores but is in no file.
            paths: the files of the images; None where they are no files.

        Raises:
            TypeError: JSON cannot express the key.
        """
        return Entry(self.folder, json.dumps(key, sort_keys=True), self.seconds, paths)


class Entry:
    """The scores of one data set under one key; see :meth:`ScoreCache.entry`."""

    def __init__(self, folder: Path, key: str, seconds: float, paths: Paths | None = None) -> None:
        self.folder, self.key, self.seconds = folder, key, seconds
        self._question = _checksum(_without_digests(key).encode())[: _DIGITS // 2]
        self._stem = self._question + _checksum(key.encode())[_DIGITS // 2 :]
        self._own: Path | None = None
        self._works = True
        self._last = time.monotonic()
        #: {number of the batch in the loader: its results}, as found on disk, where the images are still those.
        self.found = _NOTHING
        self._used: list[Path] = []
        self._stored: dict[Path, Results | None] = {path: self._read(path) for path in self._files()}
        for path, stored in self._stored.items():
            valid = _of_these_files(stored or _NOTHING, paths)
            if not np.isin(valid.numbers, self.found.numbers).all():
                self._used.append(path)
            self.found = valid.joined(self.found)
        if not self.found:
            self._tell_nearest()

    def beside(self, suffix: str) -> Path | None:
        """The path of a file about these scores, None where nothing can be written."""
        return self.folder / f"{self._stem}.{suffix}" if self._works else None

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return self._works and time.monotonic() - self._last >= self.seconds

    def write(self, batches: Mapping[int, BatchScores]) -> None:
        """Put ``batches``, which include those of the last call, on disk in the place of those.

        Batches with an image that could not be read for now only are left out. Where writing fails (a full disk, a
        folder without permission) a warning says so, once, and later calls do nothing.
        """
        lasting = Results.of(batches).lasting
        if not self._works or not lasting:
            return
        content = _pack(self.key, lasting)
        path, before = self.folder / f"{self._stem}.{_checksum(content)}.npz", self._own
        self._last = time.monotonic()
        if path == before:
            return
        try:
            files.replace(path, content)
            self._own, self._stored[path] = path, lasting
            if before is not None:
                before.unlink(missing_ok=True)
        except OSError as error:
            self._works = False
            _log.warning("the score cache cannot be written, so the run goes on without it: %s", error)

    def complete(self, batches: Mapping[int, BatchScores]) -> None:
        """Put all batches of the data set on disk and remove what is no longer needed: files whose batches these are,
        damaged ones, and remains of processes that were killed. Files with other scores stay: another run's."""
        lasting = Results.of(batches).lasting
        keeper = next((path for path, stored in self._stored.items() if _is_same(stored, lasting)), None)
        if keeper is None:
            self.write(lasting)
            keeper = self._own
        if not self._works:
            return
        try:
            for path in self._files() if keeper is not None else ():
                if path != keeper and self._holds_no_more(path, lasting):
                    path.unlink(missing_ok=True)
            files.clear_remains(self.folder, self._stem)
        except OSError as error:  # superseded files cost nothing but their space
            _log.info("superseded files stay in the score cache: %s", error)

    def void(self, why: str) -> None:
        """Forget what was found, and remove the files that it is from, by name, as its scores do not come out again."""
        names = ", ".join(map(str, self._used))
        _log.warning("the score cache's %s is void and its images are scored again: %s", names, why)
        for path in self._used:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("the score cache's %s is void but cannot be removed: %s", path, error)
            self._stored.pop(path, None)
        self.found = _NOTHING

    def _holds_no_more(self, path: Path, batches: Results) -> bool:
        stored = self._stored[path] if path in self._stored else self._read(path)
        return stored is None or stored.is_part_of(batches)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._stem}.*.npz"))

    def _read(self, path: Path) -> Results | None:
        """The batches in a file; None, with a warning, if it is not what its name says."""
        try:
            if not path.is_file() or path.stat().st_size > _LARGEST:
                raise OSError(f"it is no regular file of {_LARGEST} bytes at most")
            content = path.read_bytes()
        except FileNotFoundError:  # another process has just superseded it
            return _NOTHING
        except OSError as error:
            _log.warning("the score cache's %s cannot be read, so its images are scored again: %s", path, error)
            return _NOTHING
        if path.name != f"{self._stem}.{_checksum(content)}.npz":
            _log.warning("the score cache's %s is damaged, so its images are scored again", path)
            return None
        try:
            return _unpack(content, self.key)
        except Exception as error:  # whatever a file that is not ours makes zipfile and numpy raise
            _log.warning("the score cache's %s is not of its kind, so its images are scored again: %s", path, error)
            return None

    def _tell_nearest(self) -> None:
        """Log which file for the same method and options has the most similar key, and in what it differs."""
        wanted: dict[str, object] = json.loads(self.key)
        nearest: tuple[list[str], Path] | None = None
        for path in self.folder.glob(f"{self._question}*.npz"):
            try:
                if not path.is_file():
                    continue
                _require_unpacked(path, path.stat().st_size)
                with np.load(path, allow_pickle=False) as arrays:
                    other = json.loads(str(arrays["key"]))
                differing = sorted(name for name in {*wanted, *other} if wanted.get(name) != other.get(name))
            except Exception:  # whatever a damaged file makes zipfile and numpy raise; nobody asked for it
                continue
            if nearest is None or len(differing) < len(nearest[0]):
                nearest = differing, path
        if nearest is not None:
            differing, path = nearest
            # Another network or data set is nothing to wonder about; that the code has changed may be.
            level = logging.WARNING if differing == ["code"] else logging.INFO
            _log.log(level, "the score cache's %s has other %s and is not used", path, ", ".join(differing))


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def _without_digests(key: str) -> str:
    items: dict[str, object] = json.loads(key)
    return json.dumps({name: value for name, value in items.items() if not _DIGEST.fullmatch(str(value))})


def _pack(key: str, results: Results) -> bytes:
    """An ``.npz`` file; its bytes follow from the arguments alone."""
    owners = results.numbers[results.owners].tolist()
    unreadable = [[*image, number] for image, number in zip(results.all.unreadable, owners, strict=True)]
    file = io.BytesIO()
    np.savez(
        file,
        key=np.array(key),
        batch=results.numbers,
        size=results.sizes[:, 0],
        pred=results.all.pred,
        score=results.all.score,
        label=results.all.label,
        unreadable=np.array(json.dumps(unreadable)),
        contents=results.all.contents,
        looked_at=results.sizes[:, 1],
    )
    return file.getvalue()


def _require_unpacked(file: Any, size: int) -> None:
    """Raises ValueError for an archive whose members would take more memory than it has bytes."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > size or any(member.compress_type for member in members):
        raise ValueError(f"its arrays are packed; expected {size} bytes of them at most, as this package writes them")


def _unpack(content: bytes, key: str) -> Results:
    _require_unpacked(io.BytesIO(content), len(content))
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        if str(arrays["key"]) != key:
            raise ValueError("it holds scores of another key")
        numbers, sizes = arrays["batch"], np.stack([arrays["size"], arrays["looked_at"]], 1)
        whole = [arrays[name] for name in ("pred", "score", "label")]
        images, files = sizes.sum(0).tolist()
        if numbers.shape != sizes[:, 0].shape or (sizes < 0).any() or any(each.shape != (images,) for each in whole):
            raise ValueError("its arrays differ in length")
        if arrays["contents"].dtype != contents.RECORD or arrays["contents"].shape != (files,):
            raise ValueError("what it says of the images' files is none of its batches'")
        rows = json.loads(str(arrays["unreadable"]))
        unreadable = tuple(Unreadable(*image) for *image, _ in rows)
        owned = np.array([number for *_, number in rows], np.int64)
        owners = np.searchsorted(numbers, owned)
        if (np.diff(numbers) <= 0).any() or (np.diff(owners) < 0).any() or (numbers[owners] != owned).any():
            raise ValueError("its batches are not in order")
        pred, score, label = whole
        return Results(numbers, sizes, BatchScores(pred, score, label, unreadable, arrays["contents"]), owners)


def _of_these_files(stored: Results, paths: Paths | None) -> Results:
    """The batches whose images' files hold what they held, with where these are now."""
    named = [(paths or {}).get(number, ()) for number in stored]
    chosen = stored.where(stored.sizes[:, 1] == np.array([len(each) for each in named], np.int64))
    every = [path for each, number in zip(named, stored, strict=True) if number in chosen for path in each]
    if not every:
        return chosen
    same, now = contents.still_so(chosen.all.contents, every)
    return chosen.looked_at(now).where(chosen.in_all(same))


def _is_same(stored: Results | None, batches: Results) -> bool:
    """Whether a file has these batches and no others, to the last bit, and says where the images' files are now."""
    if not stored:
        return False
    return stored.equals(batches) and np.array_equal(stored.all.contents, batches.all.contents)
