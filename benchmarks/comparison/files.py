"""Writing files so that an interruption leaves the earlier one or the new one, never half."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: str | Callable[[Path], object]) -> None:
    """Write aside, a text or what ``write`` puts at the path it is given, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f"{path.suffix}.{os.getpid()}.partial")
    try:
        if isinstance(write, str):
            partial.write_text(write, encoding="utf-8")
        else:
            write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
