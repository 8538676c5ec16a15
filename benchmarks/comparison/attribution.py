"""Attribution maps (Eq. 10) at the size of the images, and the images themselves as pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi import SandI

from .suite import Suite

Floats = npt.NDArray[np.float32]


def attribution_maps(suite: Suite, images: Tensor, device: torch.device) -> dict[str, Floats]:
    """{split name: (B, H, W)} of images (B, C, H, W): magnitudes, each image's with a mean of 1.

    So every split has the same say in :func:`over_all_splits`: A_j is a sum over channels, of which later splits have
    more.
    """
    found = SandI(suite.network.to(device)).explain(images.to(device))
    return {name: _upsampled(one.cpu(), images.shape[-2:]) for name, one in found.items()}


def over_all_splits(maps: dict[str, Floats]) -> Floats:
    """(B, H, W): the mean over the splits; 1 is the image's mean."""
    total: Floats = np.mean(list(maps.values()), axis=0)
    return total


def pixels(suite: Suite, images: Tensor) -> Floats:
    """(B, H, W, 3), or (B, H, W) if grey, in 0..1, of a network's inputs (B, C, H, W)."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in suite.normalisation)
    found: Floats = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).squeeze(-1).float().numpy()
    return found


def _upsampled(found: Tensor, side: torch.Size) -> Floats:
    magnitude = found.abs().double()
    magnitude = magnitude / magnitude.mean(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    resized = F.interpolate(magnitude[:, None], size=side, mode="bilinear", align_corners=False)[:, 0]
    array: Floats = resized.float().numpy()
    return array
