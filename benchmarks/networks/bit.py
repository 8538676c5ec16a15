"""BiT-S-R101x1, with the names of its published weights and normalisation apart from activation, where S&I splits it.

timm's ``resnetv2_101x1_bit`` has both in one module, whose output is no split point of the paper's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
