"""What a method costs on one machine, kept on disk beside the scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from speed.instrument import count
from torch import Tensor, nn

from .cost import Cost, measure
from .environment import hardware
from .files import replace

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


class Expenses:
    """A folder of measurements; each is made once for its key and hardware."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(
        self,
        key: Mapping[str, object],
        network: nn.Module,
        scorer: Callable[[], Callable[[Tensor], object]],
        images: Callable[[], Tensor],
        device: torch.device,
    ) -> Expense:
        """The cost of ``scorer()`` on the batch ``images()``, both made only if it has to be measured.

        Args:
            key: all that decides the cost beside the hardware.
        """
        machine = hardware(device)
        identity = json.dumps({**key, "hardware": machine}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if (known := _read(path, identity)) is not None:
            return known
        batch = images().to(device)
        if device.type == "cpu":
            batch = batch[:CPU_BATCH]
        score = scorer()
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
