"""What a scorer costs, in units that travel between machines: plain forward passes; kept on disk beside the scores."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from speed.instrument import count
from torch import Tensor, nn

from openood_sandi.runs.files import replace

from .environment import hardware

MIN_TURNS = 7
MOST = 10_000
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
        turns: how many, 2 at least; by default ``MIN_TURNS``, more (up to ``MOST``) where these take less than
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
    return (turns >= MIN_TURNS and seconds >= MIN_SECONDS) or (turns >= FEW and seconds >= MAX_SECONDS) or turns >= MOST


def _seconds(call: Callable[[Tensor], object], images: Tensor, clock: Callable[[], float]) -> float:
    synchronize = getattr(torch, images.device.type).synchronize
    synchronize()
    start = clock()
    call(images)
    synchronize()
    return clock() - start


CPU_BATCH = 16
"""Images that are timed at a time on a CPU, at most: more take longer and tell the same."""


@dataclass(frozen=True)
class Expense:
    """Time and memory of scoring a batch.

    Attributes:
        batch_size: how many images were timed at a time.
        peak_bytes: the most memory held beyond network and images: on CUDA what torch's allocator has given out,
            elsewhere tensors alive, as :mod:`speed.instrument` counts them. What a library keeps outside torch is
            not seen.
        hardware: on what, as :func:`comparison.environment.hardware` describes it.
    """

    cost: Cost
    batch_size: int
    peak_bytes: int
    hardware: Mapping[str, object]


def kept_expense(
    folder: Path,
    key: Mapping[str, object],
    network: nn.Module,
    made: Callable[[], tuple[Callable[[Tensor], object], Tensor]],
    device: torch.device,
) -> Expense:
    """The cost of a scorer on a batch of images, both ``made`` only if it has to be measured for a key and hardware.

    Args:
        folder: where measurements are kept.
        key: all that decides the cost beside the hardware.
    """
    machine = hardware(device)
    identity = json.dumps({**key, "hardware": machine}, sort_keys=True)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    if (known := _read(path, identity)) is not None:
        return known
    score, images = made()
    batch = (images[:CPU_BATCH] if device.type == "cpu" else images).to(device)
    cost = measure(network, score, batch)
    expense = Expense(cost, len(batch), count(lambda: score(batch), device).peak_bytes, machine)
    replace(path, json.dumps({"key": identity, "expense": asdict(expense)}, indent=1) + "\n")
    return expense


def _read(path: Path, identity: str) -> Expense | None:
    """What is kept there for this key; None if there is nothing, or nothing that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["key"] != identity:
            return None
        cost = record["expense"].pop("cost")
        lower, median, upper = map(float, cost["forwards"])
        return Expense(Cost(float(cost["images_per_second"]), (lower, median, upper)), **record["expense"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
