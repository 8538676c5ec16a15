"""Networks for ImageNet: ResNet-50 and BiT-S-R101x1."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """relu(residual(x) + downsample(x)) with 1x1, 3x3 and 1x1 convolutions; the 3x3 one carries the stride."""

    def __init__(self, in_channels: int, middle: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out: Tensor = self.relu(self.bn3(self.conv3(residual)) + self.downsample(x))
        return out


class ImageNetResNet(nn.Module):
    """ResNet-50 (``blocks`` 3, 4, 6, 3): He et al., CVPR 2016, with the stride in the 3x3 convolutions ("v1.5").

    (B, 3, H, W) -> (B, classes); ``base`` is the width of the stem.
    """

    def __init__(self, blocks: Sequence[int], base: int = 64, classes: int = 1000) -> None:
        super().__init__()
        channels = base
        self.conv1, self.bn1 = nn.Conv2d(3, base, 7, 2, padding=3, bias=False), nn.BatchNorm2d(base)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.stages = len(blocks)
        for stage, depth in enumerate(blocks):
            middle, width = base << stage, 4 * base << stage
            layers = nn.Sequential()
            for number in range(depth):
                layers.append(Bottleneck(channels, middle, width, stride=2 if stage and number == 0 else 1))
                channels = width
            self.add_module(f"layer{stage + 1}", layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class StdConv2d(nn.Conv2d):
    """Convolution by kernels standardised to mean 0 and variance 1 (Qiao et al., "Weight Standardization", 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) * (variance + 1e-10).rsqrt(), self.bias, self.stride, self.padding)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as divide the channels of a network made narrower."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class PreActivationBottleneck(nn.Module):
    """conv(relu(norm(.))) three times, plus x; where the shape changes, x is convolved behind the first relu."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        middle = out_channels // 4
        self.gn1, self.conv1 = group_norm(in_channels), StdConv2d(in_channels, middle, 1, bias=False)
        self.gn2, self.conv2 = group_norm(middle), StdConv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.gn3, self.conv3 = group_norm(middle), StdConv2d(middle, out_channels, 1, bias=False)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = StdConv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.gn1(x))
        residual = self.conv2(self.relu(self.gn2(self.conv1(active))))
        residual = self.conv3(self.relu(self.gn3(residual)))
        out: Tensor = residual + (x if self.downsample is None else self.downsample(active))
        return out


class BitResNet(nn.Module):
    """BiT-S-R101x1 (``blocks`` 3, 4, 23, 3): a ResNetV2 with group norms and standardised convolutions.

    Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", ECCV 2020.
    (B, 3, H, W) -> (B, classes); ``base`` is the width of the stem.
    """

    def __init__(self, blocks: Sequence[int], base: int = 64, classes: int = 1000) -> None:
        super().__init__()
        channels = base
        # A max-pool padded by zeros is not one padded by its own minus infinity.
        self.root = nn.Sequential(
            OrderedDict(
                conv=StdConv2d(3, base, 7, 2, padding=3, bias=False),
                pad=nn.ConstantPad2d(1, 0.0),
                pool=nn.MaxPool2d(3, 2),
            )
        )
        self.body = nn.Sequential()
        for stage, depth in enumerate(blocks):
            units = nn.Sequential()
            for number in range(depth):
                width = 4 * base << stage
                unit = PreActivationBottleneck(channels, width, stride=2 if stage and number == 0 else 1)
                units.add_module(f"unit{number + 1:02d}", unit)
                channels = width
            self.body.add_module(f"block{stage + 1}", units)
        self.before_head = nn.Sequential(
            OrderedDict(gn=group_norm(channels), relu=nn.ReLU(), avg=nn.AdaptiveAvgPool2d(1))
        )
        self.head = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, classes, 1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.before_head(self.body(self.root(x))))
        return logits.flatten(1)
