"""What is attributed and what is ascended: the losses of Eq. 3 and 12, and which split has which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.walk import Loss, LossPlan, Objective

__all__ = ["LogitsPlan", "channel_average_plan", "loss_on_logits"]


def loss_on_logits(name: str, logits: Tensor) -> Loss:
    """L_step, or L_attr, by its name: "max_logit", or "cross_entropy" of the class that clean ``logits`` predict."""
    return max_logit if name == "max_logit" else cross_entropy(logits.detach().argmax(1))


@dataclass(frozen=True)
class LogitsPlan:
    """A loss on the logits, the same at every split.

    Attributes:
        splits: the split points.
        attribution: L_attr by its name, see :func:`loss_on_logits`; None where no gradient is attributed.
        ascent: L_step by its name.
    """

    splits: Sequence[Split]
    attribution: str | None
    ascent: str

    def __call__(self, logits: Tensor, feature: Tensor | None) -> dict[Site, Objective]:
        ascent = loss_on_logits(self.ascent, logits)
        attribution = None if self.attribution is None else loss_on_logits(self.attribution, logits)
        if self.ascent == self.attribution:
            attribution = ascent  # one backward pass for both
        return {split.site: Objective(attribution, ascent) for split in self.splits}


def channel_average_plan(
    splits: Sequence[Split], feature: Split, ascent: str, top_fraction: float, top_over: str
) -> LossPlan:
    """S&I-A: F attributed at the splits, the sum of log-softmax at F (Eq. 12).

    ``ascent`` is "cross_entropy", or "max_logit" to ascend what is attributed, as the released code then does.
    ``top_over`` says what ``top_fraction`` is of: "channels" of F, ranked by the gradient of the summed logits, or
    "labels", ranked by logit.
    """

    def plan(logits: Tensor, value: Tensor | None) -> dict[Site, Objective]:
        assert value is not None
        channels = logits.new_ones(len(logits), value.shape[feature.channel_axis])
        labels = torch.ones_like(logits)
        if top_over == "labels":
            labels = _top(logits.detach(), top_fraction)
        elif top_fraction < 1:
            channels = _top(_channel_slopes(logits, value, feature), top_fraction)
        inner, outer = top_channels(channels, feature), log_softmax_sum(labels)
        if ascent == "max_logit":
            at_split, at_feature = Objective(inner, inner), Objective(outer, outer)
        else:
            step = loss_on_logits(ascent, logits)
            at_split, at_feature = Objective(inner, step), Objective(outer, step)
        return {**{split.site: at_split for split in splits}, feature.site: at_feature}

    return plan


def _channel_slopes(logits: Tensor, value: Tensor, feature: Split) -> Tensor:
    """d(sum of logits)/dF, averaged over positions: (B, K). For a linear head it is the same for all images."""
    (slope,) = torch.autograd.grad(logits.sum(), value, retain_graph=True, allow_unused=True)
    if slope is None:
        raise ValueError(f"the logits do not depend on F ({feature.name!r}); name another module as feature")
    return feature.by_channel(slope).mean(2)


def _top(values: Tensor, fraction: float) -> Tensor:
    """1 at the floor(fraction K) largest of ``values`` (B, K) in each row, one at least, and 0 elsewhere."""
    count = max(1, math.floor(fraction * values.shape[1]))
    return torch.zeros_like(values).scatter_(1, values.topk(count, dim=1).indices, 1.0)


def max_logit(logits: Tensor, feature: Tensor | None) -> Tensor:
    """The largest logit of each image (the released code's L_attr)."""
    return logits.max(-1).values.sum()


def cross_entropy(labels: Tensor) -> Loss:
    """The cross-entropy of fixed ``labels`` (B,), the classes predicted on the clean input (Eq. 3's L)."""

    def loss(logits: Tensor, feature: Tensor | None) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="sum")

    return loss


def top_channels(weights: Tensor, at: Split) -> Loss:
    """F's mean over positions, summed over its channels with ``weights`` (B, K) of 0 or 1 (Eq. 12's numerator)."""

    def loss(logits: Tensor, feature: Tensor | None) -> Tensor:
        assert feature is not None
        return (at.by_channel(feature, lead=1).mean(-1) * weights).sum()

    return loss


def log_softmax_sum(labels: Tensor) -> Loss:
    """Log-softmax summed over the classes with ``labels`` (B, classes) of 0 or 1 (Eq. 12's denominator)."""

    def loss(logits: Tensor, feature: Tensor | None) -> Tensor:
        return (logits.log_softmax(-1) * labels).sum()

    return loss
