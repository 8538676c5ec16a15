"""Gradient Short-Circuit (GSC): Gu, Qiao and Li, ICCV 2025, "Efficient OOD Detection via Feature Intervention".

For the penultimate feature F (D,) with logits f(F) and predicted class c (arXiv 2507.01417):

    g = df_c / dF                      how sensitive the predicted logit is to each coordinate
    F'_i = 0 where |g_i| is among the largest, F_i elsewhere
    f(F') ~ f(F) + (F' - F) df/dF      first order: no second forward pass

and the score is the energy -logsumexp f(F'), or the negative maximum softmax probability of f(F'). Confidence that
rests on a few sensitive coordinates collapses.

The last layer is required to be linear, f(F) = W F + b. Then g = W_c for every image, nothing needs differentiating,
and the first order is exact. Deviations: the share of coordinates, ``mask_ratio``, has a default of our own choosing,
to be set on validation data; the predicted class stays the unmodified network's.

A caution: on the networks that we measured, it ranks below the energy itself (README, Side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openood_sandi.detectors.detector import Detector, Score
from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.detectors.options import plain_numbers
from openood_sandi.engine.features import Penultimate

__all__ = ["INFO", "GradientShortCircuit", "short_circuited"]

INFO = DetectorInfo(
    name="gsc",
    label="GSC",
    detector="openood_sandi.detectors.gsc:GradientShortCircuit",
    title="Gradient Short-Circuit: Efficient Out-of-Distribution Detection via Feature Intervention",
    venue="ICCV",
    year=2025,
    url="https://arxiv.org/abs/2507.01417",
    needs="a linear head",
)

_SCORES = ("energy", "msp")


class GradientShortCircuit(Detector):
    """The GSC detector: ``pred, score = GradientShortCircuit(net)(x)``, a larger score for OOD.

    Args:
        net: a classifier in eval mode with a linear last layer.
        mask_ratio: the share, 0 to 1, of the D coordinates of F that are set to zero, rounded to whole ones.
        score: "energy" or "msp" (maximum softmax probability) of the new logits.

    Raises:
        ValueError: an option is out of range; at the first batch, if the last layer is not linear.
    """

    @plain_numbers
    def __init__(self, net: nn.Module, *, mask_ratio: float = 0.02, score: str = "energy") -> None:
        if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, (int, float)) or not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio={mask_ratio!r}: expected a share, from 0 to 1")
        if score not in _SCORES:
            raise ValueError(f"score={score!r}: expected one of {', '.join(map(repr, _SCORES))}")
        self.options = {"mask_ratio": mask_ratio, "score": score}
        self._features = Penultimate(net)

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self._features.net

    @torch.no_grad()
    def _summary(self, x: Tensor) -> Score:
        features, logits = self._features(x)
        pred = logits.argmax(1)
        logits = short_circuited(features, logits, self._features.head(x).weight, self.options["mask_ratio"])
        if self.options["score"] == "energy":
            return Score(pred, -logits.logsumexp(1))
        return Score(pred, -logits.softmax(1).amax(1))

    def _scored(self, summary: Score) -> Tensor:
        return summary.score


def short_circuited(features: Tensor, logits: Tensor, weight: Tensor, mask_ratio: float) -> Tensor:
    """The logits (B, C) after zeroing the coordinates of F (B, D) that the predicted logit is most sensitive to.

    ``weight`` (C, D) is the linear layer's, so its row c is the gradient of logit c. Of equal gradients any may go.
    """
    count = round(mask_ratio * features.shape[1])
    gradient = weight[logits.argmax(1)]
    largest = gradient.abs().topk(count, dim=1).indices
    removed = torch.zeros_like(features).scatter(1, largest, features.gather(1, largest))
    return logits - removed @ weight.T
