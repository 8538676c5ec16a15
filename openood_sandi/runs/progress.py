"""How far a long run is: a bar on a terminal, and in a log a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any, TypeVar

from openood_sandi.runs import ranks

__all__ = ["EVERY", "Lines", "shown"]

T = TypeVar("T")
EVERY = 30.0
"""Seconds from line to line where progress is told in lines."""


def shown(
    items: Iterable[T],
    title: str,
    unit: str = "batches",
    total: int | None = None,
    count: Callable[[T], int] = lambda item: 1,
    **of_the_bar: Any,
) -> Iterable[T]:
    """The items, and on the main process how many are done: a bar where stderr is a terminal and tqdm is installed,
    else :class:`Lines`.

    Args:
        items: whatever is worked on.
        title: what is being done.
        unit: what is counted in lines, in the plural.
        total: how many of these there are, if that is not the number of items.
        count: how many an item is.
        of_the_bar: options of tqdm's.
    """
    if not ranks.is_main_process():
        return items
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return items
        return tqdm(items, desc=title or None, **of_the_bar)  # type: ignore[no-any-return]
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _with_lines(items, Lines(total, unit), title, count)


def _with_lines(items: Iterable[T], lines: Lines, title: str, count: Callable[[T], int]) -> Iterator[T]:
    for item in items:
        yield item
        lines.add(count(item), title)


class Lines:
    """A line on stderr every :data:`EVERY` seconds where that is no terminal: how much is done, how fast, what is left.

    Args:
        total: how much there is to do; None if that is not known.
        unit: of what, in the plural.
        clock: in seconds.
    """

    def __init__(self, total: int | None, unit: str = "images", clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._unit, self._clock = total, unit, clock
        self._silent = sys.stderr.isatty() or not ranks.is_main_process()
        self._done = self._at_hand = 0
        self._start = self._said = clock()

    def add(self, count: int, now: str, at_hand: bool = False) -> None:
        """So many more are done, in ``now``; those ``at_hand`` took no time and say nothing of the rate."""
        self._done += count
        self._at_hand += count if at_hand else 0
        time_now = self._clock()
        if not self._silent and time_now - self._said >= EVERY:
            self._said = time_now
            print(f"{now or 'scoring'}: {self._told(time_now - self._start)}", file=sys.stderr, flush=True)

    def _told(self, seconds: float) -> str:
        rate = (self._done - self._at_hand) / seconds
        speed = f"{rate:.3g} {self._unit}/s"
        if self._total is None:
            return f"{self._done:,} {self._unit}, {speed}"
        left = f"{timedelta(seconds=round((self._total - self._done) / rate))} left" if rate else "time left unknown"
        return f"{self._done:,} of {self._total:,} {self._unit}, {speed}, {left}"
