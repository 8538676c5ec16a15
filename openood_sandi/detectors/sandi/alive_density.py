"""E of Eq. 11 for the gradients of one pass, from the masks of its rectifiers: no gradient is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.alive import Pattern, Where, walk_back
from openood_sandi.detectors.sandi.densities import NonZeroDensity
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.walk import Observer

__all__ = ["AliveDensity"]


class AliveDensity(Observer):
    """Hands the patterns of g_1, read off the masks of a forward pass, to a density.

    Args:
        rectified: the network's rectifiers.
        density: takes in the patterns.
        along_paths: whether the patterns are to stand for the union of all g_i along the paths. Then an image is proved
            where all that its gates let through is alive already: what they cut off stays cut off, while what is dead
            behind them may come alive after a step.
    """

    only_listens = True

    def __init__(self, rectified: RectifiedNetwork, density: NonZeroDensity, along_paths: bool) -> None:
        self.density = density
        self.lost = False
        """Whether the network makes other calls than those that the rectifiers were found in."""
        self._rectified, self._along_paths = rectified, along_paths
        self._open: dict[int, Pattern] = {}
        self._sites: dict[int, list[Site]] = {}
        for site, place in rectified.places.items():
            self._sites.setdefault(place, []).append(site)
        self._gates = {rectified.places[site]: position for site, position in rectified.gates.items()}

    def call(self, position: int, name: str, result: Any) -> None:
        # every call, not only the rectifiers: after another way through the network a mask may not even have the shape
        self.lost = self.lost or self._rectified.call_names[position : position + 1] != (name,)
        rectifier = self._rectified.rectifiers.get(position)
        if rectifier is not None and not self.lost:
            self._open[position] = Pattern.known(rectifier.open_(result.detach()))

    def unproved(self, logits: Tensor) -> Tensor:
        """(B,): images whose patterns the masks do not tell, from their logits (B, classes); the density has those of
        the others."""
        unproved = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        ceilings = self._ceilings() if self._along_paths else {}
        last = min(self._sites)
        for position, pattern in walk_back(self._rectified.backward, self._open, logits.argmax(1), logits.shape[1]):
            if position in self._sites:
                shape = (len(logits), *self._rectified.shapes[position])
                for site in self._sites[position]:
                    self.density.pattern(site, _full(pattern.surely, shape, logits.device))
                highest = ceilings.get(position) if self._along_paths else pattern.possibly
                if pattern.surely is not None and pattern.surely is not highest:
                    unproved |= _differ(pattern.surely, highest)
            if position == last:
                break
        return unproved

    def _ceilings(self) -> dict[int, Where]:
        """By place of a split, what its gate lets through."""
        return {place: self._open[gate].possibly for place, gate in self._gates.items()}


def _full(where: Where, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=device).expand(shape) if where is None else where.expand(shape)


def _differ(surely: Tensor, highest: Where) -> Tensor:
    """(B,) or (1,): images where the first map is False somewhere where the other is True."""
    differs = ~surely if highest is None else highest & ~surely
    return differs.flatten(1).view(torch.uint8).amax(1).bool()
