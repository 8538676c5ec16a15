"""What the commands have to do with a terminal: arguments and progress bars."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from tqdm import tqdm

from openood_sandi.runs import ranks

T = TypeVar("T")
Number = TypeVar("Number", int, float)
EVERY = 30.0
"""Seconds from line to line where progress is told in lines."""


def number(kind: Callable[[str], Number], least: Number) -> Callable[[str], Number]:
    """A type for argparse: a finite number from ``least`` on."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not least <= value < math.inf:  # also where it is not a number
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value

    parse.__name__ = kind.__name__  # for argparse's message about what is no number at all
    return parse


positive = number(int, 1)


class Parser(argparse.ArgumentParser):
    """One whose errors begin with what is wrong, and take a line for the rest."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\nusage: {self.prog} [options]; --help lists them\n")


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch built without CUDA
        raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from error


def progress(items: Iterable[T], description: str, unit: str) -> Iterable[T]:
    """The items, with a bar on a terminal, of one process among several, that says how many are done.

    Elsewhere, in a log say, a line every ``EVERY`` seconds says it.
    """
    if sys.stderr.isatty():
        bar: Iterable[T] = tqdm(items, desc=description, unit=unit, leave=False, disable=not ranks.is_main_process())
        return bar
    return _with_lines(
        items,
        Lines(len(items) if isinstance(items, Sized) else None, unit),
        description,
    )


def _with_lines(items: Iterable[T], lines: Lines, description: str) -> Iterator[T]:
    for item in items:
        yield item
        lines.add(1, description)


class Lines:
    """A line on stderr every ``EVERY`` seconds where that is no terminal: how much is done, how fast, the time left.

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
            print(f"{now}: {self._told(time_now - self._start)}", file=sys.stderr, flush=True)

    def _told(self, seconds: float) -> str:
        rate = (self._done - self._at_hand) / seconds
        speed = f"{rate:.3g} {self._unit}/s"
        if self._total is None:
            return f"{self._done:,} {self._unit}, {speed}"
        left = f"{timedelta(seconds=round((self._total - self._done) / rate))} left" if rate else "time left unknown"
        return f"{self._done:,} of {self._total:,} {self._unit}, {speed}, {left}"
