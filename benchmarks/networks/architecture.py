"""What the benchmarks know of a network beside its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in 0..1, by channel."""
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Input:
    """What a network takes: an image resized, cropped at its centre, and normalised."""

    resize: int | tuple[int, int]
    """Pixels of the shorter side; or height and width, which squeezes the image."""
    crop: int
    """Pixels of either side."""
    normalisation: Normalisation | None = None
    """None: that of the data set trained on."""
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Architecture:
    """What papers call a network, a function of the number of classes, and the input that it was trained on."""

    title: str
    make: Callable[[int], nn.Module]
    input: Input | None
    """None: the data set's."""
    paper_splits: Callable[[nn.Module], list[str]] = lambda _: []
    """Modules of such a network where the S&I paper splits it; none where it says nothing of its kind."""
    paper_feature: str | None = None
    """The paper's F of Eq. 12, by module name."""
    ready: bool = False
    """Whether ``make`` gives trained weights, if no checkpoint gives others."""
