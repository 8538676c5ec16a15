"""Types of command-line arguments that the benchmarks share."""

from __future__ import annotations

import argparse

import torch


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch built without CUDA
        raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from error
