"""Writing files so that an interruption, also a power cut, leaves the earlier one or the new one, never half."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["alone", "clear_remains", "replace"]

#: Seconds after which an unfinished file of another machine is taken for the remains of a killed process.
_ABANDONED = 3600.0
#: Seconds after which a lock's file is taken for that of a killed process: what is done under it takes far less.
_STALE = 30.0


def replace(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file aside, see it on disk, then rename it; folders are made where they are missing.

    Args:
        path: where the file is to be. A process that is killed leaves ``<stem>.*.tmp`` beside it, for
            :func:`clear_remains`. A link of that name is replaced, not followed.
        content: bytes, a text (as UTF-8), or a function that writes the file at the path that it is given.

    Raises:
        OSError: the file cannot be written, or a folder has its name; the earlier one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.name.partition(".")[0]
    aside = path.with_name(f"{stem}.{_machine()}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within it no other process is within its own ``with alone(folder)``: what is read there may be written anew.

    The lock is the system's, on the folder itself, and goes with a process that is killed. Where a system or a file
    system has none, it is a file ``.lock`` in the folder, which is there as long as the lock is held.

    Raises:
        OSError: there is no such folder, or nothing can be written there.
    """
    with contextlib.ExitStack() as undo:
        try:
            import fcntl

            held = os.open(folder, os.O_RDONLY)
            undo.callback(os.close, held)
            fcntl.flock(held, fcntl.LOCK_EX)
        except (ImportError, OSError):
            _take(folder / ".lock")
            undo.callback((folder / ".lock").unlink, missing_ok=True)
        yield


def _take(lock: Path) -> None:
    """Wait until the file is not there, or a killed process's, and make it."""
    while True:
        try:
            return os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > _STALE:
                    lock.unlink()
                else:
                    time.sleep(0.01)


def clear_remains(folder: Path, stem: str) -> None:
    """Remove the unfinished files of processes that are gone, beside files of that stem.

    Raises:
        OSError: one cannot be removed.
    """
    for path in folder.glob(f"{stem}.*.tmp"):
        if _is_abandoned(path):
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    machine, _, rest = path.name.split(".")[1].partition("-")
    process = rest.partition("-")[0]
    if machine == _machine() and process.isdecimal():
        return not _is_alive(int(process))
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED
    except FileNotFoundError:  # it has just got its name
        return False


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # there, asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
