"""Attribution maps of Eq. 10 as pictures beside the images that they explain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.runs.loaders import Folder

__all__ = ["heat_map", "write_heat_maps"]


def heat_map(detector: Any, image: Tensor) -> Tensor:
    """Where the attributions of an image (C, H, W) lie, over all splits, (H, W) from 0 to 1.

    Each split's map counts in units of its own largest magnitude.
    """
    total = torch.zeros(image.shape[1:], device=image.device)
    for found in detector.explain(image[None]).values():
        magnitude = F.interpolate(found.abs().float()[:, None], size=total.shape, mode="bilinear")[0, 0]
        total += magnitude / magnitude.max().clamp_min(torch.finfo(torch.float32).tiny)
    return total / total.max().clamp_min(torch.finfo(torch.float32).tiny)


def write_heat_maps(
    detector: Any, images: Folder, numbers: Sequence[int], root: Path, into: Path, device: torch.device
) -> None:
    """A PNG of each image, white where attributions are largest, at the same path below ``into``."""
    from PIL import Image

    for number in numbers:
        picture = (heat_map(detector, images[number][0].to(device)) * 255).byte().cpu().numpy()
        file = into / images.files[number].relative_to(root.expanduser())
        file = file.with_name(f"{file.name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
