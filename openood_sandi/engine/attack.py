"""The steps of the attribution attack: Eq. 9, inside the ball of Eq. 4, to the change of class of Eq. 3."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Attack"]


@dataclass(frozen=True)
class Attack:
    """The iterates of Eq. 9, z^i = z^{i-1} + eta sign(dL/dz), inside the L2 ball of Eq. 4.

    Attributes:
        steps: T, how many attribution gradients a split is given; the last step is never taken for a score.
        step_size: eta.
        epsilon: radius of the ball around z^0 that an image's z^i - z^0 is projected to; infinite for none.
        stop_at_flip: whether an image takes no further step once its class at z^{i-1} is another than the clean one.
    """

    steps: int = 2
    step_size: float = 1e-3
    epsilon: float = math.inf
    stop_at_flip: bool = False

    @property
    def is_by_image(self) -> bool:
        """Whether a step depends on more than each position's own gradient, so that images have to be told apart."""
        return self.stop_at_flip or math.isfinite(self.epsilon)

    def direction(self, gradient: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """sign(d L_step / dz) of shape (B, ...), zero for the images that stop.

        Args:
            gradient: of L_step at z^{i-1}, (B, ...).
            labels: the classes (B,) predicted on the clean input.
            logits: those at z^{i-1}, (B, classes).
        """
        sign = gradient.sign()
        if not self.stop_at_flip:
            return sign
        goes_on = logits.detach().argmax(1) == labels
        return sign * goes_on.view(-1, *[1] * (sign.dim() - 1))

    def advance(self, z: Tensor, origin: Tensor, direction: Tensor) -> Tensor:
        """z^i from z^{i-1}, z^0 and the sign of the step gradient, all of shape (B, ...)."""
        moved = torch.add(z, direction.to(z.dtype), alpha=self.step_size)
        if math.isinf(self.epsilon):
            return moved
        offset = moved - origin
        length = torch.linalg.vector_norm(offset.flatten(1), dim=1).clamp_min(torch.finfo(z.dtype).tiny)
        shrink = (self.epsilon / length).clamp(max=1).view(-1, *[1] * (z.dim() - 1))
        return torch.addcmul(origin, offset, shrink)
