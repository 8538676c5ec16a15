"""What images a network takes: resized, cropped and normalised, as its weights were trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["IMAGENET", "Input", "Normalisation"]

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in 0..1, by channel."""
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Input:
    """What a network takes: an image resized, cropped at its centre, and normalised.

    Called with an image of Pillow's in RGB it gives the tensor (3, crop, crop), float32, as torchvision's resize,
    centre crop and normalisation do to the bit.
    """

    resize: int | tuple[int, int]
    """Pixels of the shorter side; or height and width, which squeezes the image."""
    crop: int
    """Pixels of either side."""
    normalisation: Normalisation | None = None
    """None: that of the data set trained on, which is to be put in before an image comes."""
    interpolation: str = "bilinear"
    """"nearest", "bilinear", "bicubic" or another of Pillow's."""

    def __call__(self, image: Any) -> Tensor:
        from PIL import Image

        if self.normalisation is None:
            raise ValueError("the mean and standard deviation of pixels are not known; give them as normalisation")
        if isinstance(self.resize, tuple):
            size = self.resize[1], self.resize[0]
        else:
            shorter = min(image.size)
            size = self.resize * image.size[0] // shorter, self.resize * image.size[1] // shorter
        image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = (round((side - self.crop) / 2) for side in size)  # as torchvision rounds
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)), dtype=np.float32) / 255
        mean, std = map(torch.tensor, self.normalisation)
        return ((torch.from_numpy(pixels) - mean) / std).permute(2, 0, 1).contiguous()
