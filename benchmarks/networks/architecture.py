"""What the benchmarks know of a network beside its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from openood_sandi import named_networks
from openood_sandi.image_input import IMAGENET, Input, Normalisation

__all__ = ["IMAGENET", "Architecture", "Input", "Normalisation"]


@dataclass(frozen=True)
class Architecture(named_networks.Architecture):
    """An architecture, and what the S&I paper does with it."""

    paper_splits: Callable[[nn.Module], list[str]] = lambda _: []
    """Modules of such a network where the S&I paper splits it; none where it says nothing of its kind."""
    paper_feature: str | None = None
    """The paper's F of Eq. 12, by module name."""
