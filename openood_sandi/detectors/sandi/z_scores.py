"""S&I-Z at the split points of a network, with as few gradients as prove it, and bounds on its scores with none.

Where every split feeds a rectifier, the patterns of Eq. 11 are read off the rectifiers' masks (:mod:`.rectifiers`):
that of g_1 in the clean pass, that of g_i at z^{i-1}, for the images where they are proved there. The others are
computed. Every so often what is read is computed as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.bounds import Bounds, Told
from openood_sandi.detectors.sandi.densities import NonZeroDensity, score
from openood_sandi.detectors.sandi.intervals import IntervalReading
from openood_sandi.detectors.sandi.losses import LogitsPlan
from openood_sandi.detectors.sandi.readable import Densities, Look, ReadableNetworks, agree
from openood_sandi.detectors.sandi.readings import FirstReading, PathReading
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.devices import fetch, rows_where
from openood_sandi.engine.network import SplitNetwork
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.walk import Loss, Walk

__all__ = ["ZScores"]

# Where a batch proves little, up to so many of the next are computed at once before one is read again.
_LONGEST_PAUSE = 63

_FAIR = 1e-3
"""An estimate of the lower end that counts so many dead positions as alive is still one."""


class ZScores:
    """S&I-Z; all that is known of a network is found anew where it is split at other points.

    Args:
        network: the split network.
        attack: the steps.
        combine: how Eq. 11 goes over the gradients.
        attribution: L_attr by its name, see :func:`~.losses.loss_on_logits`.
        ascent: L_step by its name.
        input_ascent: for the ablation without splitting, what the input ascends.
        reads: whether patterns may be read off rectifiers.

    Attributes:
        told: what the bounds that served as scores have told.
    """

    def __init__(
        self,
        network: SplitNetwork,
        attack: Attack,
        combine: str,
        attribution: str,
        ascent: str,
        input_ascent: Callable[[Tensor], Loss] | None,
        reads: bool,
    ) -> None:
        self._network, self._attack, self._combine = network, attack, combine
        self._losses, self._input_ascent = (attribution, ascent), input_ascent
        # a saturated cross-entropy has g = 0 anywhere
        self._reads = reads and input_ascent is None and attribution == "max_logit"
        self._start(())
        self.told = Told()

    def _start(self, splits: tuple[Split, ...]) -> None:
        self._splits = splits
        self._readable = ReadableNetworks(self._network, self._attack)
        self._pause = self._to_compute = 0
        """How many batches were not read after the last that proved little, and how many are still to come."""
        self._seen = self._proved = 0

    @property
    def proved_share(self) -> float:
        """The share of the images so far whose densities were read."""
        return self._proved / max(self._seen, 1)

    def reads_any(self, x: Tensor) -> bool:
        """Whether any gradient along the paths from images (B, C, H, W) is not zero anywhere."""
        return any(bool(density.any()) for density in self._computed(x, combine="union")[1].values())

    # To be called inside ``network.over``:

    def densities(self, x: Tensor) -> Densities:
        """Logits (B, classes) and {split name: E (B, K)} of images (B, C, H, W)."""
        look = self._look(x)
        if look is None:
            return self._computed(x)
        self._seen += len(x)
        if self._to_compute:
            self._to_compute -= 1
            return self._computed(x)
        read = self._read(x, look.known.rectified)
        if read is None:
            return self._computed(x)
        logits, found, unproved = read
        finite = logits.isfinite().all(1)
        proved = torch.where(finite & ~unproved, logits.argmax(1), -1)
        to_compute = unproved & finite
        # asked for at once: on a GPU, to ask is to wait
        *sums, classes, unproved, count = fetch(*look.weights.sums, proved, unproved, to_compute.sum())
        if self._readable.has_changed(look, sums):
            self._seen -= len(x)
            return self.densities(x)
        if not agree(found, self._computed, x, classes.tolist(), look.known.agreed["densities"]):
            look.known.rectified = None
            return self._computed(x)
        proves_little = 2 * int(unproved.sum()) > len(x)
        self._pause = self._to_compute = min(2 * self._pause + 1, _LONGEST_PAUSE) if proves_little else 0
        self._proved += len(x) - int(count)
        if count:
            rows = rows_where(to_compute, int(count))
            for name, density in self._computed(x[rows])[1].items():
                found[name][rows] = density
        return logits, found

    def bounds(self, x: Tensor) -> Bounds | None:
        """Bounds on the scores of images (B, C, H, W); None where there is nothing to read them from.

        An L2 ball (Eq. 4) makes steps of other lengths: there is nothing to read then. What needs no gradients but g_1
        is not bounded either, but read as it is.
        """
        look = self._look(x) if math.isinf(self._attack.epsilon) else None
        rectified = None if look is None else look.known.rectified
        if look is None or rectified is None or not rectified.is_bounded or self._is_first(rectified):
            return None
        if not look.known.has_estimates:
            return None
        ends = IntervalReading(rectified, self._splits, self._attack, self._combine)
        logits = self._network.walk(x, Walk(LogitsPlan(self._splits, None, self._losses[1])), ends, ())
        if ends.lost:
            return None
        pred, finite = logits.argmax(1), logits.isfinite().all(1)
        proved = ends.proved(logits)
        surely, maybe = (torch.where(finite & which, pred, -1) for which in (proved, ~proved))
        *sums, classes, estimated = fetch(*look.weights.sums, surely, maybe)
        if self._readable.has_changed(look, sums):
            return self.bounds(x)
        first, computed = ends.first(), partial(self._computed, attack=Attack(1), combine="count")
        if not agree(first, computed, x, classes.tolist(), look.known.agreed["bounds"]):
            look.known.rectified = None
            return None
        if not agree(first, computed, x, estimated.tolist(), look.known.agreed["estimates"], _FAIR):
            look.known.has_estimates = False
            return None
        dtype = torch.promote_types(logits.dtype, torch.float32)
        low, high = (score(each, dtype).masked_fill(~finite, math.nan) for each in ends.densities())
        return Bounds(pred, low, high, proved | ~finite)

    # ------------------------------------------------------------------ passes

    def _look(self, x: Tensor) -> Look | None:
        """What is known for images (B, C, H, W); None where no network can be read."""
        if self._splits is not self._network.splits:
            self._start(self._network.splits)
        return self._readable.at(x) if self._reads and not self._network.is_plain else None

    def _computed(self, x: Tensor, attack: Attack | None = None, combine: str | None = None) -> Densities:
        """Logits and densities with every gradient computed."""
        attack = attack or self._attack
        splits = self._network.splits
        density = NonZeroDensity(splits, attack.steps, combine or self._combine)
        walk = Walk(LogitsPlan(splits, *self._losses), attack, None, self._input_ascent)
        logits = self._network.walk(x, walk, density)
        return logits, density.densities()

    def _read(self, x: Tensor, rectified: RectifiedNetwork | None) -> tuple[Tensor, dict[str, Tensor], Tensor] | None:
        """Logits, densities as masks tell them, and which images (B,) are unproved; None where masks tell nothing."""
        if rectified is None:
            return None
        steps = 1 if self._is_first(rectified) else self._attack.steps
        density = NonZeroDensity(self._splits, steps, self._combine)
        losses = LogitsPlan(self._splits, None, self._losses[1])
        reading: FirstReading | PathReading
        if steps == 1:
            reading = FirstReading(rectified, density, along_paths=self._attack.steps > 1)
            logits = self._network.walk(x, Walk(losses), reading, ())
        elif rectified.needed is not None:
            reading = PathReading(rectified, density, self._attack)
            logits = self._network.walk(x, Walk(losses, self._attack), reading)
        else:
            return None
        if reading.lost:
            return None
        unproved = reading.unproved(logits)
        return logits, density.densities(), unproved

    def _is_first(self, rectified: RectifiedNetwork) -> bool:
        """Whether all that is asked for is the pattern of g_1.

        What is cut off has a step of zero and stays cut off, so the union is the first pattern; behind a max-pool what
        loses to a neighbour may win after the neighbour's step.
        """
        return self._attack.steps == 1 or (self._combine == "union" and not rectified.has_max_pool)
