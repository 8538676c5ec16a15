"""The three architectures that the parity files describe, each built from the shapes of the weights it is to load."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def network_of(weights: Weights) -> nn.Module:
    """The network these weights belong to, loaded, in eval mode, frozen, in the weights' dtype."""
    if "root.conv.weight" in weights:
        net: nn.Module = BiT(weights)
    elif "block1.layer.0.conv1.weight" in weights:
        net = WideResNet(weights)
    elif "layer1.0.conv1.weight" in weights:
        net = ResNet(weights)
    else:
        raise ValueError(f"weights of none of the three parity architectures: {sorted(weights)[:5]} ...")
    net.load_state_dict(dict(weights))
    return net.to(next(iter(weights.values())).dtype).eval().requires_grad_(False)


def width(weights: Weights, layer: str) -> int:
    return weights[f"{layer}.weight"].shape[0]


def repeats(weights: Weights, pattern: str, first: int = 0) -> int:
    """How many of pattern.format(first), pattern.format(first + 1), ... there are."""
    number = 0
    while f"{pattern.format(first + number)}.weight" in weights:
        number += 1
    return number


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != planes:
            self.shortcut = nn.Sequential(conv(inputs, planes, 1, stride), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet-34 and kin; ``avg_pool`` is a module so that the pooled feature has a name."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        inputs = width(weights, "conv1")
        self.conv1, self.bn1 = conv(3, inputs, 3), nn.BatchNorm2d(inputs)
        for stage in range(1, 5):
            planes = width(weights, f"layer{stage}.0.conv1")
            blocks = nn.Sequential()
            for number in range(repeats(weights, f"layer{stage}.{{}}.conv1")):
                blocks.append(BasicBlock(inputs, planes, stride=2 if stage > 1 and number == 0 else 1))
                inputs = planes
            self.add_module(f"layer{stage}", blocks)
        self.avg_pool = nn.AvgPool2d(4)
        self.linear = nn.Linear(inputs, width(weights, "linear"))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(self.avg_pool(out).flatten(1))


class PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = (
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            conv(inputs, outputs, 3, stride),
        )
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), conv(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(out)
        return skip + self.conv2(self.relu2(self.bn2(self.conv1(out))))


class WideResNetStage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        inputs = width(weights, "conv1")
        self.conv1 = conv(3, inputs, 3)
        for stage in range(1, 4):
            outputs = width(weights, f"block{stage}.layer.0.conv1")
            blocks = []
            for number in range(repeats(weights, f"block{stage}.layer.{{}}.conv1")):
                blocks.append(PreActivationBlock(inputs, outputs, stride=2 if stage > 1 and number == 0 else 1))
                inputs = outputs
            self.add_module(f"block{stage}", WideResNetStage(*blocks))
        self.bn1, self.relu, self.AdaptAvgPool = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, width(weights, "fc"))

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.AdaptAvgPool(self.relu(self.bn1(out))).flatten(1))


class StandardisedConv(nn.Conv2d):
    """Convolution whose kernels have zero mean and unit variance (Kolesnikov et al. 2020, BiT)."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-10).sqrt(), self.bias, self.stride, self.padding)


def standardised(inputs: int, outputs: int, kernel: int, stride: int = 1) -> StandardisedConv:
    return StandardisedConv(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.gn1, self.conv1 = nn.GroupNorm(groups, inputs), standardised(inputs, middle, 1)
        self.gn2, self.conv2 = nn.GroupNorm(groups, middle), standardised(middle, middle, 3, stride)
        self.gn3, self.conv3 = nn.GroupNorm(groups, middle), standardised(middle, outputs, 1)
        self.relu = nn.ReLU(inplace=True)
        projected = stride != 1 or inputs != outputs
        self.downsample = standardised(inputs, outputs, 1, stride) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.gn1(x))
        skip = x if self.downsample is None else self.downsample(out)
        out = self.conv2(self.relu(self.gn2(self.conv1(out))))
        return self.conv3(self.relu(self.gn3(out))) + skip


class BiT(nn.Module):
    def __init__(self, weights: Weights, groups: int = 4) -> None:
        super().__init__()
        inputs = width(weights, "root.conv")
        # Padding by zeros before an unpadded max-pool is not max-pool's own padding (minus infinity).
        root = [
            ("conv", standardised(3, inputs, 7, 2)),
            ("pad", nn.ConstantPad2d(1, 0.0)),
            ("pool", nn.MaxPool2d(3, 2)),
        ]
        self.root = nn.Sequential(OrderedDict(root))
        self.body = nn.Sequential()
        for stage in range(1, 1 + repeats(weights, "body.block{}.unit01.conv1", first=1)):
            block = f"body.block{stage}"
            units = nn.Sequential()
            middle, outputs = width(weights, f"{block}.unit01.conv1"), width(weights, f"{block}.unit01.conv3")
            for number in range(1, 1 + repeats(weights, f"{block}.unit{{:02d}}.conv1", first=1)):
                stride = 2 if stage > 1 and number == 1 else 1
                units.add_module(f"unit{number:02d}", Bottleneck(inputs, middle, outputs, stride, groups))
                inputs = outputs
            self.body.add_module(f"block{stage}", units)
        before_head = [
            ("gn", nn.GroupNorm(groups, inputs)),
            ("relu", nn.ReLU(inplace=True)),
            ("avg", nn.AdaptiveAvgPool2d(1)),
        ]
        self.before_head = nn.Sequential(OrderedDict(before_head))
        self.head = nn.Sequential(OrderedDict(conv=nn.Conv2d(inputs, width(weights, "head.conv"), 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.before_head(self.body(self.root(x))))[..., 0, 0]
