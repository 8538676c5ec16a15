"""A suite for the comparison's methods: a small network with random weights and smooth random images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from comparison.suite import ImageSet, Suite, digest
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLASSES = 7


class Stage(nn.Module):
    """A residual block: (B, in, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (residual + self.shortcut(x)).relu()


class TinyResNet(nn.Module):
    """Stages of 8, 16 and 32 channels at 16, 8 and 4 pixels; nothing but a forward method."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage3 = Stage(3, 8, 1), Stage(8, 16, 2), Stage(16, 32, 2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


def network() -> nn.Module:
    """With random weights, but as different from class to class and from feature to feature as a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyResNet()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, 0, 0.5)
                module.momentum = 1.0
        with torch.no_grad():
            net.train()(images(100, 5, 8))
            net.head.weight *= 3
    return net.eval()


def images(count: int, seed: int, coarseness: int) -> Tensor:
    """(count, 3, 16, 16), smooth."""
    noise = torch.randn(count, 3, coarseness, coarseness, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=16, mode="bicubic")


def image_set(name: str, group: Any, count: int, seed: int, coarseness: int) -> ImageSet:
    data = images(count, seed, coarseness)
    labels = torch.arange(count) % CLASSES if group == "ID" else torch.full((count,), -1)
    return ImageSet(name, group, TensorDataset(data, labels), "", digest(data, labels))


def suite(**changes: Any) -> Suite:
    """12 images a test set, 150 training and twice 20 validation images."""
    return replace(
        Suite(
            name="tiny",
            network=network(),
            network_name="tinyresnet",
            network_description="",
            weights="",
            classes=CLASSES,
            normalisation=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
            in_distribution=image_set("known", "ID", 12, 0, 4),
            out_of_distribution=(image_set("unknown", "far", 12, 1, 9),),
            training=image_set("training", "ID", 150, 2, 4),
            validation=(image_set("val", "ID", 20, 3, 4), image_set("val-ood", "near", 20, 4, 7)),
        ),
        **changes,
    )
