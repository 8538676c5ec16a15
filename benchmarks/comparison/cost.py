"""What a scorer costs, in units that travel between machines: plain forward passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .methods import Scorer

MIN_TURNS = 7
MIN_SECONDS = 1.0  # a small network needs more turns for a steady median


@dataclass(frozen=True)
class Cost:
    """What scoring one batch takes, over several turns."""

    images_per_second: float
    """The median."""
    forwards: tuple[float, float, float]
    """Time of scoring over the time of a plain forward pass without gradients: quartiles, in order."""


def measure(net: nn.Module, scorer: Scorer, images: Tensor) -> Cost:
    """Time ``scorer`` against ``net`` on ``images`` (B, C, H, W), one after the other in turn.

    Taking turns lets a slow moment of the machine fall on both alike. A first turn, not counted, takes what
    is done once for a network: memory, kernel choice, the detector's study of the network.
    """

    @torch.no_grad()
    def forward() -> None:
        net(images)

    def turn() -> tuple[float, float]:
        return _seconds(forward, images.device), _seconds(lambda: scorer(images), images.device)

    turn()
    turns = [turn()]
    while len(turns) < MIN_TURNS or sum(map(sum, turns)) < MIN_SECONDS:
        turns.append(turn())
    lower, median, upper = statistics.quantiles((scoring / plain for plain, scoring in turns), n=4)
    seconds = statistics.median(scoring for _, scoring in turns)
    return Cost(images_per_second=len(images) / seconds, forwards=(lower, median, upper))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start
