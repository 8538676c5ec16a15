"""The detectors that are compared. Each builds, for a network in eval mode, a scorer of image batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from openood_sandi import SandI

Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, C, H, W) to predicted classes (B,) and scores (B,); a larger score means "more OOD"."""


def msp(net: nn.Module) -> Scorer:
    """Maximum softmax probability, negated: Hendrycks and Gimpel, ICLR 2017."""

    @torch.no_grad()
    def score(images: Tensor) -> tuple[Tensor, Tensor]:
        confidence, pred = net(images).softmax(dim=1).max(dim=1)
        return pred, -confidence

    return score


def energy(net: nn.Module) -> Scorer:
    """Free energy of the logits at temperature 1: Liu et al., NeurIPS 2020."""

    @torch.no_grad()
    def score(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(images)
        return logits.argmax(dim=1), -logits.logsumexp(dim=1)

    return score


METHODS: dict[str, Callable[[nn.Module], Scorer]] = {
    "msp": msp,
    "energy": energy,
    # GAIA, Chen et al., NeurIPS 2023: one step, and no selection of channels.
    "gaia-z": lambda net: SandI(net, variant="Z", steps=1),
    "gaia-a": lambda net: SandI(net, variant="A", steps=1, top_fraction=1.0),
    # S&I, Zhang et al., ICML 2025.
    "sandi-z": lambda net: SandI(net, variant="Z"),
    "sandi-a": lambda net: SandI(net, variant="A"),
}
