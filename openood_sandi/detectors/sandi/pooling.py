"""Who wins in the windows of a max-pool when values are only known to lie between two ends."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.detectors.sandi.call_graph import argument
from openood_sandi.engine.recorded import Call

__all__ = ["clearance", "may_win", "surely_wins"]


def surely_wins(lower: Tensor, upper: Tensor, pool: Call) -> Tensor:
    """Where in maps (N, K, H, W) a unit at its ``lower`` end beats all others of some window at their ``upper`` ends.

    Only the largest of the upper ends can: its rivals' best is the second largest.
    """
    windows = _Windows(upper, pool)
    return windows.anywhere(_lead(windows, lower, upper) > 0)


def clearance(values: Tensor, pool: Call) -> Tensor:
    """By how much each unit of ``values`` (N, K, H, W) is ahead in the window where it is most, 0 where it never is.

    As long as no value changes by half of that or more, it stays ahead.
    """
    windows = _Windows(values, pool)
    lead = _lead(windows, values, values).clamp_min(0)
    best = torch.zeros_like(values)
    for k in range(lead.shape[2]):  # windows of one place in them do not overlap
        one = torch.zeros_like(lead)
        one[:, :, k] = lead[:, :, k]
        best = torch.maximum(best, windows.folded(one))
    return best


def may_win(lower: Tensor, upper: Tensor, pool: Call) -> Tensor:
    """Where a unit at its ``upper`` end reaches all others of some window at their ``lower`` ends."""
    windows = _Windows(lower, pool)
    highest = windows.of(lower).amax(2, keepdim=True)
    return windows.anywhere(windows.of(upper) >= highest)


def _lead(windows: _Windows, lower: Tensor, upper: Tensor) -> Tensor:
    """(N, K, window, windows): how far the largest of the upper ends, at its lower end, is ahead; -inf elsewhere."""
    highest = windows.of(upper)
    first = highest.argmax(2, keepdim=True)
    second = highest.scatter(2, first, -math.inf).amax(2, keepdim=True)
    lead = windows.of(lower).gather(2, first) - second
    return torch.full_like(highest, -math.inf).scatter(2, first, lead)


class _Windows:
    """The windows of a max-pool over maps of the shape of ``maps`` (N, K, H, W)."""

    def __init__(self, maps: Tensor, pool: Call) -> None:
        self._kernel = _pair(argument(pool, 1, "kernel_size", None))
        self._stride = _pair(argument(pool, 2, "stride", None) or self._kernel)
        self._padding = _pair(argument(pool, 3, "padding", 0))
        self._dilation = _pair(argument(pool, 4, "dilation", 1))
        ceil = bool(argument(pool, 5, "ceil_mode", False))
        options = (self._kernel, self._stride, self._padding, self._dilation, ceil)
        out = F.max_pool2d(maps[:1, :1], *options).shape[2:]
        self._size = maps.shape[2:]
        #: With ceil_mode the last windows reach further than the padding.
        self._after = [
            max(
                0,
                (out[d] - 1) * self._stride[d]
                + self._dilation[d] * (self._kernel[d] - 1)
                + 1
                - size
                - self._padding[d],
            )
            for d, size in enumerate(self._size)
        ]

    def of(self, maps: Tensor) -> Tensor:
        """(N, K, places in a window, windows)."""
        (top, left), (bottom, right) = self._padding, self._after
        padded = F.pad(maps, (left, right, top, bottom), value=-math.inf)
        columns = F.unfold(padded, self._kernel, self._dilation, 0, self._stride)
        return columns.view(*maps.shape[:2], -1, columns.shape[-1])

    def folded(self, columns: Tensor) -> Tensor:
        """(N, K, H, W): the sum over windows of what is in ``columns``, shaped as :meth:`of` gives them."""
        (top, left), (bottom, right) = self._padding, self._after
        height, width = self._size
        size = (height + top + bottom, width + left + right)
        maps = F.fold(columns.flatten(1, 2), size, self._kernel, self._dilation, 0, self._stride)
        return maps[..., top : top + height, left : left + width]

    def anywhere(self, marked: Tensor) -> Tensor:
        """(N, K, H, W): whether a unit is marked in any window."""
        return self.folded(marked.float()) > 0


def _pair(value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])
