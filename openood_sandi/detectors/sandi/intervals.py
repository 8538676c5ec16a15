"""Bounds on the densities of S&I-Z from one forward pass, for any T (Eq. 11).

g_1's pattern is read off the rectifiers of the clean pass. Of g_i's it is known which units are surely on at z^{i-1},
and which may be (:mod:`.ways`). Counted, with M_1 = P_i unless a max-pool follows:

    count:         M_1 + S_2 + ... + S_T     to     M_1 + P_2 + ... + P_T
    intersection:  S_T                       to     M_1
    union:         M_1                       to     P_T

What is counted on the right is a bound in any case: a unit that its rectifier cuts off has no gradient. What is counted
on the left is one where every unit that is on has a gradient, which is proved for some images (:mod:`.reach`) and not
for others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.densities import NonZeroDensity, count, shares
from openood_sandi.detectors.sandi.reach import Margins
from openood_sandi.detectors.sandi.readings import Reading
from openood_sandi.detectors.sandi.rectifier import between
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork
from openood_sandi.detectors.sandi.ways import Way, ends_of, narrowed
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split

__all__ = ["IntervalReading"]


@dataclass(frozen=True)
class _Steps:
    """For which i units are counted that are sure, and for which those that are possible; and how often M_1 is."""

    sure: range
    possible: range
    first_in_low: int
    first_in_high: int

    @classmethod
    def of(cls, combine: str, steps: int) -> _Steps:
        none, last, later = range(0), range(steps, steps + 1), range(2, steps + 1)
        if combine == "count":
            return cls(later, later, 1, 1)
        return cls(last, none, 0, 1) if combine == "intersection" else cls(none, last, 1, 0)


class IntervalReading(Reading):
    """Both ends of E.

    Args:
        rectified: the network's rectifiers, by which it ``is_bounded``.
        splits: the split points.
        attack: T and eta.
        combine: how Eq. 11 goes over the gradients.
    """

    only_listens = True

    def __init__(self, rectified: RectifiedNetwork, splits: Sequence[Split], attack: Attack, combine: str) -> None:
        super().__init__(rectified)
        self._attack, self._steps = attack, _Steps.of(combine, attack.steps)
        self._times = attack.steps if combine == "count" else 1
        self._first = NonZeroDensity(splits, 1, "count")
        is_reached = rectified.reach is not None and not rectified.reach.unbounded
        self._margins = Margins(rectified.reach) if is_reached and rectified.reach else None
        self._sure: dict[Site, Tensor] = {}
        self._possible: dict[Site, Tensor] = {}
        self._at: dict[int, list[Site]] = defaultdict(list)
        """Splits by the positions of their rectifiers; ways by those where all is known that they take."""
        self._due: dict[int, list[Way]] = defaultdict(list)
        self._wanted: dict[int, int] = {}
        """Positions of results that ways start from or take, and until which position."""
        self._copied: set[int] = set()
        self._kept: dict[int, Tensor] = {}
        for site, way in rectified.ways.items():
            self._at[way.rectifier.position].append(site)
            self._due[way.known_at if way.calls else way.rectifier.position].append(way)
            for position in (way.position, *way.beside) if way.calls else ():
                self._wanted[position] = max(self._wanted.get(position, 0), way.known_at)
                if not way.is_kept:  # the network may write over it before
                    self._copied.add(position)

    def read(self, position: int, result: Tensor) -> None:
        if self._margins is not None:
            self._margins.call(position, result)
        if position in self._wanted:
            self._kept[position] = result.clone() if position in self._copied else result
        if position in self._at:
            mask = self.rectified.rectifiers[position].mask(result)
            for site in self._at[position]:
                self._first.pattern(site, mask)
        for site in self.rectified.tails:
            if self.rectified.places[site] == position:
                self._first.pattern(site, torch.ones_like(result, dtype=torch.bool))
        for way in self._due.get(position, ()):
            if way.calls or way.rectifier.pool is not None:
                self._count_ends(way, self._kept[way.position] if way.calls else result)
            else:
                self._count_directly(way, result)
        if position in self._due:
            self._kept = {place: kept for place, kept in self._kept.items() if self._wanted[place] > position}

    def _count_directly(self, way: Way, result: Tensor) -> None:
        """Counts what is sure at a split that feeds its rectifier as it is."""
        for i in self._steps.sure:
            bounds = narrowed(way.rectifier.bounds, i, self._attack.step_size, result.dtype)
            self._add(self._sure, way, slice(None), len(result), between(result, bounds))

    def _count_ends(self, way: Way, start: Tensor) -> None:
        """Counts what is sure, and possible, at the end of a way."""
        possible = self._steps.possible if way.rectifier.pool is not None else range(0)
        beside = {position: self._kept[position] for position in way.beside}
        for ends in ends_of(way, start, beside, self._attack.step_size, {*self._steps.sure, *possible}):
            if ends.i in self._steps.sure:
                self._add(self._sure, way, ends.rows, len(start), ends.sure(way.rectifier))
            if ends.i in possible:
                self._add(self._possible, way, ends.rows, len(start), ends.possible(way.rectifier))

    def _add(self, counts: dict[Site, Tensor], way: Way, rows: slice, images: int, mask: Tensor) -> None:
        found = count(way.split.by_channel(mask))
        if way.split.site not in counts:
            counts[way.split.site] = found.new_zeros(images, found.shape[1])
        counts[way.split.site][rows] += found

    def densities(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """{split name: E (B, K)} at the lower and at the upper end."""
        steps, of = self._steps, {site: self._times * size for site, size in self._first.sizes.items()}
        low, high = {}, {}
        for site, on in self._first.counts().items():
            # where nothing else was counted, all that is on stays on, and what is off stays off
            low[site] = steps.first_in_low * on + self._sure.get(site, len(steps.sure) * on)
            high[site] = steps.first_in_high * on + self._possible.get(site, len(steps.possible) * on)
        return shares(low, of), shares(high, of)

    def first(self) -> dict[str, Tensor]:
        """{split name: E (B, K)} of T = 1, where all that is on has a gradient."""
        return self._first.densities()

    def proved(self, logits: Tensor) -> Tensor:
        """(B,): the images of which the lower end is a bound, from their logits (B, classes)."""
        if self._margins is None:
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        return torch.stack(list(self._margins.proved().values())).all(0)
