"""Densities of S&I-Z with as few gradients as prove them: none, those of the steps, or all along every path.

Where every split feeds a rectifier, the patterns of Eq. 11 are read off the rectifiers' masks
(:mod:`.rectifiers`): that of g_1 in the clean pass, that of g_i in the pass at z^{i-1}, for the images where they are
proved there. The others are computed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.alive_density import AliveDensity
from openood_sandi.detectors.sandi.densities import NonZeroDensity
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork, Rectifier, rectified_network
from openood_sandi.engine.devices import fetch, is_autocast, rows_where, take
from openood_sandi.engine.network import SplitNetwork, Weights
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.walk import LossPlan, Observer, Walk

__all__ = ["ComputedDensities", "ShortcutDensities"]

_log = logging.getLogger(__name__)

# A sum of products is exactly zero by accident now and then: seen once in 5e8 positions in float32.
_COINCIDENCE = 1e-5
# Where a batch proves little, up to so many of the next are computed at once before one is read again.
_LONGEST_PAUSE = 63


class ReadDensity(Observer):
    """E of Eq. 11 read off the rectifiers of the passes of a walk.

    Args:
        rectified: the network's rectifiers, with counts that prove.
        density: takes in the patterns.
    """

    def __init__(self, rectified: RectifiedNetwork, density: NonZeroDensity) -> None:
        self.density = density
        self.lost = False
        """Whether the network makes other calls than those that the rectifiers were found in."""
        self._rectified = rectified
        self._sites: dict[int, list[Site]] = {position: [] for position in rectified.rectifiers}
        for site, position in rectified.gates.items():
            self._sites[position].append(site)
        self._fewest: dict[tuple[torch.Size, int], Tensor] = {}
        self._closed: list[Tensor] = []

    def call(self, position: int, name: str, result: Any) -> None:
        # every call, not only the rectifiers: after another way through the network a mask may not even have the shape
        self.lost = self.lost or self._rectified.call_names[position : position + 1] != (name,)
        rectifier = self._rectified.rectifiers.get(position)
        if rectifier is None or self.lost:
            return
        mask = rectifier.mask(result.detach())
        for site in self._sites[position]:
            self.density.pattern(site, mask)
        self._note(mask.sum(1), rectifier)

    def _note(self, through: Tensor, rectifier: Rectifier) -> None:
        """Keeps the fewest open channels of rectifiers whose maps are of one size, to look at them together."""
        key = through.shape, rectifier.needed
        fewest = self._fewest.get(key)
        self._fewest[key] = through if fewest is None else torch.minimum(fewest, through)

    def replayed(self, position: int, lane_sites: Sequence[Site], result: Any) -> None:
        rectifier = self._rectified.rectifiers.get(position)
        if rectifier is None:
            return
        mask = rectifier.mask(result.detach())
        here = self._sites[position]
        for lane, site in enumerate(lane_sites):
            if site in here:
                self.density.pattern(site, mask[lane])
        open_ = (mask.sum(2) >= rectifier.needed).reshape(*mask.shape[:2], -1)
        self._closed.append(~open_.all(2).all(0))

    def unproved(self, logits: Tensor) -> Tensor:
        """(B,): images whose patterns the masks do not prove, from their logits (B, classes)."""
        rows = self._rectified.open_rows
        assert rows is not None
        unproved = ~rows.all().expand(len(logits))  # of any class, as a step may change it
        for (_, needed), fewest in self._fewest.items():
            least = fewest.reshape(len(fewest), -1).amin(1)
            unproved = unproved | (least <= 0 if needed == 1 else least < needed)
        for closed in self._closed:
            unproved = unproved | closed
        return unproved


@dataclass(frozen=True)
class ComputedDensities:
    """Densities of S&I-Z with every gradient computed.

    Attributes:
        network: the split network.
        walk: the losses and the paths.
        combine: how Eq. 11 goes over the gradients.
    """

    network: SplitNetwork
    walk: Walk
    combine: str

    def __call__(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, classes) and E (B, K) by split name of images (B, C, H, W)."""
        density = NonZeroDensity(self.network.splits, self.walk.attack.steps, self.combine)
        logits = self.network.walk(x, self.walk, density)
        return logits, density.densities()


