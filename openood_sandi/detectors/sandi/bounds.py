"""Bounds on tau (Eq. 14) of S&I-Z at the price of a forward pass, and what can be said by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.densities import score
from openood_sandi.detectors.sandi.intervals import IntervalDensity
from openood_sandi.detectors.sandi.readable import ReadableNetworks, SpotChecks
from openood_sandi.detectors.sandi.shortcut import ComputedDensities
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.devices import fetch
from openood_sandi.engine.walk import LossPlan, Walk

__all__ = ["BoundedScores", "Bounds"]


class _Bounds(NamedTuple):
    pred: Tensor
    low: Tensor
    high: Tensor


class Bounds(_Bounds):
    """``pred, low, high``: predicted classes (B,) int64, and low <= tau <= high, (B,) each; NaN where tau is.

    Attributes:
        proved: (B,) bool, the images of which ``low`` is a bound. ``high`` always is. Of the others ``low`` is an
            estimate: what it would be if no rectifier closed behind any split at all.
    """

    proved: Tensor

    def __new__(cls, pred: Tensor, low: Tensor, high: Tensor, proved: Tensor) -> Bounds:
        made = super().__new__(cls, pred, low, high)
        made.proved = proved
        return made

    @property
    def middle(self) -> Tensor:
        """(B,): what is nearest to all that tau may be."""
        return self.low + (self.high - self.low) / 2

    @property
    def half_width(self) -> Tensor:
        """(B,): how far tau can be from the middle."""
        return (self.high - self.low) / 2

    def decided(self, threshold: float, hard: bool = True) -> Tensor:
        """(B,): the images of which the bounds tell whether tau exceeds ``threshold``; those without tau do.

        Unless decisions are to be ``hard``, estimates of the lower end count as bounds.
        """
        above = self.low > threshold
        return (self.high <= threshold) | (above & self.proved if hard else above) | self.high.isnan()

    @classmethod
    def joined(cls, parts: Sequence[Bounds]) -> Bounds:
        """The parts of a batch as one."""
        pred, low, high = map(torch.cat, zip(*parts, strict=True))
        return cls(pred, low, high, torch.cat([part.proved for part in parts]))

    @classmethod
    def exactly(cls, pred: Tensor, tau: Tensor) -> Bounds:
        """Of scores that are known."""
        return cls(pred, tau, tau, torch.ones_like(pred, dtype=torch.bool))


class Told:
    """What bounds have told of the images so far; on their device, so that nothing waits for it."""

    def __init__(self) -> None:
        self._seen = 0
        self._proved: Tensor | int = 0
        self._error: Tensor | None = None

    def take(self, bounds: Bounds) -> None:
        """Takes in those of a batch."""
        half = bounds.half_width.nan_to_num(0.0).amax()
        self._seen += len(bounds.pred)
        self._proved = self._proved + bounds.proved.sum()
        self._error = half if self._error is None else torch.maximum(self._error, half.to(self._error))

    @property
    def proved_share(self) -> float:
        """The share of the images whose bounds are proved."""
        return float(self._proved) / max(self._seen, 1)

    @property
    def max_error(self) -> float:
        """The largest half-width."""
        return 0.0 if self._error is None else float(self._error)

    def remark(self) -> str:
        """This in words; empty before any images."""
        if not self._seen:
            return ""
        return (
            f"tau is the middle of its bounds, and off by {self.max_error:.3g} at most: that is proved of "
            f"{100 * self.proved_share:.3g} % of {self._seen} images, and estimated of the others"
        )


_FAIR = 1e-3
"""An estimate of the lower end that counts so many dead positions as alive is still one."""


class BoundedScores:
    """Bounds on the scores of S&I-Z where patterns can be read, from one forward pass.

    Args:
        computed: computes densities with every gradient.
        steps_alone: the same losses with nothing attributed.
        readable: what is known about the network.
    """

    def __init__(self, computed: ComputedDensities, steps_alone: LossPlan, readable: ReadableNetworks) -> None:
        self._network, self._attack, self._combine = computed.network, computed.walk.attack, computed.combine
        self._steps_alone, self._readable = steps_alone, readable
        first = ComputedDensities(computed.network, Walk(computed.walk.losses, Attack(1)), "count")
        self._checks = SpotChecks(first)
        self._fair = SpotChecks(first, _FAIR)
        self._unfair: set[object] = set()
        """Where estimates are none: much of what is on is dead, as behind depthwise convolutions."""

    def __call__(self, x: Tensor) -> Bounds | None:
        """Of images (B, C, H, W); None where nothing can be read, and all has to be computed.

        An L2 ball (Eq. 4) makes steps of other lengths: there is nothing to read then. What needs no gradients but g_1
        is not bounded either, but read as it is.
        """
        if self._network.is_plain or math.isfinite(self._attack.epsilon) or self._attack.steps == 1:
            return None
        look = self._readable.at(x)
        readable = look.readable
        if readable is None or not readable.is_bounded or look.key in self._unfair:
            return None
        if self._combine == "union" and not readable.rectified.has_max_pool:
            return None
        ends = IntervalDensity(self._network.splits, readable, self._attack, self._combine)
        logits = self._network.walk(x, Walk(self._steps_alone), ends, ())
        if ends.lost:
            return None
        pred, finite = logits.argmax(1), logits.isfinite().all(1)
        proved = ends.proved(logits)
        surely, maybe = (torch.where(finite & which, pred, -1) for which in (proved, ~proved))
        *sums, classes, estimated = fetch(*look.weights.sums, surely, maybe)
        if self._readable.has_changed(look, sums):
            return self(x)
        first = ends.first()
        if not self._checks.agree(x, first, classes.tolist(), look.key):
            self._readable.reject(look.key)
            return None
        if not self._fair.agree(x, first, estimated.tolist(), look.key):
            self._unfair.add(look.key)
            return None
        dtype = torch.promote_types(logits.dtype, torch.float32)
        low, high = (score(each, dtype).masked_fill(~finite, math.nan) for each in ends.densities())
        return Bounds(pred, low, high, proved | ~finite)
