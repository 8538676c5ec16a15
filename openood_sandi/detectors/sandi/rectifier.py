"""One rectifier: where its input has a gradient, by what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.call_graph import argument
from openood_sandi.detectors.sandi.pooling import winners
from openood_sandi.detectors.sandi.windows import Windows
from openood_sandi.engine.recorded import Call

__all__ = ["PRECISE", "Rectifier", "between", "rectified_range"]

PRECISE = (torch.float32, torch.float64)
"""Sums of products in fewer bits are zero by accident, or too small, all the time."""
_RANGES = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def rectified_range(call: Call) -> tuple[float, float] | None:
    """What a rectifier lets through lies strictly between these; None for any other call."""
    if call.name == "hardtanh":
        return float(argument(call, 1, "min_val", -1.0)), float(argument(call, 2, "max_val", 1.0))
    return _RANGES.get(call.name)


@dataclass(frozen=True)
class Rectifier:
    """A call that lets some of its input through, unchanged, and cuts the rest off.

    Attributes:
        position: its place in the pass.
        bounds: what is let through lies strictly between these.
        pool: the windows of the max-pool that alone uses its result, if one does.
    """

    position: int
    bounds: tuple[float, float]
    pool: Windows | None

    def mask(self, result: Tensor) -> Tensor:
        """Where the rectifier's input has a gradient, from its result (N, K, ...), if that has one everywhere."""
        inside = self.inside(result)
        return inside if self.pool is None else inside & winners(result, self.pool)

    def inside(self, result: Tensor) -> Tensor:
        """Where it lets its input through, from its result."""
        low, high = self.bounds
        inside = result.bool() if low == 0 else _compared(torch.gt, result, low).bool()  # no result is below the bounds
        return inside if math.isinf(high) else inside & _below(result, low, high)


def between(values: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Where any ``values`` lie strictly between the bounds: 1 or True there, whichever is quicker to take and count."""
    low, high = bounds
    inside = _compared(torch.gt, values, low)
    return inside if math.isinf(high) else inside * _compared(torch.lt, values, high)


def _below(result: Tensor, low: float, high: float) -> Tensor:
    """Where numbers from ``low`` to ``high`` are not the latter."""
    if result.device.type != "cpu" or low < 0 or high not in range(1, 128):
        return _compared(torch.lt, result, high).bool()
    whole = result.to(torch.int8)  # rounded down
    return torch.lt(whole, int(high), out=torch.empty_like(whole)).view(torch.bool)


def _compared(compare: Callable[..., Tensor], values: Tensor, bound: float) -> Tensor:
    # on CPUs, several times as fast where the answers are numbers of the same type
    is_quick = values.device.type == "cpu" and values.dtype in PRECISE
    return compare(values, bound, out=torch.empty_like(values) if is_quick else None)
