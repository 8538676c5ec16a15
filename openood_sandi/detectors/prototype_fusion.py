"""Prototype Fusion: Gul et al., "A Training-Free Multi-Layer Approach to OOD Detection", arXiv 2603.23677, 2026.

Per layer l, with z_l the global average of the layer's feature map, scaled to length 1:

    p_{l,c} = mean of z_l over the training images of class c, scaled to length 1
    affinity = mean over l of max over c of cos(z_l, p_{l,c})
    score = 1 - affinity

The layers are the last three stages: as published, of ResNets and DenseNets ("layer2" to "layer4"); here of any
network, by the rule of :func:`openood_sandi.engine.features.stages`. Deviations: a class without training images has no
prototype (the authors' release gives it a random one); all layers weigh the same (there, by default too).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi.detectors.detector import Detector
from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.detectors.options import plain_numbers
from openood_sandi.engine import checks
from openood_sandi.engine.devices import Moved, add_rows, exact_device, fetch
from openood_sandi.engine.features import pooled, require_called, stages

__all__ = ["INFO", "PrototypeFusion", "affinity"]

INFO = DetectorInfo(
    name="prototype_fusion",
    label="Prototype Fusion",
    detector="openood_sandi.detectors.prototype_fusion:PrototypeFusion",
    title="A Training-Free Multi-Layer Approach to OOD Detection",
    venue="arXiv",
    year=2026,
    url="https://arxiv.org/abs/2603.23677",
    needs="training images",
    fitted=("prototypes",),
)


class Features(NamedTuple):
    """What a score needs to know of images."""

    pred: Tensor
    """Predicted classes (B,)."""
    vectors: Tensor
    """z_l of all layers side by side (B, channels of all), each of length 1."""


class PrototypeFusion(Detector):
    """The Prototype Fusion detector: ``pred, score = PrototypeFusion(net).fit(batches)(x)``, a larger score for OOD.

    The score is 1 - affinity, from 0 to 2. Training images with a negative label make no prototype.

    Args:
        net: a classifier in eval mode.
        layers: "last_N", the last N stages of the network, or names of modules, as a list or separated by commas.

    Attributes:
        prototypes: {layer: (classes, channels)} on the CPU, after :meth:`.detector.Detector.fit`; for "last_N", of
            every stage, so that N can be changed without another fit.
    """

    fitted = INFO.fitted

    @plain_numbers
    def __init__(self, net: nn.Module, *, layers: str | Sequence[str] = "last_3") -> None:
        names = [name.strip() for name in layers.split(",")] if isinstance(layers, str) else list(layers)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f'layers={layers!r}: expected "last_3", "last_2", ... or names of modules')
        last = re.fullmatch(r"last_([1-9]\d*)", names[0])
        self.options = {"layers": layers}
        self.prototypes: Mapping[str, Tensor] = {}
        self._net = checks.eager_network(net)
        self._last = int(last[1]) if last and len(names) == 1 else None
        self._named = tuple(names) if self._last is None else ()
        self._found: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._moved = Moved()

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self._net

    @torch.no_grad()
    def _summary(self, x: Tensor) -> Features:
        checks.require_images(x)
        checks.require_eval(self.net)
        self._found = self._found or self._layers(x)
        with pooled(self.net, self._found) as found:
            logits = self.net(x)
        vectors = [F.normalize(found[name], dim=1) for name in self._found]
        self._widths = [vector.shape[1] for vector in vectors]
        self._classes = logits.shape[1]
        return Features(logits.argmax(1), torch.cat(vectors, 1))

    def _scored(self, summary: Features) -> Tensor:
        """1 - affinity (B,).

        Raises:
            RuntimeError: there are no prototypes.
        """
        names = self._named or self._found[-(self._last or 0) :]
        if not self.prototypes:
            raise RuntimeError("no prototypes: call fit first")
        absent = [name for name in names if name not in self.prototypes]
        if absent:
            raise RuntimeError(f"no prototypes of {', '.join(absent)}: call fit first")
        by_layer = self._by_layer(summary.vectors)
        prototypes = {name: self._moved.to(name, self.prototypes[name], summary.vectors) for name in names}
        return 1 - affinity({name: by_layer[name] for name in names}, prototypes)

    def _by_layer(self, vectors: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._found, torch.split(vectors, self._widths, 1), strict=True))

    # ------------------------------------------------------------------ fit

    def _start(self) -> None:
        self._sums, self._seen = None, torch.zeros(0)

    def _learn(self, summary: Features, labels: Tensor) -> None:
        vectors = summary.vectors
        if exact_device(vectors.device) != vectors.device:
            vectors, labels = fetch(vectors, labels)
        exact = vectors.double()
        if self._sums is None:
            self._sums = exact.new_zeros(1 + self._classes, exact.shape[1])
            self._seen = torch.zeros(1 + self._classes, dtype=torch.int64, device=exact.device)
        rows = 1 + labels.clamp_min(-1)  # the first is of images without a label
        add_rows(self._sums, rows, exact)
        self._seen.index_add_(0, rows, torch.ones_like(rows))

    def _settle(self, held: Features) -> None:
        seen = torch.zeros(0) if self._sums is None else self._seen[1:].cpu() > 0
        if self._sums is None or not seen.any():
            raise ValueError("no training images with labels: every class needs some for its prototype")
        sums = self._by_layer(self._sums[1:].cpu()[seen])
        self.prototypes = {name: F.normalize(total, dim=1).float().cpu() for name, total in sums.items()}

    def _layers(self, x: Tensor) -> tuple[str, ...]:
        """The layers to compute prototypes of."""
        if self._last is None:
            require_called(self.net, x, self._named)
            return self._named
        found = stages(self.net, x)
        if len(found) < self._last:
            raise ValueError(
                f"layers='last_{self._last}': this network has {len(found)} stages ({', '.join(found)}); "
                "ask for fewer, or name modules"
            )
        return found


def affinity(features: Mapping[str, Tensor], prototypes: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers of the largest cosine with a prototype, (B,), from unit vectors {layer: (B, channels)}."""
    largest = [(z @ prototypes[name].to(z).T).amax(1) for name, z in features.items()]
    return torch.stack(largest).mean(0)
