"""What S&I-C needs to know of each image, read in one forward pass."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openood_sandi.detectors.sandi.activation_shares import ActivationPass, activation_pass
from openood_sandi.detectors.sandi.activation_stages import Stages, find_activations
from openood_sandi.detectors.sandi.decision_boundaries import DecisionBoundaries

__all__ = ["Summaries", "Summary"]

_log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """A row an image.

    Attributes:
        pred: predicted classes (B,) int64.
        m: - max logit, or the energy (B,), float64; NaN where logits are not finite.
        boundaries: mean distance to the decision boundaries (B,), float64; zeros where fDBD is left out.
        feature: h (B, D), float32 or as the network has it; (B, 0) where fDBD is left out.
        shares: E_j of the activations that end the stages, side by side (B, K_1 + K_2 + ...), float32.
        z: Z (B,), float64.
    """

    pred: Tensor
    m: Tensor
    boundaries: Tensor
    feature: Tensor
    shares: Tensor
    z: Tensor


class Summaries:
    """Summarises images of one network, whose activations and last layer are found on the first of ``x`` (B, C, H, W).

    Args:
        net: a classifier in eval mode.
        x: images.
        stages: which activations D is taken over.
        base: "max_logit+fdbd", "max_logit" or "energy".

    Attributes:
        classes: how many the network tells apart.
        stages: their names, in call order.
        widths: K_j of each.

    Raises:
        ValueError: the network calls no activation on maps.
    """

    def __init__(self, net: nn.Module, x: Tensor, stages: Stages, base: str) -> None:
        self._net, self._base = net, base
        self._activations = find_activations(net, x, stages)
        first = activation_pass(net, x[:1], self._activations.axes_of_ends)
        self.classes = first.logits.shape[1]
        self.stages = tuple(self._activations.ends)
        self.widths = [first.counts[j].shape[1] for j in self._activations.ends.values()]
        self._boundaries = _boundaries(first) if base == "max_logit+fdbd" else None

    @torch.no_grad()
    def __call__(self, x: Tensor, with_z: bool = True) -> Summary:
        """The summary of images ``x`` (B, C, H, W); without Z, which is zero then, it is quicker."""
        activations = self._activations
        found = activation_pass(self._net, x, activations.axes if with_z else activations.axes_of_ends)
        logits, feature = found.logits.double(), found.logits.new_zeros(len(x), 0)
        largest, pred = logits.max(1)
        m = -logits.logsumexp(1) if self._base == "energy" else -largest
        boundaries = torch.zeros_like(m)
        if self._boundaries is not None and found.feature is not None:
            boundaries, feature = self._boundaries.distance(logits), found.feature[0].flatten(1)
        shares = _shares(found)
        stages = torch.cat([shares[j] for j in activations.ends.values()], 1)
        z = torch.cat(list(shares.values()), 1).double().square().sum(1) if with_z else torch.zeros_like(m)
        return Summary(pred, m.masked_fill(~logits.isfinite().all(1), torch.nan), boundaries, feature, stages, z)


def _shares(found: ActivationPass) -> dict[int, Tensor]:
    """{number of the activation call: E_j (B, K_j), float32}."""
    every = torch.cat(list(found.counts.values()), 1)  # divided all at once, as there can be a hundred
    widths = [count.shape[1] for count in found.counts.values()]
    every.div_(_positions(tuple(found.positions.values()), tuple(widths), every.device))
    return dict(zip(found.counts, every.split(widths, 1), strict=True))


@lru_cache(maxsize=8)
def _positions(positions: tuple[int, ...], widths: tuple[int, ...], device: torch.device) -> Tensor:
    """How many positions each channel has, (K_1 + K_2 + ...,), which are the same for all batches of one size."""
    return torch.tensor(positions, dtype=torch.float32).repeat_interleave(torch.tensor(widths)).to(device)


def _boundaries(first: ActivationPass) -> DecisionBoundaries | None:
    """Those of the last layer where the logits are a linear one's result, None elsewhere."""
    if first.feature is not None:
        _, weight, result = first.feature
        same = result.flatten(1).shape == first.logits.shape and result.flatten(1).equal(first.logits)
        if same or (first.logits.isnan().any() and result.numel() == first.logits.numel()):
            return DecisionBoundaries(weight.flatten(1))
    _log.warning("the logits are not the output of a linear layer: fDBD is left out, and b is max logit alone")
    return None
