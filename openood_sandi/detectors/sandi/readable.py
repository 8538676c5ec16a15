"""What is known about a network whose gradients' patterns can be read off its rectifiers; looked up for every batch."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork, rectified_network
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.devices import fetch, is_autocast, take
from openood_sandi.engine.network import SplitNetwork, Weights

__all__ = ["Densities", "Known", "Look", "ReadableNetworks", "agree"]

_log = logging.getLogger(__name__)

# A sum of products is exactly zero by accident now and then: seen once in 5e8 positions in float32.
_COINCIDENCE = 1e-5

Densities = tuple[Tensor, dict[str, Tensor]]
"""Logits (B, classes) and {split name: E (B, K)}."""


@dataclass
class Known:
    """What is known at one shape of images and one state of the weights.

    Attributes:
        rectified: what can be read there; None where nothing can, or was seen to be otherwise.
        agreed: for each kind of what is read, the classes of which an image was both read and computed, alike.
        has_estimates: False where much of what is on is dead, as behind depthwise convolutions.
    """

    rectified: RectifiedNetwork | None
    agreed: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    has_estimates: bool = True


class Look(NamedTuple):
    """What is known for a batch."""

    known: Known
    weights: Weights
    """Whose sums are believed to be the last ones, until they are fetched with all else that is to be known."""
    sums: tuple[bytes, ...]
    """These."""


class ReadableNetworks:
    """The latest shapes of images and states of weights of a network, and whether its patterns can be read there.

    Args:
        network: the split network.
        attack: the steps at its splits.
    """

    def __init__(self, network: SplitNetwork, attack: Attack) -> None:
        self._network, self._attack = network, attack
        self._known: dict[object, Known] = {}
        self._sums: dict[object, tuple[bytes, ...]] = {}
        """Of the weights as they were last read, by their counts of writes."""

    def __reduce__(self) -> tuple[type[ReadableNetworks], tuple[SplitNetwork, Attack]]:
        return ReadableNetworks, (self._network, self._attack)  # the functions that are known do not travel

    def at(self, x: Tensor) -> Look:
        """What is known for images ``x`` (B, C, H, W). To be called inside ``network.over``."""
        # a network may treat an image alone otherwise
        kind = (*x.shape[1:], len(x) == 1, x.dtype, x.device, is_autocast(x.device))
        weights = self._network.weights()
        sums = self._sums.get(weights.counted) or Weights.values(fetch(*weights.sums))
        self._sums = {weights.counted: sums}
        key = (*kind, weights.counted, sums)
        if key not in self._known:
            self._known = {**dict(list(self._known.items())[-7:]), key: Known(self._look(x[:2]))}
        return Look(self._known[key], weights, sums)

    def has_changed(self, look: Look, sums: Sequence[Tensor]) -> bool:
        """Whether the weights are others than were believed, by their ``sums`` on the CPU; then all is to do again."""
        if Weights.values(sums) == look.sums:
            return False
        self._sums = {}
        return True

    def _look(self, x: Tensor) -> RectifiedNetwork | None:
        if self._network.hides_code:
            return None
        return rectified_network(self._network.record(x), self._network.splits, self._attack)


def agree(
    read: dict[str, Tensor],
    compute: Callable[[Tensor], Densities],
    x: Tensor,
    classes: Sequence[int],
    agreed: set[int],
    tolerance: float = _COINCIDENCE,
) -> bool:
    """Whether densities that were read are what gradients say: patterns depend on the class that is attributed.

    One image of each class is looked at that has not ``agreed`` yet; those that do are added there.

    Args:
        read: {split name: E (B, K)}.
        compute: computes them of a few images.
        x: the images (B, C, H, W).
        classes: B predicted ones, -1 where nothing is proved.
        agreed: see :attr:`Known.agreed`.
        tolerance: the share of the positions that may differ.
    """
    first = {label: row for row, label in reversed(list(enumerate(classes)))}
    rows = [row for label, row in first.items() if label >= 0 and label not in agreed]
    if not rows:
        return True
    computed = compute(take(x, rows))[1]
    apart = [(take(read[name], rows) - density).abs() for name, density in computed.items()]
    share = float(torch.cat(apart, 1).mean())
    if share > tolerance:
        _log.info("gradients are zero where their rectifiers are not (%.2g of the positions); computing all", share)
        return False
    agreed.update(first)
    return True
