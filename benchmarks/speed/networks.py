"""The networks that are timed: the catalogue's at any width, with random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from networks.architecture import Architecture
from networks.catalogue import ARCHITECTURES, NORMS, norms
from torch import Tensor, nn


@dataclass(frozen=True)
class TimedNetwork:
    """An architecture, and how the paper applies S&I to it.

    The images have ``image_size`` pixels each way; the ``variant`` is the one the paper uses for so many classes.
    """

    architecture: Architecture
    image_size: int
    variant: Literal["Z", "A"]

    @property
    def classes(self) -> int:
        """Of CIFAR-100 or of ImageNet."""
        return 100 if self.variant == "Z" else 1000

    def splits(self, net: nn.Module, preset: str) -> list[str]:
        """The ``preset`` "paper", or "norms": what ``SandI`` itself would choose, which for A is the same."""
        return norms(net) if preset == "norms" and self.variant == "Z" else self.architecture.paper_splits(net)

    def build(self, width: float = 1.0, seed: int = 0) -> nn.Module:
        """The network in eval mode, in float32 on the CPU, with seeded random weights (see :func:`randomise`).

        Every number of channels is multiplied by ``width``. No rectifier works in place, as the loops need.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.architecture.make(self.classes)
            narrow(net, width)
            randomise(net, torch.randn(8, 3, self.image_size, self.image_size))
        return net


def out_of_place(classes: int, blocks: Sequence[int] = (3, 4, 6, 3)) -> nn.Module:
    """Torchvision's ResNet-50 without its addition in place, to which a leaf of autograd's must not come."""
    from torchvision.models import resnet

    class Bottleneck(resnet.Bottleneck):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            out = self.bn3(self.conv3(out))
            result: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
            return result

    net: nn.Module = resnet.ResNet(Bottleneck, list(blocks), num_classes=classes)
    return net


NETWORKS: dict[str, TimedNetwork] = {
    "resnet18": TimedNetwork(ARCHITECTURES["resnet18_32x32"], 32, "Z"),
    "resnet34": TimedNetwork(ARCHITECTURES["resnet34"], 32, "Z"),
    "wrn40-2": TimedNetwork(ARCHITECTURES["wrn40-2"], 32, "Z"),
    "bit-s-r101x1": TimedNetwork(ARCHITECTURES["bit-s-r101x1"], 224, "A"),
    "resnet50": TimedNetwork(replace(ARCHITECTURES["resnet50"], make=out_of_place), 224, "A"),
}


def narrow(net: nn.Module, width: float) -> None:
    """Multiply every number of channels but those of images and logits by ``width``; weights are made anew."""

    def scaled(channels: int) -> int:
        return max(1, round(channels * width)) if channels > 3 else channels

    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, *NORMS))]
    for layer in layers if width != 1 else ():
        if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            channels = scaled(len(layer.weight))
            groups = [math.gcd(32, channels)] if isinstance(layer, nn.GroupNorm) else []
            layer.__init__(*groups, channels)  # type: ignore[misc]
        else:
            before, after = scaled(layer.weight.shape[1]), len(layer.weight)
            after = after if layer is layers[-1] else scaled(after)
            layer.weight = nn.Parameter(torch.empty(after, before, *layer.weight.shape[2:]))
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


@torch.no_grad()
def randomise(net: nn.Module, images: Tensor) -> None:
    """Random weights that behave like trained ones; leaves ``net`` in eval mode.

    Batch norms hold the statistics of ``images`` (B, C, H, W), and every norm has a scale and a shift of its own, so
    that neither half of a rectifier is empty. Logits have standard deviation 2: a saturated softmax has gradients of
    exactly zero, which would make the attack's steps vanish.
    """
    layers = list(net.modules())
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
        elif isinstance(layer, NORMS):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    batch_norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    for norm in batch_norms:
        norm.momentum = None  # statistics of the one batch that follows
    net.train()(images)
    for norm in batch_norms:
        norm.momentum = 0.1
    head = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))][-1]
    head.weight.mul_(2 / net.eval()(images).std())
