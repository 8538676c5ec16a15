"""What a scorer costs, in units that travel between machines: plain forward passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MIN_TURNS = 7
MAX_TURNS = 10_000
MIN_SECONDS = 1.0  # a small network needs more turns for a steady median
MAX_SECONDS = 60.0  # a slow method has fewer turns, but FEW at least
FEW = 3


@dataclass(frozen=True)
class Cost:
    """What scoring one batch takes, over several turns."""

    images_per_second: float
    """The median."""
    forwards: tuple[float, float, float]
    """Time of scoring over the time of a plain forward pass without gradients: quartiles, in order."""

    def columns(self) -> dict[str, float]:
        """Of a table."""
        lower, median, upper = self.forwards
        quartiles = {"forwards": median, "forwards_q1": lower, "forwards_q3": upper}
        return {**quartiles, "images_per_second": self.images_per_second}


def measure(
    net: nn.Module,
    scorer: Callable[[Tensor], object],
    images: Tensor,
    *,
    turns: int | None = None,
    clock: Callable[[], float] | None = None,
) -> Cost:
    """Time ``scorer`` against ``net`` on ``images`` (B, C, H, W), one after the other in turn.

    Taking turns lets a slow moment of the machine fall on both alike. A first turn, not counted, takes what
    is done once for a network: memory, kernel choice, the detector's study of the network.

    Args:
        turns: how many, 2 at least; by default ``MIN_TURNS``, more (up to ``MAX_TURNS``) where these take less than
            ``MIN_SECONDS`` and fewer where they take more than ``MAX_SECONDS``.
        clock: in seconds; ``time.perf_counter`` by default.
    """
    clock = clock or time.perf_counter
    forward = torch.no_grad()(net.__call__)

    def turn() -> tuple[float, float]:
        return _seconds(forward, images, clock), _seconds(scorer, images, clock)

    turn()
    taken: list[tuple[float, float]] = []
    spent = 0.0
    while not (len(taken) == turns if turns else _enough(len(taken), spent)):
        taken.append(turn())
        spent += sum(taken[-1])
    ratios = [scoring / plain for plain, scoring in taken]
    # "inclusive" keeps the quartiles of a few turns among their values.
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    seconds = statistics.median(scoring for _, scoring in taken)
    return Cost(images_per_second=len(images) / seconds, forwards=(lower, median, upper))


def _enough(turns: int, seconds: float) -> bool:
    if turns >= MAX_TURNS:
        return True
    return (turns >= MIN_TURNS and seconds >= MIN_SECONDS) or (turns >= FEW and seconds >= MAX_SECONDS)


def _seconds(call: Callable[[Tensor], object], images: Tensor, clock: Callable[[], float]) -> float:
    synchronize = getattr(torch, images.device.type).synchronize
    synchronize()
    start = clock()
    call(images)
    synchronize()
    return clock() - start
