"""The networks that are timed, and the paper's split points on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from networks.cifar import CifarResNet, WideResNet
from networks.imagenet import BitResNet, ImageNetResNet
from networks.paper import NORMS, SPLITS, Splits, norms
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """An architecture, and how the paper applies S&I to it.

    Attributes:
        title: what papers call it.
        make: from a factor, by which every number of channels is multiplied, to the network.
        image_size: height and width in pixels.
        variant: the one the paper uses for this size of label space.
        paper: where the paper splits it.
    """

    title: str
    make: Callable[[float], nn.Module]
    image_size: int
    variant: Literal["Z", "A"]
    paper: Splits

    def splits(self, net: nn.Module, preset: str) -> list[str]:
        """The ``preset`` "paper", or "norms": what ``SandI`` itself would choose, which for A is the same."""
        return norms(net) if preset == "norms" and self.variant == "Z" else self.paper.names(net)

    def build(self, width: float = 1.0, seed: int = 0) -> nn.Module:
        """The network in eval mode, in float32 on the CPU, with seeded random weights (see :func:`randomise`)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.make(width)
            randomise(net, torch.randn(8, 3, self.image_size, self.image_size))
        return net


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def cifar_resnet(*blocks: int) -> Callable[[float], nn.Module]:
    return lambda width: CifarResNet(blocks, [scaled(channels, width) for channels in (64, 128, 256, 512)])


NETWORKS: dict[str, Network] = {
    "resnet18": Network("ResNet-18", cifar_resnet(2, 2, 2, 2), 32, "Z", SPLITS["resnet18_32x32"]),
    "resnet34": Network("ResNet-34", cifar_resnet(3, 4, 6, 3), 32, "Z", SPLITS["resnet34"]),
    "wrn40-2": Network("WRN-40-2", lambda width: WideResNet(40, 2, base=scaled(16, width)), 32, "Z", SPLITS["wrn40-2"]),
    "bit-s-r101x1": Network(
        "BiT-S-R101x1",
        lambda width: BitResNet((3, 4, 23, 3), base=scaled(64, width)),
        224,
        "A",
        SPLITS["bit-s-r101x1"],
    ),
    "resnet50": Network(
        "ResNet-50",
        lambda width: ImageNetResNet((3, 4, 6, 3), base=scaled(64, width)),
        224,
        "A",
        SPLITS["resnet50"],
    ),
}


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
