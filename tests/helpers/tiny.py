"""A tiny CIFAR-100 protocol in OpenOOD's layout: generated images, a network with random weights."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

IMAGES = 2
CHECKPOINT = Path("results/cifar100_resnet18_32x32_base_e100_lr0.1_default/s0/best.ckpt")
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # OpenOOD's for CIFAR-100

#: Set: lists that it fills.
SETS = {
    "cifar100": ("train", "val", "test"),
    "cifar10": ("test",),
    "tin": ("val", "test"),
    "mnist": ("test",),
    "svhn": ("test",),
    "texture": ("test",),
    "places365": ("test",),
}
NEAR, FAR = ("cifar10", "tin"), ("mnist", "svhn", "texture", "places365")


def write_images(checkout: Path) -> None:
    """Fill ``data/`` of a checkout: smooth random images, of a coarseness of its own for each set."""
    lists = checkout / "data/benchmark_imglist/cifar100"
    lists.mkdir(parents=True)
    for index, (name, splits) in enumerate(SETS.items()):
        rng = np.random.default_rng(index)
        for split in splits:
            lines = []
            for number in range(IMAGES):
                path = Path(name, split, f"{number}.png")
                file = checkout / "data/images_classic" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                coarse = rng.integers(0, 256, (2 + 2 * index, 2 + 2 * index, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(file)
                lines.append(f"{path} {number if name == 'cifar100' else -1}\n")
            (lists / f"{split}_{name}.txt").write_text("".join(lines))


def network() -> nn.Module:
    """OpenOOD's resnet18_32x32 with random weights and 100 classes, the same at every call, in eval mode."""
    from openood.networks import ResNet18_32x32

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ResNet18_32x32(num_classes=100)
    return net.eval()


def write_checkpoint(net: nn.Module, checkout: Path) -> None:
    """Save the network where OpenOOD's download puts its own, and as those are: as if it were on a GPU."""
    path = checkout / CHECKPOINT
    path.parent.mkdir(parents=True)
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save(net.state_dict(), path)


def read_images(checkout: Path, name: str, split: str = "test") -> Tensor:
    """The images of a set (IMAGES, 3, 32, 32) as OpenOOD's test preprocessor gives them."""
    folder = checkout / "data/images_classic" / name / split
    files = [folder / f"{number}.png" for number in range(IMAGES)]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).astype(np.float32) / 255
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() - _channels(MEAN)) / _channels(STD)


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
