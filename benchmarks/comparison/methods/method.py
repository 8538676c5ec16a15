"""What a method is to the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..suite import Suite

Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, C, H, W) on the device to predicted classes (B,) and scores (B,); a larger score means "more OOD"."""

Library = Literal["OpenOOD", "pytorch-ood", "openood-sandi"]

Offer = tuple[dict[str, "Method"], dict[str, str]]
"""Methods by name, and by name the reason why a method cannot run."""


@dataclass(frozen=True)
class Method:
    """A detector with its options, not yet bound to a network."""

    name: str
    """On the command line: "ebo", "sandi-z"."""
    title: str
    """In tables: "energy", "S&I-Z"."""
    source: Library
    """Whose code computes the scores."""
    options: Mapping[str, object]
    """All that decides the scores beside the network and the images scored."""
    build: Callable[[Suite, torch.device, int], Scorer]
    """Binds it to the suite's network on a device. It may take as long as passes over training or validation images,
    in batches of the size given."""
    first: bool = False
    """Whether it is scored before the others, which then need no pass of their own."""
