"""Densities of S&I-Z with as few gradients as prove them: none, those of the steps, or all along every path.

Where every split feeds a rectifier, the patterns of Eq. 11 are read off the rectifiers' masks
(:mod:`.rectifiers`): that of g_1 in the clean pass, that of g_i at z^{i-1}, for the images where they are proved there.
That takes a pass at z^{i-1}, but for splits whose steps cannot close anything behind them. The others are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.alive_density import AliveDensity
from openood_sandi.detectors.sandi.densities import NonZeroDensity
from openood_sandi.detectors.sandi.reach import Margins
from openood_sandi.detectors.sandi.readable import Readable, ReadableNetworks, SpotChecks
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork, Rectifier
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.devices import fetch, rows_where
from openood_sandi.engine.network import SplitNetwork
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.walk import LossPlan, Observer, Walk

__all__ = ["ComputedDensities", "ReadDensity", "ShortcutDensities"]

# Where a batch proves little, up to so many of the next are computed at once before one is read again.
_LONGEST_PAUSE = 63


class ReadDensity(Observer):
    """E of Eq. 11 read off the rectifiers of the passes of a walk.

    Args:
        rectified: the network's rectifiers, with counts that prove.
        density: takes in the patterns.
        steps: T.
    """

    def __init__(self, rectified: RectifiedNetwork, density: NonZeroDensity, steps: int) -> None:
        self.density, self._steps = density, steps
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

    def direction(self, site: Site, sign: Tensor) -> bool:
        if site not in self._rectified.tails:
            return True
        for _ in range(self._steps):  # nothing behind it depends on where it goes
            self.density.pattern(site, torch.ones_like(sign, dtype=torch.bool))
        return False

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
        unproved = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for (_, needed), fewest in self._fewest.items():
            least = fewest.reshape(len(fewest), -1).amin(1)
            unproved = unproved | (least <= 0 if needed == 1 else least < needed)
        for closed in self._closed:
            unproved = unproved | closed
        return unproved


class SteppedDensity(ReadDensity):
    """E of Eq. 11 at T = 2, read without replays of the splits that need none.

    z^1 = z^0 + eta sign(dL/dz) is known as soon as the gradient of the step arrives, and what the split's rectifier
    lets through there follows by the few calls between them. That g_2's pattern is this mask is proved for the splits
    whose steps cannot close a position behind them (:mod:`.reach`), whatever they are.

    Args:
        readable: what is known about the network.
        density: takes in the patterns.
        attack: eta.
    """

    def __init__(self, readable: Readable, density: NonZeroDensity, attack: Attack) -> None:
        super().__init__(readable.rectified, density, steps=2)
        self._attack, self._reach = attack, readable.reach
        self._margins = Margins(readable.reach, readable.rectified)
        self._ways = {way.split.site: way for way in readable.ways}
        self._wanted = {place for way in readable.ways for place in (way.position, *way.beside)}
        self._kept: dict[int, Tensor] = {}
        self._certain: frozenset[Site] | None = None

    def call(self, position: int, name: str, result: Any) -> None:
        super().call(position, name, result)
        if not self.lost and isinstance(result, Tensor):
            self._margins.call(position, result.detach())
            if position in self._wanted:
                self._kept[position] = result.detach()

    def direction(self, site: Site, sign: Tensor) -> bool:
        if self._certain is None:
            self._certain = self._proved_sites()
        if site not in self._certain:
            return super().direction(site, sign)
        way = self._ways[site]
        z = self._kept[way.position]
        entering = way.carry(self._attack.advance(z, z, sign), self._kept)
        if way.rectifier.pool is not None:
            entering = entering.clamp(*way.rectifier.bounds)
        self.density.pattern(site, way.rectifier.mask(entering))
        return False

    def _proved_sites(self) -> frozenset[Site]:
        """The splits that are proved for every image of the batch; none on a GPU, where to look would be to wait."""
        proved = {site: self._margins.proved(site) for site in self._reach.bounds}
        told = [each for each in proved.values() if each is not None]
        if self.lost or not told or told[0].device.type != "cpu":
            return frozenset()
        certain = torch.stack(told).all(1).tolist()
        return frozenset(site for site, known in zip(proved, certain, strict=True) if known)


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
        readable: what is known about the network.
    """

    def __init__(self, computed: ComputedDensities, steps_alone: LossPlan, readable: ReadableNetworks) -> None:
        self._computed, self._steps_alone, self._readable = computed, steps_alone, readable
        self._network, self._attack, self._combine = computed.network, computed.walk.attack, computed.combine
        self._checks = SpotChecks(computed)
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
        look = self._readable.at(x)
        if look.readable is None or self._to_compute:
            self._to_compute = max(0, self._to_compute - 1)
            return self._computed(x)
        logits, found, unproved = self._masks(x, look.readable)
        if found is None:
            return self._computed(x)
        finite = logits.isfinite().all(1)
        proved = torch.where(finite & ~unproved, logits.argmax(1), -1)
        to_compute = unproved & finite
        # asked for at once: on a GPU, to ask is to wait
        *sums, classes, unproved, count = fetch(*look.weights.sums, proved, unproved, to_compute.sum())
        if self._readable.has_changed(look, sums):
            self._seen -= len(x)
            return self(x)
        if not self._checks.agree(x, found, classes.tolist(), look.key):
            self._readable.reject(look.key)
            return self._computed(x)
        proves_little = 2 * int(unproved.sum()) > len(x)
        self._pause = self._to_compute = min(2 * self._pause + 1, _LONGEST_PAUSE) if proves_little else 0
        self._proved += len(x) - int(count)
        if count:
            rows = rows_where(to_compute, int(count))
            for name, density in self._computed(x[rows])[1].items():
                found[name][rows] = density
        return logits, found

    def _masks(self, x: Tensor, readable: Readable) -> tuple[Tensor, dict[str, Tensor] | None, Tensor]:
        """Logits, densities as masks tell them (None if they tell nothing), and which images (B,) are unproved."""
        splits, rectified = self._network.splits, readable.rectified
        # What is cut off has a step of zero and stays cut off, so the union is the first pattern; behind a max-pool
        # what loses to a neighbour may win after the neighbour's step.
        union = self._combine == "union" and not rectified.has_max_pool
        forward_suffices = self._attack.steps == 1 or union
        density = NonZeroDensity(splits, 1 if forward_suffices else self._attack.steps, self._combine)
        read: AliveDensity | ReadDensity
        if forward_suffices:
            read = AliveDensity(rectified, density, along_paths=self._attack.steps > 1)
            logits = self._network.walk(x, Walk(self._steps_alone), read, ())
        elif rectified.is_counted:
            stepped = self._attack.steps == 2
            read = (
                SteppedDensity(readable, density, self._attack)
                if stepped
                else ReadDensity(rectified, density, self._attack.steps)
            )
            logits = self._network.walk(x, Walk(self._steps_alone, self._attack), read)
        else:
            return x, None, x
        if read.lost:
            return logits, None, logits
        unproved = read.unproved(logits)
        return logits, density.densities(), unproved
