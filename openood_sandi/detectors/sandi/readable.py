"""What is known about a network whose gradients' patterns can be read off its rectifiers; looked up for every batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork, rectified_network
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.devices import fetch, is_autocast, take
from openood_sandi.engine.network import SplitNetwork, Weights

__all__ = ["Densities", "Look", "ReadableNetworks", "SpotChecks"]

_log = logging.getLogger(__name__)

# A sum of products is exactly zero by accident now and then: seen once in 5e8 positions in float32.
_COINCIDENCE = 1e-5

Densities = tuple[Tensor, dict[str, Tensor]]
"""Logits (B, classes) and {split name: E (B, K)}."""


class Look(NamedTuple):
    """What is known for a batch."""

    key: object
    """Equal for images and weights for which the same is known."""
    rectified: RectifiedNetwork | None
    """What can be read there, if anything."""
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
        self._known: dict[object, RectifiedNetwork | None] = {}
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
            self._known = {**dict(list(self._known.items())[-7:]), key: self._look(x[:2])}
        return Look(key, self._known[key], weights, sums)

    def has_changed(self, look: Look, sums: Sequence[Tensor]) -> bool:
        """Whether the weights are others than were believed, by their ``sums`` on the CPU; then all is to do again."""
        if Weights.values(sums) == look.sums:
            return False
        self._sums = {}
        return True

    def reject(self, key: object) -> None:
        """Nothing can be read there: gradients were seen to be otherwise."""
        self._known[key] = None

    def _look(self, x: Tensor) -> RectifiedNetwork | None:
        if self._network.hides_code:
            return None
        return rectified_network(self._network.record(x), self._network.splits, self._attack)


class SpotChecks:
    """One image of each predicted class is read and computed as well: patterns depend on the class that is attributed.

    Args:
        tolerance: the share of the positions that may differ.
    """

    def __init__(self, tolerance: float = _COINCIDENCE) -> None:
        self._tolerance = tolerance
        self._looked_at: dict[object, set[int]] = {}
        """Predicted classes of which an image was both read and computed, alike."""

    def agree(
        self,
        x: Tensor,
        read: dict[str, Tensor],
        compute: Callable[[Tensor], Densities],
        classes: Sequence[int],
        key: object,
    ) -> bool:
        """Whether what was read of images of B ``classes``, -1 where nothing is proved, is what gradients say.

        One image of each class is looked at, ever.
        """
        looked_at = self._looked_at.get(key, set())
        first = {label: row for row, label in reversed(list(enumerate(classes)))}
        rows = [row for label, row in first.items() if label >= 0 and label not in looked_at]
        if not rows:
            return True
        computed = compute(take(x, rows))[1]
        apart = [(take(read[name], rows) - density).abs() for name, density in computed.items()]
        share = float(torch.cat(apart, 1).mean())
        if share > self._tolerance:
            _log.info("gradients are zero where their rectifiers are not (%.2g of the positions); computing all", share)
            return False
        self._looked_at = {**dict(list(self._looked_at.items())[-7:]), key: looked_at | first.keys()}
        return True
