"""Attribution maps, Eq. 10 of the S&I paper, over example images, as its Figure 2 shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from openood_sandi import SandI

from .files import save_figure
from .suite import ImageSet, Suite

T = TypeVar("T")
EXAMPLES = 2
"""ID images that are shown; of an OOD set one is."""
SPLITS = 4
"""Splits that are shown, evenly spread over the network."""
ROOM = 5
"""OOD sets that are shown at most, evenly chosen."""


def draw(path: Path, suite: Suite, device: torch.device) -> Path:
    """Images, the maps of some splits, and the sum over all splits: a row for each image, ID first."""
    sets = [suite.in_distribution] * EXAMPLES + _spread(suite.out_of_distribution, ROOM)
    examples = [_examples(suite.in_distribution, EXAMPLES), *(_examples(images, 1) for images in sets[EXAMPLES:])]
    images = torch.cat(examples)
    detector = SandI(suite.network.to(device))
    maps = {name: found.cpu() for name, found in detector.explain(images.to(device)).items()}
    side = images.shape[-2:]
    names = _spread(list(maps), SPLITS)
    columns = {name: _upsampled(maps[name], side) for name in names}
    columns[f"all {len(maps)} splits"] = torch.stack([_upsampled(found, side) for found in maps.values()]).sum(0)
    pixels = _pixels(images, suite)

    height, width = len(images), 1 + len(columns)
    figure = Figure(figsize=(0.4 + 1.05 * width, 0.3 + 1.05 * height), dpi=100, layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    labels = [f"{images.name}\n({images.group if images.group == 'ID' else images.group + '-OOD'})" for images in sets]
    for row, (panel, label) in enumerate(zip(panels[:, 0], labels, strict=True)):
        panel.imshow(pixels[row], cmap="gray", vmin=0, vmax=1)
        panel.set_ylabel(label, fontsize=8)
    for at, (name, found) in enumerate(columns.items(), 1):
        panels[0, at].set_title(name, fontsize=8)
        for row in range(height):
            panels[row, at].imshow(found[row].numpy(), cmap="inferno", vmin=0, vmax=max(float(found[row].max()), 1e-12))
    panels[0, 0].set_title("image", fontsize=8)
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
    return save_figure(figure, path)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items at even distances, first and last among them; all if there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[int(at)] for at in np.linspace(0, len(items) - 1, count).round()]


def _examples(images: ImageSet, count: int) -> Tensor:
    """(count, C, H, W), evenly spread over the set, as sets are often sorted."""
    places = np.linspace(0, len(images) - 1, count + 2).round()[1:-1]
    return torch.stack([images.dataset[int(at)][0] for at in places])


def _upsampled(found: Tensor, side: torch.Size) -> Tensor:
    """Magnitudes of a split's maps (B, R, S) at the size of the images, each image's with a mean of 1.

    So every split has the same say in the sum: A_j is a sum over channels, of which later splits have more.
    """
    magnitude = found.abs().double()
    magnitude = magnitude / magnitude.mean(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    return F.interpolate(magnitude[:, None], size=side, mode="bilinear", align_corners=False)[:, 0]


def _pixels(images: Tensor, suite: Suite) -> npt.NDArray[np.float32]:
    """Network inputs (B, C, H, W) back as pixels in 0..1: (B, H, W, C), of one channel (B, H, W)."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in suite.normalisation)
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    shown: npt.NDArray[np.float32] = (pixels[..., 0] if pixels.shape[-1] == 1 else pixels).float().numpy()
    return shown
