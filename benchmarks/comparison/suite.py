"""What one ``--data`` name stands for: a trained network, its in-distribution test set and the OOD sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset


@dataclass(frozen=True)
class ImageSet:
    """A named, sized dataset of (image, label).

    An image is (C, H, W) float32 as the network takes it; a label is an int64 scalar, -1 if OOD.
    """

    name: str
    group: Literal["ID", "near", "far"]
    dataset: Dataset[Any]
    description: str

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # Dataset itself does not promise a length

    def first(self, limit: int | None) -> ImageSet:
        """The set's first ``limit`` images; all of them if ``limit`` is None or larger than the set."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, dataset=Subset(self.dataset, range(limit)))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,) in the set's order, on the CPU."""
        return iter(DataLoader(self.dataset, batch_size=batch_size))


@dataclass(frozen=True)
class Suite:
    """One comparison: ``network``, in eval mode, was trained on the classes of ``in_distribution``."""

    name: str
    network: nn.Module
    network_description: str
    in_distribution: ImageSet
    out_of_distribution: tuple[ImageSet, ...]

    def first(self, limit: int | None) -> Suite:
        """The suite with every set cut to its first ``limit`` images."""
        return replace(
            self,
            in_distribution=self.in_distribution.first(limit),
            out_of_distribution=tuple(images.first(limit) for images in self.out_of_distribution),
        )
