"""Bounds on tau (Eq. 14) of S&I-Z, and what can be said by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Bounds", "Told"]


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
