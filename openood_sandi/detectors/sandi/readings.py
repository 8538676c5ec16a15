"""E of Eq. 11 read off the masks of rectifiers: of g_1 from one forward pass, of g_2 and on from replays besides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.alive import walk_back
from openood_sandi.detectors.sandi.densities import NonZeroDensity
from openood_sandi.detectors.sandi.reach import Margins
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.walk import Observer

__all__ = ["FirstReading", "PathReading", "Reading"]


class Reading(Observer):
    """Reads the results of a clean pass, as long as its calls are those that the rectifiers were found in.

    Args:
        rectified: the network's rectifiers.

    Attributes:
        lost: whether the network has made other calls; then nothing is known.
    """

    def __init__(self, rectified: RectifiedNetwork) -> None:
        self.rectified, self.lost = rectified, False

    def call(self, position: int, name: str, result: Any) -> None:
        # every call, not only the rectifiers: after another way through the network a mask may not even have the shape
        self.lost = self.lost or self.rectified.call_names[position : position + 1] != (name,)
        if not self.lost and isinstance(result, Tensor):
            self.read(position, result.detach())

    def read(self, position: int, result: Tensor) -> None:
        """A call of the clean pass has this result."""
        raise NotImplementedError


class FirstReading(Reading):
    """Hands the patterns of g_1 to a density.

    Args:
        rectified: the network's rectifiers.
        density: takes in the patterns.
        along_paths: whether the patterns are to stand for the union of all g_i along the paths. Then an image is proved
            where all that its rectifiers let through is alive already: what they cut off stays cut off, while what is
            dead behind them may come alive after a step.
    """

    only_listens = True

    def __init__(self, rectified: RectifiedNetwork, density: NonZeroDensity, along_paths: bool) -> None:
        super().__init__(rectified)
        self._density, self._along_paths = density, along_paths
        self._open: dict[int, Tensor] = {}

    def read(self, position: int, result: Tensor) -> None:
        if position in self.rectified.rectifiers:
            self._open[position] = self.rectified.rectifiers[position].mask(result)

    def unproved(self, logits: Tensor) -> Tensor:
        """(B,): images whose patterns the masks do not tell, from their logits (B, classes); the density has those of
        the others."""
        unproved = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        sites: dict[int, list[Site]] = defaultdict(list)
        for site, place in self.rectified.places.items():
            sites[place].append(site)
        ceilings: dict[Site, Tensor] = {}
        if self._along_paths:  # what the rectifiers of splits let through
            ceilings = {site: self._open[way.rectifier.position] for site, way in self.rectified.ways.items()}
        everywhere = torch.ones((), dtype=torch.bool, device=logits.device)
        labels, classes = logits.argmax(1), logits.shape[1]
        for place, where in walk_back(self.rectified.backward, self._open, labels, classes, unclear=unproved):
            for site in sites.pop(place, ()):
                where = everywhere if where is None else where
                self._density.pattern(site, where.expand(len(logits), *self.rectified.shapes[place]))
                ceiling = ceilings.get(site, everywhere)
                if self._along_paths and where is not everywhere and where is not ceiling:  # to be so is usual
                    unproved |= (ceiling & ~where).flatten(1).view(torch.uint8).amax(1).bool()
            if not sites:
                break
        return unproved


class PathReading(Reading):
    """Hands the patterns of g_1 to g_T to a density: those of each pass are the masks taken in it.

    At T = 2 not every split needs a second pass. z^1 = z^0 + eta sign(dL/dz) is known as soon as the gradient of the
    step arrives, and what the split's rectifier lets through there follows by the few calls between them. That g_2's
    pattern is this mask is proved where no step can close a position behind it (:mod:`.reach`).

    Args:
        rectified: the network's rectifiers, with counts that prove.
        density: takes in the patterns.
        attack: T and eta.
    """

    def __init__(self, rectified: RectifiedNetwork, density: NonZeroDensity, attack: Attack) -> None:
        super().__init__(rectified)
        assert rectified.needed is not None and rectified.reach is not None
        self._needed, self._density, self._attack = rectified.needed, density, attack
        self._margins = Margins(rectified.reach) if attack.steps == 2 else None
        self._sites: dict[int, list[Site]] = defaultdict(list)
        self._wanted: set[int] = set()
        for site, way in rectified.ways.items():
            self._sites[way.rectifier.position].append(site)
            self._wanted.update((way.position, *way.beside) if self._margins else ())
        self._kept: dict[int, Tensor] = {}
        self._fewest: dict[tuple[torch.Size, int], Tensor] = {}
        self._closed: list[Tensor] = []

    def read(self, position: int, result: Tensor) -> None:
        if position in self._needed:
            mask = self.rectified.rectifiers[position].mask(result)
            for site in self._sites[position]:
                self._density.pattern(site, mask)
            # the fewest of rectifiers whose maps are of one size, to look at them together
            open_, key = _open_channels(mask, 1), (mask.shape, self._needed[position])
            self._fewest[key] = torch.minimum(self._fewest.get(key, open_), open_)
        if self._margins is not None:
            self._margins.call(position, result)
        if position in self._wanted:
            self._kept[position] = result

    def direction(self, site: Site, sign: Tensor) -> bool:
        if site in self.rectified.tails:  # nothing behind it depends on where it goes
            for _ in range(self._attack.steps):
                self._density.pattern(site, torch.ones_like(sign, dtype=torch.bool))
        elif site in self._certain:
            way = self.rectified.ways[site]
            z = self._kept[way.position]
            entering = way.carry(self._attack.advance(z, z, sign), self._kept)
            self._density.pattern(site, way.rectifier.mask(entering.clamp(*way.rectifier.bounds)))
        else:
            return True
        return False

    @cached_property
    def _certain(self) -> frozenset[Site]:
        """The splits that need no second pass for any image of the batch; none on a GPU, where to look is to wait."""
        proved = {} if self._margins is None or self.lost else self._margins.proved()
        if not proved or next(iter(proved.values())).device.type != "cpu":
            return frozenset()
        certain = torch.stack(list(proved.values())).all(1).tolist()
        return frozenset(site for site, known in zip(proved, certain, strict=True) if known)

    def replayed(self, position: int, lane_sites: Sequence[Site], result: Any) -> None:
        if position in self._needed:
            mask = self.rectified.rectifiers[position].mask(result.detach())
            for lane, site in enumerate(lane_sites):
                if site in self._sites[position]:
                    self._density.pattern(site, mask[lane])
            open_ = (_open_channels(mask, 2) >= self._needed[position]).reshape(*mask.shape[:2], -1)
            self._closed.append(~open_.all(2).all(0))

    def unproved(self, logits: Tensor) -> Tensor:
        """(B,): images whose patterns the masks do not prove, from their logits (B, classes)."""
        unproved = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for (_, needed), fewest in self._fewest.items():
            unproved |= fewest.reshape(len(fewest), -1).amin(1) < needed
        for closed in self._closed:
            unproved |= closed
        return unproved


def _open_channels(mask: Tensor, dim: int) -> Tensor:
    """How many channels, which ``dim`` counts, are open at each position."""
    return mask.view(torch.uint8).sum(dim, dtype=torch.int32)
