"""Writing files so that an interruption, also a power cut, leaves the earlier one or the new one, never half."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

__all__ = ["replace"]


def replace(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file aside, see it on disk, then rename it; folders are made where they are missing.

    Args:
        path: where the file is to be. A process that is killed leaves ``<stem>.*.tmp`` beside it.
        content: bytes, a text (as UTF-8), or a function that writes the file at the path that it is given.

    Raises:
        OSError: the file cannot be written; the earlier one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.name.partition(".")[0]
    aside = path.with_name(f"{stem}.{os.getpid()}-{secrets.token_hex(8)}.tmp")
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
