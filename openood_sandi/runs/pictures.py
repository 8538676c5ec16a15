"""Picture files as people have them: which files of a folder are pictures, and any picture's pixels in RGB."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["KINDS", "SYSTEM", "below", "in_words", "is_hidden", "rgb", "suffixes"]

KINDS = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini")
"""What systems leave in folders, beside names that begin with a dot."""


@functools.cache
def suffixes() -> tuple[str, ...]:
    """What names of pictures end with: those of :data:`KINDS` that the installed Pillow can read."""
    from PIL import Image

    return tuple(kind for kind in KINDS if kind in Image.registered_extensions())


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no one's data."""
    return name.startswith(".") or name in SYSTEM


def below(folder: Path) -> tuple[list[str], Counter[str]]:
    """Pictures in a folder and below it, through links too; nothing hidden.

    Returns:
        Their names from the folder on, with slashes, sorted, and how many other files there are by suffix.
    """
    found, others, seen = [], Counter[str](), {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name for name in sorted(folders) if not is_hidden(name) and _new(os.path.join(parent, name), seen)
        ]
        for path in (Path(parent, name) for name in names if not is_hidden(name)):
            if path.suffix.lower() in suffixes():
                found.append(path.relative_to(folder).as_posix())
            else:
                others[path.suffix.lower()] += 1
    return sorted(found), others


def in_words(others: Counter[str]) -> str:
    """How many files of other kinds there are: "2 .txt, 1 without suffix"; nothing where there are none."""
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(others.items()))


def _new(folder: str, seen: set[str]) -> bool:
    """Whether a folder has not been met, by this way or another: links may lead in circles."""
    real = os.path.realpath(folder)
    new = real not in seen
    seen.add(real)
    return new


def rgb(image: Any) -> Any:
    """An image of Pillow's in RGB; deep pixels, 0..65535 or, of floats, 0..1, are scaled, which Pillow would cut off.

    Raises:
        ValueError: some of its pixels are NaN or infinite.
    """
    from PIL import Image

    if image.mode[0] not in "IF":
        return image.convert("RGB")
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("some of its pixels are NaN or infinite")
    largest = float(pixels.max(initial=0))
    if image.mode == "F":
        white = next((white for white in (1, 255, 65535) if largest <= white), largest)
    else:
        white = max(65535, largest)
    return Image.fromarray((pixels.clip(0) * (255 / white)).round().astype(np.uint8)).convert("RGB")
