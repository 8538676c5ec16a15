"""Attribution maps, Eq. 10 of the S&I paper, over example images, as its Figure 2 shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
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
    known, unknown = suite.in_distribution, _spread(suite.out_of_distribution, ROOM)
    images = torch.cat([_examples(known, EXAMPLES), *(_examples(one, 1) for one in unknown)])
    labels = [f"{known.name}\n(ID)"] * EXAMPLES + [f"{one.name}\n({one.group}-OOD)" for one in unknown]
    found = SandI(suite.network.to(device)).explain(images.to(device))
    maps = {name: _upsampled(one.cpu(), images.shape[-2:]) for name, one in found.items()}
    columns = {name: maps[name] for name in _spread(list(maps), SPLITS)}
    columns[f"all {len(maps)} splits"] = torch.stack(list(maps.values())).sum(0)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in suite.normalisation)
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).squeeze(-1).float().numpy()

    height, width = len(images), 1 + len(columns)
    figure = Figure(figsize=(0.4 + 1.05 * width, 0.3 + 1.05 * height), dpi=100, layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    for row, label in enumerate(labels):
        panels[row, 0].imshow(pixels[row], cmap="gray", vmin=0, vmax=1)
        panels[row, 0].set_ylabel(label, fontsize=8)
        for panel, one in zip(panels[row, 1:], columns.values(), strict=True):
            panel.imshow(one[row].numpy(), cmap="inferno", vmin=0, vmax=max(float(one[row].max()), 1e-12))
    for panel, name in zip(panels[0], ("image", *columns), strict=True):
        panel.set_title(name, fontsize=8)
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
