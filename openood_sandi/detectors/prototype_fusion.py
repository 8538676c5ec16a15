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
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.engine import checks
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


class PrototypeFusion:
    """The Prototype Fusion detector: ``pred, score = PrototypeFusion(net).fit(batches)(x)``, a larger score for OOD.

    Args:
        net: a classifier in eval mode.
        layers: "last_N", the last N stages of the network, or names of modules, as a list or separated by commas.

    Attributes:
        prototypes: {layer: (classes, channels)} on the CPU, after :meth:`fit`; for "last_N", of every stage, so that
            N can be changed without another fit.
    """

    def __init__(self, net: nn.Module, *, layers: str | Sequence[str] = "last_3") -> None:
        names = [name.strip() for name in layers.split(",")] if isinstance(layers, str) else list(layers)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f'layers={layers!r}: expected "last_3", "last_2", ... or names of modules')
        last = re.fullmatch(r"last_([1-9]\d*)", names[0])
        self.net = checks.eager_network(net)
        self.prototypes: Mapping[str, Tensor] = {}
        self._last = int(last[1]) if last and len(names) == 1 else None
        self._named = tuple(names) if self._last is None else ()

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> PrototypeFusion:
        """Compute the prototypes from training images (B, C, H, W) and labels (B,), on the network's device.

        Images with a negative label are left out.

        Raises:
            ValueError: if there are no images.
        """
        device = next(self.net.parameters()).device
        sums: dict[str, Tensor] = {}
        seen = torch.zeros(0)
        for images, labels in batches:
            known = labels >= 0
            images, labels = images[known].to(device), labels[known].to(device)
            if not len(images):
                continue
            if not sums:
                names = self._layers(images)
            features, logits = self._features(images, names)
            if not sums:
                classes = logits.shape[1]
                sums = {name: z.new_zeros(classes, z.shape[1], dtype=torch.double) for name, z in features.items()}
                seen = torch.zeros(classes, dtype=torch.bool, device=device)
            for name, z in features.items():
                sums[name].index_add_(0, labels, z.double())
            seen[labels] = True
        if not sums:
            raise ValueError("no training images: every class needs some for its prototype")
        self.prototypes = {name: F.normalize(total[seen], dim=1).float().cpu() for name, total in sums.items()}
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to predicted classes (B,) int64 and scores 1 - affinity (B,), from 0 to 2."""
        checks.require_images(x)
        checks.require_eval(self.net)
        names = self._named or tuple(self.prototypes)[-(self._last or 0) :]
        absent = [name for name in names if name not in self.prototypes]
        if absent or not names:
            raise RuntimeError(f"no prototypes{' of ' * bool(absent)}{', '.join(absent)}: call fit first")
        features, logits = self._features(x, names)
        return logits.argmax(1), 1 - affinity(features, self.prototypes)

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

    def _features(self, x: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        with pooled(self.net, names) as found:
            logits = self.net(x)
        return {name: F.normalize(found[name], dim=1) for name in names}, logits


def affinity(features: Mapping[str, Tensor], prototypes: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers of the largest cosine with a prototype, (B,), from unit vectors {layer: (B, channels)}."""
    largest = [(z @ prototypes[name].to(z).T).amax(1) for name, z in features.items()]
    return torch.stack(largest).mean(0)
