"""Networks for images of 32 pixels: CIFAR ResNets and wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence

from comparison.small_resnet import ResidualBlock
from torch import Tensor, nn


class CifarResNet(nn.Module):
    """ResNet-18 (``blocks`` 2, 2, 2, 2) and ResNet-34 (3, 4, 6, 3) with the stem for small images.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; a 3x3 convolution of stride 1 and no max-pool
    in front. (B, 3, H, W) -> (B, classes).
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int] = (64, 128, 256, 512), classes: int = 100) -> None:
        super().__init__()
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.stages = len(blocks)
        for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layers = nn.Sequential()
            for number in range(depth):
                layers.append(ResidualBlock(channels, width, stride=2 if stage > 1 and number == 0 else 1))
                channels = width
            self.add_module(f"layer{stage}", layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits


class PreActivationBlock(nn.Module):
    """conv(relu(norm(conv(relu(norm(x)))))) + x; where the shape changes, x is convolved behind the first relu."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out_channels), nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-40-2 (``depth`` 40, ``widen`` 2): Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.

    (B, 3, H, W) -> (B, classes); three stages of (depth - 4) / 6 pre-activation blocks. ``base`` is the width of the
    first convolution.
    """

    def __init__(self, depth: int, widen: int, base: int = 16, classes: int = 100) -> None:
        super().__init__()
        channels = base
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        for stage, width in enumerate((widen * base, 2 * widen * base, 4 * widen * base)):
            blocks = nn.Sequential()
            for number in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(channels, width, stride=2 if stage and number == 0 else 1))
                channels = width
            self.stages.append(blocks)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.stages(self.conv1(x))))
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits
