"""GAIA: Chen et al., NeurIPS 2023. S&I with T = 1, so without a perturbation, and for A over all channels.

GAIA-Z is the density of non-zero gradients, Eq. 11 with one gradient; GAIA-A the channel averages of Eq. 12-13 with one
gradient and all channels of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.detectors.options import plain_numbers
from openood_sandi.detectors.sandi.detector import SandI

__all__ = ["GAIA", "INFO"]

INFO = DetectorInfo(
    name="gaia",
    label="GAIA",
    detector="openood_sandi.detectors.gaia:GAIA",
    title="GAIA: Delving into Gradient-based Attribution Abnormality for Out-of-distribution Detection",
    venue="NeurIPS",
    year=2023,
    url="https://arxiv.org/abs/2311.09620",
)


class GAIA(SandI):
    """The GAIA detector: ``pred, score = GAIA(net)(x)``, a larger score for OOD.

    Args:
        net: a classifier in eval mode, as :class:`openood_sandi.SandI` takes it.
        variant: "Z", "A", or "auto": Z up to 100 classes, A above.
        splits: the split points, as for :class:`openood_sandi.SandI`.
        feature: A's feature map: a module's name, or "auto" for the last spatial one.
        attribution: the loss whose gradient is attributed by Z: "max_logit" or "cross_entropy".
    """

    @plain_numbers
    def __init__(
        self,
        net: nn.Module,
        *,
        variant: str = "auto",
        splits: str | Sequence[str] = "auto",
        feature: str = "auto",
        attribution: str = "max_logit",
    ) -> None:
        super().__init__(
            net, variant=variant, splits=splits, feature=feature, attribution=attribution, steps=1, top_fraction=1.0
        )
