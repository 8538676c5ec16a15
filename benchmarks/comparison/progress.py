"""Progress bars: on a terminal, of one process among several, gone when done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from openood_sandi.runs import ranks

T = TypeVar("T")


def progress(items: Iterable[T], description: str, unit: str) -> Iterable[T]:
    """The items, with a bar that says how many are done."""
    shown = None if ranks.is_main_process() else True  # None: where the output is a terminal
    bar: Iterable[T] = tqdm(items, desc=description, unit=unit, leave=False, disable=shown)
    return bar
