"""What S&I-C needs to know of each image, read in one forward pass."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openood_sandi.detectors.sandi.activation_shares import ActivationPass, activation_pass
from openood_sandi.detectors.sandi.activation_stages import Stages, find_activations
from openood_sandi.detectors.sandi.decision_boundaries import DecisionBoundaries
from openood_sandi.engine.devices import exact_device, fetch

__all__ = ["Summaries", "Summary"]

_log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """A row an image, on the images' device if that has float64, and on the CPU otherwise.

    Attributes:
        pred: predicted classes (B,) int64.
        max_logit: - the largest logit (B,), float64; NaN where logits are not finite.
        energy: - log sum exp of the logits (B,), float64.
        boundaries: mean distance to the decision boundaries (B,), float64; zeros without a linear last layer.
        feature: h (B, D), in the network's precision; (B, 0) without a linear last layer.
        shares: E_j of the activations that end the stages, side by side (B, K_1 + K_2 + ...), float32.
        z: Z (B,), float64.
    """

    pred: Tensor
    max_logit: Tensor
    energy: Tensor
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

    Attributes:
        classes: how many the network tells apart.
        stages: their names, in call order.
        widths: K_j of each.

    Raises:
        ValueError: the network calls no activation on maps.
    """

    def __init__(self, net: nn.Module, x: Tensor, stages: Stages) -> None:
        self._net = net
        self._activations = find_activations(net, x, stages)
        first = _exact(activation_pass(net, x[:1], self._activations.axes_of_ends))
        self.classes = first.logits.shape[1]
        self.stages = tuple(self._activations.ends)
        self.widths = [first.counts[j].shape[1] for j in self._activations.ends.values()]
        self._boundaries = _boundaries(first)

    @torch.no_grad()
    def __call__(self, x: Tensor, with_z: bool = True) -> Summary:
        """The summary of images ``x`` (B, C, H, W); without Z, which is zero then, it is quicker."""
        activations = self._activations
        found = _exact(activation_pass(self._net, x, activations.axes if with_z else activations.axes_of_ends))
        logits, feature = found.logits.double(), found.logits.new_zeros(x.shape[0], 0)
        largest, pred = logits.max(1)
        boundaries = torch.zeros_like(largest)
        if self._boundaries is not None and found.feature is not None:
            boundaries, feature = self._boundaries.distance(logits), found.feature[0].flatten(1)
        shares = _shares(found)
        stages = torch.cat([shares[j] for j in activations.ends.values()], 1)
        z = torch.cat(list(shares.values()), 1).double().square().sum(1) if with_z else torch.zeros_like(largest)
        max_logit = (-largest).masked_fill(~logits.isfinite().all(1), torch.nan)
        return Summary(pred, max_logit, -logits.logsumexp(1), boundaries, feature, stages, z)


def _exact(found: ActivationPass) -> ActivationPass:
    """The same on the CPU, in one transfer, where the images' device has no float64."""
    if exact_device(found.logits.device) == found.logits.device:
        return found
    logits, *moved = fetch(found.logits, *found.counts.values(), *(found.feature or ()))
    counts = dict(zip(found.counts, moved, strict=False))
    feature = None if found.feature is None else (moved[-3], moved[-2], moved[-1])
    return replace(found, logits=logits, counts=counts, feature=feature)


def _shares(found: ActivationPass) -> dict[int, Tensor]:
    """{number of the activation call: E_j (B, K_j), float32}."""
    every = torch.cat(list(found.counts.values()), 1)  # divided all at once, as there can be a hundred
    widths = [count.shape[1] for count in found.counts.values()]
    # what is made while a graph is traced is no tensor to keep
    positions = _positions.__wrapped__ if torch.compiler.is_compiling() else _positions
    every.div_(positions(tuple(found.positions.values()), tuple(widths), every.device))
    return dict(zip(found.counts, torch.split(every, widths, 1), strict=True))


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
    _log.warning("the logits are not the output of a linear layer: fDBD is left out")
    return None
