"""Networks for images of 32 pixels: CIFAR ResNets and wide residual networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)): (B, in, H, W) -> (B, out, H/stride, W/stride).

    Where the shape changes, the shortcut is a normalised 1x1 convolution or, ``padded``, has no parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, padded: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride == 1 and in_channels == out_channels:
            return
        if padded:
            self.shortcut = PaddedShortcut(out_channels - in_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(residual + self.shortcut(x))
        return out


class PaddedShortcut(nn.Module):
    """He et al.'s "option A": every ``stride``-th pixel, and channels of zeros, half of them on either side."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added, self.stride = added, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class CifarResNet(nn.Module):
    """Residual networks with the stem for small images: a 3x3 convolution of stride 1 and no max-pool.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. ResNet-18 (``blocks`` 2, 2, 2, 2) and
    ResNet-34 (3, 4, 6, 3) have the default widths; those of section 4.2, ResNet-20 (3, 3, 3) and ResNet-56 (9, 9, 9),
    are 16, 32 and 64 wide with ``padded`` shortcuts. Every stage but the first halves H and W:
    (B, in_channels, H, W) -> (B, classes).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        classes: int = 100,
        padded: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        channels = widths[0]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.stages = len(blocks)
        for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layers = nn.Sequential()
            for number in range(depth):
                layers.append(ResidualBlock(channels, width, 2 if stage > 1 and number == 0 else 1, padded))
                channels = width
            self.add_module(f"layer{stage}", layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class PreActivationBlock(nn.Module):
    """conv(relu(norm(conv(relu(norm(x)))))) + x; where the shape changes, x is convolved behind the first relu."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out_channels), nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return residual + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """WRN-40-2 (``depth`` 40, ``widen`` 2): Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.

    (B, 3, H, W) -> (B, classes); three stages of (depth - 4) / 6 pre-activation blocks. ``base`` is the width of the
    first convolution.
    """

    def __init__(self, depth: int, widen: int, base: int = 16, classes: int = 100) -> None:
        super().__init__()
        channels = base
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for stage, width in enumerate((widen * base, 2 * widen * base, 4 * widen * base), 1):
            blocks = nn.Sequential()
            for number in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(channels, width, stride=2 if stage > 1 and number == 0 else 1))
                channels = width
            self.add_module(f"block{stage}", nn.Sequential(OrderedDict(layer=blocks)))
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in (1, 2, 3):
            x = self.get_submodule(f"block{stage}")(x)
        logits: Tensor = self.fc(self.avgpool(self.relu(self.bn1(x))).flatten(1))
        return logits