class ShortcutDensities:
    """Densities of S&I-Z, read where that is proved, image by image, and computed where it is not.

    Args:
        computed: computes them with every gradient.
        steps_alone: the same losses with nothing attributed.
    """

    def __init__(self, computed: ComputedDensities, steps_alone: LossPlan) -> None:
        self._computed, self._steps_alone = computed, steps_alone
        self._network, self._attack, self._combine = computed.network, computed.walk.attack, computed.combine
        self._rectified: dict[object, RectifiedNetwork | None] = {}
        self._sums: dict[object, tuple[bytes, ...]] = {}
        """Of the weights as they were last read, by their counts of writes."""
        self._looked_at: dict[object, set[int]] = {}
        """Predicted classes of which an image was both read and computed, alike."""
        self._pause = self._to_compute = 0
        """How many batches were not read after the last that proved little, and how many are still to come."""
        self._seen = self._proved = 0

    @property
    def proved_share(self) -> float:
        """The share of the images so far whose densities were read."""
        return self._proved / max(self._seen, 1)

    def __call__(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, classes) and E (B, K) by split name of images (B, C, H, W)."""
        if self._network.is_plain:
            return self._computed(x)
        self._seen += len(x)
        # a network may treat an image alone otherwise
        kind = (*x.shape[1:], len(x) == 1, x.dtype, x.device, is_autocast(x.device))
        weights = self._network.weights()
        # their sums are asked for with all else that is to be known of the batch, and believed to be the last ones
        sums = self._sums.get(weights.known) or Weights.values(fetch(*weights.sums))
        self._sums = {weights.known: sums}
        key = (*kind, weights.known, sums)
        if key not in self._rectified:
            rectified = rectified_network(self._network.record(x[:2]), self._network.splits)
            self._rectified = {**dict(list(self._rectified.items())[-7:]), key: rectified}
        rectified = self._rectified[key]
        if rectified is None or self._to_compute:
            self._to_compute = max(0, self._to_compute - 1)
            return self._computed(x)
        logits, found, unproved = self._masks(x, rectified)
        if found is None:
            return self._computed(x)
        finite = logits.isfinite().all(1)
        proved = torch.where(finite & ~unproved, logits.argmax(1), -1)
        to_compute = unproved & finite
        *sums_now, classes, unproved, count = fetch(*weights.sums, proved, unproved, to_compute.sum())
        if Weights.values(sums_now) != sums:
            self._sums = {}
            self._seen -= len(x)
            return self(x)
        if not self._agrees(x, found, classes.tolist(), key):
            self._rectified[key] = None
            return self._computed(x)
        proves_little = 2 * int(unproved.sum()) > len(x)
        self._pause = self._to_compute = min(2 * self._pause + 1, _LONGEST_PAUSE) if proves_little else 0
        self._proved += len(x) - int(count)
        if count:
            rows = rows_where(to_compute, int(count))
            for name, density in self._computed(x[rows])[1].items():
                found[name][rows] = density
        return logits, found

    def _masks(self, x: Tensor, rectified: RectifiedNetwork) -> tuple[Tensor, dict[str, Tensor] | None, Tensor]:
        """Logits, densities as masks tell them (None if they tell nothing), and which images (B,) are unproved."""
        splits = self._network.splits
        # What is cut off has a step of zero and stays cut off, so the union is the first pattern; behind a max-pool
        # what loses to a neighbour may win after the neighbour's step.
        union = self._combine == "union" and not rectified.has_max_pool
        forward_suffices = self._attack.steps == 1 or union
        density = NonZeroDensity(splits, 1 if forward_suffices else self._attack.steps, self._combine)
        read: AliveDensity | ReadDensity
        if forward_suffices:
            read = AliveDensity(rectified, density, along_paths=self._attack.steps > 1)
            logits = self._network.walk(x, Walk(self._steps_alone), read, ())
        elif rectified.open_rows is not None:
            read = ReadDensity(rectified, density)
            logits = self._network.walk(x, Walk(self._steps_alone, self._attack), read)
        else:
            return x, None, x
        if read.lost:
            return logits, None, logits
        unproved = read.unproved(logits)
        return logits, density.densities(), unproved

    def _agrees(self, x: Tensor, read: dict[str, Tensor], classes: list[int], key: object) -> bool:
        """Whether what was read of images of B ``classes``, -1 where nothing is proved, is what gradients say.

        One image of each class is looked at, ever: the patterns of gradients depend on the class that is attributed.
        """
        looked_at = self._looked_at.get(key, set())
        first = {label: row for row, label in reversed(list(enumerate(classes)))}
        rows = [row for label, row in first.items() if label >= 0 and label not in looked_at]
        if not rows:
            return True
        computed = self._computed(take(x, rows))[1]
        apart = [(take(read[name], rows) - density).abs() for name, density in computed.items()]
        share = float(torch.cat(apart, 1).mean())
        if share > _COINCIDENCE:
            _log.info("gradients are zero where their rectifiers are not (%.2g of the positions); computing all", share)
            return False
        self._looked_at = {**dict(list(self._looked_at.items())[-7:]), key: looked_at | first.keys()}
        return True
