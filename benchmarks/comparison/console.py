"""What the commands have to do with a terminal: arguments and progress."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

import torch

from openood_sandi.runs.progress import shown

T = TypeVar("T")
Number = TypeVar("Number", int, float)


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
    """The items, with a bar or lines that say how many are done; the bar goes when they are."""
    return shown(items, description, unit, leave=False)
