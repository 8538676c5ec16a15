"""Writing files so that an interruption, also a power cut, leaves the earlier one or the new one, never half."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["clear_remains", "replace"]

#: Seconds after which an unfinished file of another machine is taken for the remains of a killed process.
_ABANDONED = 3600.0


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
