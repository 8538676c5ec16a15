"""CIFAR ResNets trained on CIFAR-10, with images that it knows and textures; only some machines have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests.helpers.networks import openood_network
from tests.helpers.places import CHECKPOINTS, DATA

CHECKPOINT = CHECKPOINTS / "cifar10_resnet20.pt"
LISTS = DATA / "benchmark_imglist/cifar10"
needed = pytest.mark.skipif(
    not (CHECKPOINT.is_file() and LISTS.is_dir()),
    reason=f"needs {CHECKPOINT} and {LISTS}; OPENOOD_SANDI_DATA=FOLDER names another place, with checkpoints beside it",
)
SETS = ("test_cifar10", "test_texture")


class Block(nn.Module):
    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride, self.added = (1, 0) if before == channels else (2, channels // 4)
        self.conv1 = nn.Conv2d(before, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:  # "option A": subsampled, with channels of zeros on either side
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al., 2016, section 4.2: three stages of ``blocks`` blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def load(name: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images (count, 3, 32, 32) of a list as the network was trained on them, and their labels (count,)."""
    lines = [line.rsplit(" ", 1) for line in (LISTS / f"{name}.txt").read_text().splitlines()[:count]]
    files = [Image.open(DATA / "images_classic" / path).convert("RGB") for path, _ in lines]
    pixels = np.stack([np.asarray(file.resize((32, 32), Image.Resampling.BILINEAR)) for file in files])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.tensor([int(label) for _, label in lines])


def network(depth: int = 20) -> nn.Module:
    """The trained ResNet of 20 or 56 layers, in eval mode."""
    net = CifarResNet((depth - 2) // 6).eval()
    net.load_state_dict(torch.load(CHECKPOINTS / f"cifar10_resnet{depth}.pt", weights_only=True))
    return net


def resnet18() -> nn.Module:
    """OpenOOD's resnet18_32x32, trained on CIFAR-100 on images of another normalisation, which does no harm here."""
    net: nn.Module = openood_network("resnet18_32x32").ResNet18_32x32(num_classes=100).eval()
    net.load_state_dict(torch.load(CHECKPOINTS / "cifar100_resnet18_32x32.pt", weights_only=True))
    return net
