"""MobileNetV2 with its batch norms folded into the convolutions, as published weights for integer arithmetic have it.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

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
