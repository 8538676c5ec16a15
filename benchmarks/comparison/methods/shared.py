"""One forward pass a batch for all methods that read logits, penultimate features, or the means of stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi.detectors.prototype_fusion import PrototypeFusion
from openood_sandi.engine.features import Penultimate, pooled, stages

from ..environment import free_memory
from ..suite import digest

SHARE = 0.25
"""Of the free memory, what passes may take; batches that do not fit are computed for each method."""


@dataclass(frozen=True)
class Pass:
    """Of a batch: F (B, D), the last layer's input, if that is linear; logits (B, C); stages' means (B, channels)."""

    features: Tensor | None
    logits: Tensor
    means: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        kept = (self.features, self.logits, *self.means.values())
        return sum(tensor.nbytes for tensor in kept if tensor is not None)


class SharedPass:
    """What ``net`` computes of images (B, C, H, W), once for each batch; the batch is known by its content."""

    keeping = True
    latest: ClassVar[SharedPass | None] = None
    """Of the network that is compared on now: those before have been forgotten."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.net = net
        self.penultimate: Penultimate | None = Penultimate(net)
        try:
            self.penultimate.head(x)
        except ValueError:  # only logits are shared
            self.penultimate = None
        self._stages: tuple[str, ...] = ()
        with contextlib.suppress(ValueError), torch.no_grad():  # a network without stages has none to share
            names = stages(net, x)
            with pooled(net, names):
                net(x)
            self._stages = names
        self._known: dict[str, Pass] = {}
        self._free = SHARE * free_memory(x.device)

    @classmethod
    def of(cls, net: nn.Module, x: Tensor) -> SharedPass:
        """That of the network, the same for all who ask; ``x`` is a batch of images, to find its layers with."""
        if cls.latest is None or cls.latest.net is not net:
            if cls.latest is not None:
                cls.latest.forget()
            cls.latest = cls(net, x)
        return cls.latest

    def forget(self) -> None:
        """Give the memory back, and keep nothing from now on."""
        self._known, self._free = {}, 0

    def __call__(self, x: Tensor) -> Pass:
        if not self.keeping:
            return self._computed(x)
        key = digest(x)
        if key not in self._known:
            found = self._computed(x)
            if found.nbytes > self._free:
                return found
            self._free -= found.nbytes
            self._known[key] = found
        return self._known[key]

    @torch.no_grad()
    def _computed(self, x: Tensor) -> Pass:
        with pooled(self.net, self._stages) as means:
            features, logits = self.penultimate(x) if self.penultimate else (None, self.net(x))
        return Pass(features, logits, dict(means))


class SharedNetwork(nn.Module):
    """``net`` for the methods that read its logits or penultimate features: its last layer alone is computed anew."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self._shared = SharedPass.of(net, x)
        self.head = self._shared.penultimate.head(x).module if self._shared.penultimate else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes); what a method writes into them or the features stays its own."""
        found = self._shared(x)
        if self.head is None or found.features is None:
            return found.logits.clone()
        features = found.features.clone()
        if isinstance(self.head, nn.Conv2d):
            features = features[:, :, None, None]
        logits: Tensor = self.head(features)
        return logits.flatten(1)


def with_shared_means(detector: PrototypeFusion, x: Tensor) -> PrototypeFusion:
    """The detector, reading the means of stages from the shared pass."""
    shared, own = SharedPass.of(detector.net, x), detector._features

    def features(x: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        found = shared(x)
        if not set(names) <= found.means.keys():  # layers that the user names
            return own(x, names)
        return {name: F.normalize(found.means[name], dim=1) for name in names}, found.logits

    detector._features = features  # type: ignore[method-assign]
    return detector


@contextlib.contextmanager
def nothing_shared() -> Iterator[None]:
    """Within it every pass is computed, as where a method's own cost is measured."""
    SharedPass.keeping = False
    try:
        yield
    finally:
        SharedPass.keeping = True
