"""Who wins in the windows of a max-pool, also where values are only known to lie between two ends."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.detectors.sandi.windows import Windows

__all__ = ["clearance", "may_win", "surely_wins", "winners"]


def winners(values: Tensor, pool: Windows) -> Tensor:
    """Where in ``values`` (..., K, H, W) some window has its largest one, chosen among equals as the max-pool does."""
    maps = values.reshape(-1, *values.shape[-3:])
    options = pool.kernel, pool.stride, pool.padding, pool.dilation, pool.are_ceiled
    indices = F.max_pool2d(maps, *options, return_indices=True)[1]
    won = torch.zeros_like(maps, dtype=torch.bool).flatten(2)
    return won.scatter_(2, indices.flatten(2), True).view(values.shape)


def surely_wins(lower: Tensor, upper: Tensor, pool: Windows) -> Tensor:
    """Where in maps (N, K, H, W) a unit at its ``lower`` end beats all others of some window at their ``upper`` ends.

    Only the largest of the upper ends can: its rivals' best is the second largest.
    """
    return _folded(_lead(lower, upper, pool) > 0, pool) > 0


def clearance(values: Tensor, pool: Windows) -> Tensor:
    """By how much each unit of ``values`` (N, K, H, W) is ahead in the window where it is most, 0 where it never is.

    As long as no value changes by half of that or more, it stays ahead.
    """
    lead = _lead(values, values, pool).clamp_min(0)
    best = torch.zeros_like(values)
    for k in range(lead.shape[2]):  # windows of one place in them do not overlap
        one = torch.zeros_like(lead)
        one[:, :, k] = lead[:, :, k]
        best = torch.maximum(best, _folded(one, pool))
    return best


def may_win(lower: Tensor, upper: Tensor, pool: Windows) -> Tensor:
    """Where a unit at its ``upper`` end reaches all others of some window at their ``lower`` ends."""
    highest = _unfolded(lower, pool).amax(2, keepdim=True)
    return _folded(_unfolded(upper, pool) >= highest, pool) > 0


def _lead(lower: Tensor, upper: Tensor, pool: Windows) -> Tensor:
    """(N, K, window, windows): how far the largest of the upper ends, at its lower end, is ahead; -inf elsewhere."""
    highest = _unfolded(upper, pool)
    first = highest.argmax(2, keepdim=True)
    second = highest.scatter(2, first, -math.inf).amax(2, keepdim=True)
    lead = _unfolded(lower, pool).gather(2, first) - second
    return torch.full_like(highest, -math.inf).scatter(2, first, lead)


def _unfolded(maps: Tensor, pool: Windows) -> Tensor:
    """(N, K, places in a window, windows)."""
    (top, left), (bottom, right) = pool.padding, pool.beyond
    padded = F.pad(maps, (left, right, top, bottom), value=-math.inf)
    columns = F.unfold(padded, pool.kernel, pool.dilation, 0, pool.stride)
    return columns.view(*maps.shape[:2], -1, columns.shape[-1])


def _folded(columns: Tensor, pool: Windows) -> Tensor:
    """(N, K, H, W): the sum over windows of what is in ``columns``, shaped as :func:`_unfolded` gives them."""
    (top, left), (bottom, right), (height, width) = pool.padding, pool.beyond, pool.given
    columns = columns.flatten(1, 2) if columns.is_floating_point() else columns.flatten(1, 2).float()
    size = (height + top + bottom, width + left + right)
    maps = F.fold(columns, size, pool.kernel, pool.dilation, 0, pool.stride)
    return maps[..., top : top + height, left : left + width]
