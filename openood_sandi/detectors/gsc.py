"""Gradient Short-Circuit (GSC): Gu, Qiao and Li, ICCV 2025, "Efficient OOD Detection via Feature Intervention".

For the output F of a high-level layer, f the network after it and c the predicted class (arXiv 2507.01417):

    g = df_c / dF                      how sensitive the predicted logit is to each coordinate
    F'_i = 0 where |g_i| is among the largest, F_i elsewhere
    f(F') ~ f(F) + (F' - F) df/dF      first order: no second forward pass

and the score is the energy -logsumexp f(F'), or the negative maximum softmax probability of f(F'). Confidence that
rests on a few sensitive coordinates collapses.

By default F is the penultimate feature (D,) and f a linear layer, f(F) = W F + b. Then g = W_c for every image, nothing
needs differentiating, and the first order is exact. ``layer`` names any other: a map (K, H, W) is masked element by
element, and both derivatives are those of the network after it (:mod:`openood_sandi.engine.suffix`). Deviations: the
share of coordinates, ``mask_ratio``, has a default of our own choosing, to be set on validation data; the predicted
class stays the unmodified network's.

A caution: on the networks that we measured, it ranks below the energy itself (README, Side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.detectors.options import require_name
from openood_sandi.engine.features import Penultimate, stages
from openood_sandi.engine.suffix import sensitivity

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


class GradientShortCircuit:
    """The GSC detector: ``pred, score = GradientShortCircuit(net)(x)``, a larger score for OOD.

    Args:
        net: a classifier in eval mode; by default with a linear last layer.
        mask_ratio: the share, 0 to 1, of the coordinates of F that are set to zero, rounded to whole ones.
        score: "energy" or "msp" (maximum softmax probability) of the new logits.
        layer: the module whose output is F: its name ("name#2" for its second call), "last_stage" for the last feature
            map, or "auto" for the penultimate feature.

    Raises:
        ValueError: an option is out of range; at the first batch, if the last layer is not linear where it has to be,
            or there is no such layer.
    """

    def __init__(self, net: nn.Module, *, mask_ratio: float = 0.02, score: str = "energy", layer: str = "auto") -> None:
        if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, (int, float)) or not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio={mask_ratio!r}: expected a share, from 0 to 1")
        if score not in _SCORES:
            raise ValueError(f"score={score!r}: expected one of {', '.join(map(repr, _SCORES))}")
        require_name(layer=layer)
        self.mask_ratio, self.score, self.layer = mask_ratio, score, layer
        self._features = Penultimate(net)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to predicted classes (B,) int64 and scores (B,)."""
        pred, logits = self._at_linear_head(x) if self.layer == "auto" else self._at_layer(x)
        if self.score == "energy":
            return pred, -logits.logsumexp(1)
        return pred, -logits.softmax(1).amax(1)

    @torch.no_grad()
    def _at_linear_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._features(x)
        return logits.argmax(1), short_circuited(features, logits, self._features.head(x).weight, self.mask_ratio)

    def _at_layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        net = self._features.net
        if self.layer == "last_stage":
            self.layer = _last_stage(net, x)
        after = sensitivity(net, self.layer, x)
        removed = _most_sensitive(after.feature.flatten(1), after.gradient.flatten(1), self.mask_ratio)
        return after.logits.argmax(1), after.logits_moved(-removed.view_as(after.feature))


def short_circuited(features: Tensor, logits: Tensor, weight: Tensor, mask_ratio: float) -> Tensor:
    """The logits (B, C) after zeroing the coordinates of F (B, D) that the predicted logit is most sensitive to.

    ``weight`` (C, D) is the linear layer's, so its row c is the gradient of logit c. Of equal gradients any may go.
    """
    return logits - _most_sensitive(features, weight[logits.argmax(1)], mask_ratio) @ weight.T


def _most_sensitive(features: Tensor, gradient: Tensor, mask_ratio: float) -> Tensor:
    """F (B, D) at the coordinates with the largest gradients (B, D), zero elsewhere."""
    count = round(mask_ratio * features.shape[1])
    largest = gradient.abs().topk(count, dim=1).indices
    return torch.zeros_like(features).scatter(1, largest, features.gather(1, largest))


def _last_stage(net: nn.Module, x: Tensor) -> str:
    """The name of the module that ends the last stage."""
    names = stages(net, x)
    if not names:
        raise ValueError("layer='last_stage': the network has no feature maps; name the layer")
    return names[-1]
