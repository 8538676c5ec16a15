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

A caution: on the networks that we measured, it ranks below the energy itself (README, Side by side). So it does at the
maps of the last two stages of a CIFAR-100 ResNet-18, with shares of 2 and 10 %.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openood_sandi.detectors.detector import Detector, Score
from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.detectors.options import plain_numbers, require_name
from openood_sandi.engine.features import Penultimate, stages
from openood_sandi.engine.suffix import sensitivity
from openood_sandi.engine.twin import Twin

__all__ = ["INFO", "GradientShortCircuit", "short_circuited"]

INFO = DetectorInfo(
    name="gsc",
    label="GSC",
    detector="openood_sandi.detectors.gsc:GradientShortCircuit",
    title="Gradient Short-Circuit: Efficient Out-of-Distribution Detection via Feature Intervention",
    venue="ICCV",
    year=2025,
    url="https://arxiv.org/abs/2507.01417",
    needs="a linear head by default",
)

_SCORES = ("energy", "msp")


class GradientShortCircuit(Detector):
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

    @plain_numbers
    def __init__(self, net: nn.Module, *, mask_ratio: float = 0.02, score: str = "energy", layer: str = "auto") -> None:
        if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, (int, float)) or not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio={mask_ratio!r}: expected a share, from 0 to 1")
        if score not in _SCORES:
            raise ValueError(f"score={score!r}: expected one of {', '.join(map(repr, _SCORES))}")
        require_name(layer=layer)
        self.options = {"mask_ratio": mask_ratio, "score": score, "layer": layer}
        self._features = Penultimate(net)
        self._twin = Twin(self._features.net)
        self._last_stage: str | None = None

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self._features.net

    def _summary(self, x: Tensor) -> Score:
        pred, logits = self._at_linear_head(x) if self.options["layer"] == "auto" else self._at_layer(x)
        if self.options["score"] == "energy":
            return Score(pred, -logits.logsumexp(1))
        return Score(pred, -logits.softmax(1).amax(1))

    def _scored(self, summary: Score) -> Tensor:
        return summary.score

    @torch.no_grad()
    def _at_linear_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._features(x)
        weight = self._features.head(x).weight
        return logits.argmax(1), short_circuited(features, logits, weight, self.options["mask_ratio"])

    def _at_layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._twin.use() as net:  # in whose graph nobody else writes
            after = sensitivity(net, self._layer(x), x)
            removed = _most_sensitive(after.feature.flatten(1), after.gradient.flatten(1), self.options["mask_ratio"])
            return after.logits.argmax(1), after.logits_moved(-removed.view_as(after.feature))

    def _layer(self, x: Tensor) -> str:
        """The name of the layer, by the images ``x`` where it is that of the last map."""
        if self.options["layer"] != "last_stage":
            return str(self.options["layer"])
        if self._last_stage is None:
            names = stages(self.net, x)
            if not names:
                raise ValueError("layer='last_stage': the network has no feature maps; name the layer")
            self._last_stage = names[-1]
        return self._last_stage


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
