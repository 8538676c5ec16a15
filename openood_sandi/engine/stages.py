"""The last stage of a network, among its split points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Point", "last_group", "last_stage"]

_FEW = 6
_HALF = 0.5


@dataclass(frozen=True)
class Point:
    """A split point as far as stages go."""

    module: str
    """The module it lies in."""
    positions: int
    """How many positions an image has there."""


def last_stage(points: Sequence[Point], positions: int, holders: Iterable[str]) -> list[int]:
    """Which of the points, in call order and none behind the last feature map, are those of the last stage.

    That is the module whose points agree best with those at the resolution of the last feature map, the innermost of
    several: ``layer4`` of a ResNet, ``block4`` of BiT with the points where it enters at the resolution before. A flat
    network has no module that holds nearly all and mostly such; there it is the points at that resolution, or, where a
    pool leads from these to the last feature map, at that of the last points. Where
    hardly anything comes before that resolution, as in a vision transformer, the network has no stages, and the last
    third of its blocks stands for one.

    Args:
        points: the split points.
        positions: of the last feature map.
        holders: names of the network's modules.
    """
    last = [i for i, point in enumerate(points) if _same(point.positions, positions)]
    larger = [i for i, point in enumerate(points) if point.positions > positions and i not in last]
    # attention that sees its keys at a lower resolution has points at the last one early on
    last = [i for i in last if not larger or i > larger[-1]] or last or last_group(points)
    if len(last) >= _FEW and len(points) - len(last) < len(last) / 2:
        return _last_third(points, last)
    best, agreement = last, _HALF
    for name in sorted({name for name in holders if name}, key=len):
        inside = [i for i, point in enumerate(points) if point.module.startswith(name + ".")]
        both = len(set(inside) & set(last))
        agrees = both / (len(last) + len(inside) - both)
        if agrees > _HALF and agrees >= agreement and len(last) - both <= max(1, len(last) // 5):
            best, agreement = inside, agrees
    return best


def last_group(points: Sequence[Point]) -> list[int]:
    """The points at the end that have the resolution of the last one."""
    first = len(points) - 1
    while first > 0 and _same(points[first - 1].positions, points[-1].positions):
        first -= 1
    return list(range(first, len(points)))


def _same(one: int, other: int) -> bool:
    """Whether two numbers of positions are of one stage: padding and class tokens make none of their own."""
    return max(one, other) < 1.5 * min(one, other) or abs(one - other) <= 1


def _last_third(points: Sequence[Point], last: list[int]) -> list[int]:
    """Those in the last third of the longest row of blocks, and behind; of the points, where no row has three."""
    rows: dict[str, dict[str, int]] = {}  # parent: {child: its first point}
    for i in last:
        parts = points[i].module.split(".")
        for depth in range(len(parts) - 1):
            rows.setdefault(".".join(parts[:depth]), {}).setdefault(parts[depth], i)
    row = max(rows.values(), key=len, default={})
    if len(row) < 3:
        return last[-math.ceil(len(last) / 3) :]
    first = sorted(row.values())[-math.ceil(len(row) / 3)]
    return [i for i in last if i >= first]
