"""How far a split's tensor can be from its clean value after i steps, and what of it then passes its rectifier.

A step of Eq. 9 moves a unit by -eta, 0 or eta, so after i - 1 steps it lies between

    l_i = fl(l_{i-1} - eta)    and    u_i = fl(u_{i-1} + eta),    l_1 = u_1 = z^0,

as the additions of the network's own precision round, not as real numbers would. What lies between split and rectifier
(a batch norm, a residual addition) is monotone in each unit and rounds as well, so both ends are carried through the
very calls that the network makes. A unit whose ends both lie inside what its rectifier lets through is *surely* on at
z^{i-1}.

A unit that is off has gradient zero, and sign(0) = 0: it never moves, and stays off. So what is on at any z^{i-1} was
on at z^0, and *possible* is what was on there. Only the losers of a max-pool behind the rectifier can come back, after
a neighbour's step down; there a unit is surely (possibly) a winner if it wins against all rivals at their upper (lower)
ends.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.pooling import may_win, surely_wins
from openood_sandi.detectors.sandi.rectifier import Rectifier, between
from openood_sandi.engine.recorded import Call
from openood_sandi.engine.split_point import Split

__all__ = ["Ends", "Way", "ends_of", "narrowed"]

_AT_ONCE = 1 << 19
"""So many numbers are carried at a time: little memory, and all of it in a processor's cache."""


@dataclass(frozen=True)
class Way:
    """The calls from a split to its rectifier.

    Attributes:
        split: the split point.
        position: the tape position of the call whose result its tensor is.
        calls: those between, by position, in order, without their results; none where it feeds its rectifier directly.
        rectifier: the rectifier.
        beside: the positions of the other results that these calls take: residuals.
    """

    split: Split
    position: int
    calls: Mapping[int, Call]
    rectifier: Rectifier
    beside: frozenset[int]

    @property
    def known_at(self) -> int:
        """The position from which on all is known that the calls take."""
        return max(self.position, *self.beside) if self.beside else self.position

    @property
    def is_kept(self) -> bool:
        """Whether until then nothing has been written over, so that no copies have to be kept."""
        return not self.calls or self.known_at < min(self.calls)

    @property
    def needs_upper(self) -> bool:
        """Whether the upper end can leave the range as well."""
        turns = any(call.name == "batch_norm" for call in self.calls.values())
        return turns or not math.isinf(self.rectifier.bounds[1]) or self.rectifier.pool is not None

    def carry(self, z: Tensor, beside: Mapping[int, Tensor]) -> Tensor:
        """What the rectifier takes in where the split's tensor is ``z`` (b, ...), by the network's own calls."""
        values = {**beside, self.position: z}
        for position, call in self.calls.items():
            values[position] = z = call.rerun(values)
        return z


@dataclass(frozen=True)
class Ends:
    """Both ends of what a rectifier takes in at z^{i-1}, (b, K, ...) of a few images.

    Attributes:
        rows: which images.
        i: of which gradient.
        lower: one end, where an end of it can leave the range at all.
        upper: the other; None where it cannot.
        clean: what the rectifier gives at z^0; None unless a max-pool takes it.
    """

    rows: slice
    i: int
    lower: Tensor
    upper: Tensor | None
    clean: Tensor | None

    def sure(self, rectifier: Rectifier) -> Tensor:
        """Where units are on for certain, 1 or True there."""
        on = between(self.lower, rectifier.bounds)
        if self.upper is not None:
            on = on * between(self.upper, rectifier.bounds)
        return on if rectifier.pool is None else on * surely_wins(*self._given(rectifier), rectifier.pool)

    def possible(self, rectifier: Rectifier) -> Tensor:
        """Where units in front of a max-pool may be on."""
        assert rectifier.pool is not None and self.clean is not None
        return rectifier.inside(self.clean) & may_win(*self._given(rectifier), rectifier.pool)

    def _given(self, rectifier: Rectifier) -> tuple[Tensor, Tensor]:
        """The lower and the upper end behind the rectifier; what is off stays where it is."""
        assert self.upper is not None and self.clean is not None
        on = rectifier.inside(self.clean)
        ends = torch.minimum(self.lower, self.upper), torch.maximum(self.lower, self.upper)
        lower, upper = (torch.where(on, end.clamp(*rectifier.bounds), self.clean) for end in ends)
        return lower, upper


def ends_of(
    way: Way, z: Tensor, beside: Mapping[int, Tensor], step_size: float, steps: Collection[int]
) -> Iterator[Ends]:
    """The ends at z^{i-1} for each i of ``steps``, from 2 on, a few images at a time.

    Args:
        way: from split to rectifier.
        z: z^0, the split's tensor (B, K, ...); of a split that feeds its rectifier directly, the rectifier's result
            does as well, as it differs only where units are off.
        beside: the other results that the way takes, by position.
        step_size: eta.
        steps: which i.
    """
    count = max(1, _AT_ONCE // max(z[0].numel(), 1))
    for start in range(0, len(z), count):
        rows = slice(start, start + count)
        lower = upper = z[rows]
        others = {position: tensor[rows] for position, tensor in beside.items()}
        clean = None if way.rectifier.pool is None else way.carry(lower, others).clamp(*way.rectifier.bounds)
        for i in range(2, max(steps, default=1) + 1):
            lower = lower - step_size
            upper = upper + step_size if way.needs_upper else upper
            if i in steps:
                other_end = way.carry(upper, others) if way.needs_upper else None
                yield Ends(rows, i, way.carry(lower, others), other_end, clean)


@lru_cache(maxsize=256)
def narrowed(bounds: tuple[float, float], i: int, step_size: float, dtype: torch.dtype) -> tuple[float, float]:
    """Between which bounds a split's z^0 lies if z^{i-1} surely lies between those of the rectifier that it feeds.

    l_i is monotone in z^0, so there is a largest z^0 for which it does not exceed the lower bound: the lower one of
    those returned. Likewise the upper one.
    """
    low, high = bounds
    if not math.isinf(high):
        high = _turning_point(high, i, step_size, dtype)
    return _turning_point(low, i, -step_size, dtype), high


def _turning_point(bound: float, i: int, step: float, dtype: torch.dtype) -> float:
    """The z^0 furthest inside the range that i - 1 steps take to ``bound`` or beyond it."""

    def leaves(z: Tensor) -> bool:
        for _ in range(i - 1):
            z = z + step
        return bool(z <= bound) if step < 0 else bool(z >= bound)

    outside, largest = torch.tensor(bound, dtype=dtype), torch.finfo(dtype).max
    within = torch.nextafter(outside, torch.tensor(math.copysign(math.inf, -step), dtype=dtype)) - outside
    while leaves(inside := (outside + within).clamp(-largest, largest)):
        if inside.abs() == largest:
            return math.copysign(math.inf, -step)  # no number stays
        within = 2 * within
    while (between := outside + (inside / 2 - outside / 2)) not in (outside, inside):
        outside, inside = (between, inside) if leaves(between) else (outside, between)
    while leaves(between := torch.nextafter(outside, inside)):  # halves of the smallest numbers round
        outside = between
    return float(outside)
