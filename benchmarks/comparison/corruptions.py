"""Images that are none, made of in-distribution images: far-OOD images to choose constants by, without any test set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

BLOCKS = 4
"""An image is cut into so many blocks along either side."""
Corruption = Callable[[Tensor, torch.Generator], Tensor]


def noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Independent pixels with the mean and the deviation of each channel."""
    mean, deviation = image.mean((1, 2), keepdim=True), image.std((1, 2), keepdim=True)
    return mean + deviation * torch.randn(image.shape, generator=generator)


def noisy(image: Tensor, generator: torch.Generator) -> Tensor:
    """The image under noise as strong as itself."""
    return image + image.std((1, 2), keepdim=True) * torch.randn(image.shape, generator=generator)


def permuted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Its pixels in another order."""
    order = torch.randperm(image.shape[1] * image.shape[2], generator=generator)
    return image.flatten(1)[:, order].view_as(image)


def shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    """Its blocks in another order; sides that BLOCKS does not divide lose the rest."""
    height, width = image.shape[1] // BLOCKS, image.shape[2] // BLOCKS
    blocks = image.unfold(1, height, height)[:, :BLOCKS].unfold(2, width, width)[:, :, :BLOCKS].flatten(1, 2)
    order = torch.randperm(BLOCKS * BLOCKS, generator=generator)
    square = blocks[:, order].reshape(len(image), BLOCKS, BLOCKS, height, width)
    return square.permute(0, 1, 3, 2, 4).reshape(len(image), BLOCKS * height, BLOCKS * width)


CORRUPTIONS: dict[str, Corruption] = {each.__name__: each for each in (noise, noisy, permuted, shuffled)}


class Corrupted(Dataset[tuple[Tensor, int]]):
    """The images (C, H, W) of a dataset, each corrupted by a seed of its own; their label is -1."""

    def __init__(self, dataset: Dataset[Any], corruption: Corruption) -> None:
        self._dataset, self._corruption = dataset, corruption

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # Dataset itself does not promise a length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._corruption(self._dataset[index][0], torch.Generator().manual_seed(index)), -1
