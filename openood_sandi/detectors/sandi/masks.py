"""Patterns of gradients read off the rectifiers of a pass over the network, as it runs or from its tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.rectifiers import Certificate, Gate, Rectifier
from openood_sandi.engine.tape import Call, Site

__all__ = ["Gates", "Masks"]


@dataclass(frozen=True)
class Gates:
    """The splits whose pattern of gradients is read off a rectifier, and who is told."""

    at: Mapping[Site, Gate] = field(default_factory=dict)
    steps: int = 1
    """Whether for g_1 alone, or for g_1 and g_2."""
    certificate: Certificate | None = None
    """For g_1 alone, in place of a gradient to compare with."""
    calls: tuple[str, ...] = ()
    """The names of the network's calls, which the gates' positions are counted in."""
    pattern: Callable[[Site, Tensor], None] = lambda site, mask: None
    """Called with masks, 1 where the gradient is not zero, in the order i = 1, 2."""


class Masks:
    """Reads the pattern of g_1 off the rectifiers of a recorded pass."""

    def __init__(self, gates: Gates) -> None:
        self._gates = gates
        rectifiers = gates.certificate.rectifiers if gates.certificate is not None and gates.steps == 1 else ()
        self._sites: dict[Rectifier, list[Site]] = {rectifier: [] for rectifier in rectifiers if gates.at}
        for site, gate in gates.at.items():
            self._sites.setdefault(gate.rectifier, []).append(site)
        self._at = {rectifier.position: rectifier for rectifier in self._sites}
        without_pool = all(rectifier.pool is None for rectifier in self._sites)
        self.can_be_read_at_once = bool(gates.at) and gates.steps == 1 and without_pool
        """Whether the recording needs to keep nothing for it."""
        self.let_through: dict[Site, Tensor] = {}
        """How many positions of each image (B,), where g_2 is to be read off as well."""
        self._through: dict[torch.Size, Tensor] = {}  # for maps of one size, at the rectifier that lets least through
        self.lost = False
        """Whether the network makes other calls than those that gates were found in."""

    def read(self, position: int, name: str, result: Any, calls: Sequence[Call] = ()) -> None:
        """Takes in the result of a call; ``calls`` are those kept so far."""
        # every call, not only the rectifiers: after another way through the network a mask may not even have the shape
        self.lost = self.lost or (bool(self._at) and self._gates.calls[position : position + 1] != (name,))
        rectifier = self._at.get(position)
        if rectifier is None or self.lost:
            return
        result = result.detach()
        only_counted = rectifier.is_plain and self._gates.steps == 1
        mask = result.bool() if only_counted else rectifier.mask(result, calls)  # the former is the quickest to count
        for site in self._sites[rectifier]:
            self._gates.pattern(site, mask)
            if self._gates.steps > 1:
                self.let_through[site] = mask.flatten(1).sum(1)
        if self._gates.steps == 1:
            through = (result if rectifier.is_plain else mask).sum(1)  # of what is not negative
            least = self._through.get(through.shape)
            self._through[through.shape] = through if least is None else torch.minimum(least, through)

    def blocked(self) -> Tensor | None:
        """Images (B,) that some rectifier lets through in no channel at some position: they have no certificate.

        None where no rectifier was asked.
        """
        images = [least.reshape(len(least), -1).amin(1) == 0 for least in self._through.values()]
        return torch.stack(images).any(0) if images else None
