"""The losses of the attribution attack (Eq. 3) and its steps (Eq. 4 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Attack", "Loss", "Objective", "cross_entropy", "log_softmax_sum", "max_logit", "top_channels"]

Loss = Callable[[Tensor, "Tensor | None"], Tensor]
"""From logits (L, B, classes) and the feature map F (L, B, ...) of L copies of a batch to a scalar: the sum over
copies and images, so that the gradient of each copy and image is its own."""


@dataclass(frozen=True)
class Objective:
    """What is attributed and what is ascended at a set of split points.

    ``attribution`` gives g_i = d attribution / dz; ``ascent`` the direction of the step, sign(d ascent / dz).
    """

    attribution: Loss
    ascent: Loss


@dataclass(frozen=True)
class Attack:
    """The iterates of Eq. 9, z^i = z^{i-1} + eta sign(dL/dz), inside the L2 ball of Eq. 4.

    Attributes:
        steps: T, how many attribution gradients a split is given; the last step is never taken for a score.
        step_size: eta.
        epsilon: radius of the ball around z^0 that an image's z^i - z^0 is projected to; infinite for none.
    """

    steps: int = 2
    step_size: float = 1e-3
    epsilon: float = math.inf

    def advance(self, z: Tensor, origin: Tensor, direction: Tensor) -> Tensor:
        """z^i from z^{i-1}, z^0 and the sign of the step gradient, all of shape (B, ...)."""
        moved = torch.add(z, direction.to(z.dtype), alpha=self.step_size)
        if math.isinf(self.epsilon):
            return moved
        offset = moved - origin
        length = torch.linalg.vector_norm(offset.flatten(1), dim=1).clamp_min(torch.finfo(z.dtype).tiny)
        shrink = (self.epsilon / length).clamp(max=1).view(-1, *[1] * (z.dim() - 1))
        return torch.addcmul(origin, offset, shrink)


def max_logit(logits: Tensor, feature: Tensor | None) -> Tensor:
    """The largest logit of each image (the released code's L_attr)."""
    return logits.max(-1).values.sum()


def cross_entropy(labels: Tensor) -> Loss:
    """The cross-entropy of fixed ``labels`` (B,), the classes predicted on the clean input (Eq. 3's L)."""

    def loss(logits: Tensor, feature: Tensor | None) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="sum")

    return loss


def top_channels(weights: Tensor, channel_axis: int) -> Loss:
    """F's mean over positions, summed over its channels with ``weights`` (B, K) of 0 or 1 (Eq. 12's numerator)."""

    def loss(logits: Tensor, feature: Tensor | None) -> Tensor:
        assert feature is not None
        return (feature.movedim(channel_axis + 1, 2).unsqueeze(-1).flatten(3).mean(-1) * weights).sum()

    return loss


def log_softmax_sum(labels: Tensor) -> Loss:
    """Log-softmax summed over the classes with ``labels`` (B, classes) of 0 or 1 (Eq. 12's denominator)."""

    def loss(logits: Tensor, feature: Tensor | None) -> Tensor:
        return (logits.log_softmax(-1) * labels).sum()

    return loss
