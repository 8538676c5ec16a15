"""The last stage of a network, among its split points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Point", "last_group", "last_stage"]

_FEW = 6


@dataclass(frozen=True)
class Point:
    """A split point as far as stages go."""

    module: str
    """The module it lies in."""
    positions: int
    """How many positions an image has there."""


def last_stage(points: Sequence[Point], positions: int, holders: Iterable[str]) -> list[int]:
    """Which of the points, in call order and none behind the last feature map, are those of the last stage.

    That is the innermost module which holds all points at the resolution of the last feature map, but for at most
    one (the head's own normalisation), and mostly such points: ``layer4`` of a ResNet, ``block4`` of BiT with the points
    where it enters at the resolution before. A flat network has no such module; there it is the points at that
    resolution. Where hardly anything comes before that resolution, as in a vision transformer, the network has no
    stages, and the last third of its blocks stands for one.

    Args:
        points: the split points.
        positions: of the last feature map.
        holders: names of the network's modules.
    """
    last = [i for i, point in enumerate(points) if _same(point.positions, positions)] or [len(points) - 1]
    if len(last) >= _FEW and len(points) - len(last) < len(last) / 2:
        return _last_third(points, last)
    held: list[list[int]] = []
    for name in set(holders):
        inside = [i for i, point in enumerate(points) if point.module.startswith(name + ".")]
        fitting = len(set(inside) & set(last))
        if name and fitting and fitting >= len(last) - 1 and fitting > len(inside) - fitting:
            held.append(inside)
    return min(held, key=len) if len(last) > 1 and held else last


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
    """Those in the last third of the longest row of blocks, and behind; of the points, where there is no row of three."""
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
