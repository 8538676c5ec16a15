"""Networks for ImageNet: BiT-S-R101x1, and MobileNetV2 with its batch norms folded into the convolutions.

BiT (Kolesnikov et al., ECCV 2020) has the module names of its published weights, and normalisation apart from
activation, where S&I splits it: in timm's ``resnetv2_101x1_bit`` one module does both. MobileNetV2 (Sandler et al.,
CVPR 2018, table 2) is as published weights for integer arithmetic have it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
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


# Expansion, channels, blocks, stride of the first block.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280  # channels


class Convolution(nn.Sequential):
    """A convolution with bias, and ReLU6 unless ``linear``: (B, in, H, W) -> (B, out, H/stride, W/stride), H, W even.

    At stride 2 only the right and the lower edge are padded, as TensorFlow does, whose weights these are.
    """

    def __init__(
        self, before: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        if stride == 2:
            self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(before, channels, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)
        if not linear:
            self.relu = nn.ReLU6()


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; plus x where the shape is kept."""

    def __init__(self, before: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        middle = expansion * before
        self.layers = nn.Sequential()
        if expansion > 1:
            self.layers.append(Convolution(before, middle))
        self.layers.append(Convolution(middle, middle, 3, stride, groups=middle))
        self.layers.append(Convolution(middle, channels, linear=True))
        self.kept = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.kept else out


class MobileNetV2(nn.Module):
    """Width 1.0: (B, 3, H, W) -> (B, classes); H and W are multiples of 32."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        channels = STEM
        self.features = nn.Sequential(Convolution(3, channels, 3, stride=2))
        for expansion, width, blocks, stride in STAGES:
            for number in range(blocks):
                self.features.append(InvertedResidual(channels, width, expansion, 1 if number else stride))
                channels = width
        self.features.append(Convolution(channels, LAST))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(LAST, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def dequantised(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Tensor]:
    """A state dict from arrays ``w<k>``, ``s<k>``, ``b<k>``: integers, their scale, and the bias of convolution k.

    k counts in the order of execution; the last is the classifier, whose class 0, "background", is left out.
    """
    with torch.device("meta"):
        layers = [name for name, module in MobileNetV2().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    state = {}
    for k, layer in enumerate(layers):
        state[f"{layer}.weight"] = torch.from_numpy(arrays[f"w{k}"].astype(np.float32) * np.float32(arrays[f"s{k}"]))
        state[f"{layer}.bias"] = torch.from_numpy(arrays[f"b{k}"].astype(np.float32))
    state["classifier.weight"] = state["classifier.weight"].flatten(1)[1:]
    state["classifier.bias"] = state["classifier.bias"][1:]
    return state
