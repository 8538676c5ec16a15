"""Prototypes of activation shares: P_cj, the unit vector along the mean over training images of class c of E_j / |E_j|.

Sums are taken in float64, a row for each class and one for images without a label, so that the order of the images does
not matter and memory holds no features. Where fewer than half of the classes have enough images, all of them together
make one prototype a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.engine.devices import add_rows

__all__ = ["ENOUGH", "ShareSums", "distance"]

ENOUGH = 5
"""Images that at least half of the classes must have for prototypes by class."""

_log = logging.getLogger(__name__)


class ShareSums:
    """Sums over training images so far.

    Args:
        classes: C, how many the network tells apart.
    """

    def __init__(self, classes: int) -> None:
        self._sums: list[Tensor] = []
        self._images = torch.zeros(classes + 1, dtype=torch.int64)

    @property
    def images(self) -> int:
        """How many images there were."""
        return int(self._images.sum())

    def add(self, shares: Sequence[Tensor], labels: Tensor | None) -> None:
        """Take in E_j, (B, K_j) for each layer, of images with labels (B,), None or negative where there is none.

        Raises:
            ValueError: a label is of no class of the network.
        """
        unlabelled = len(self._images) - 1
        rows = torch.full((len(shares[0]),), unlabelled) if labels is None else labels.long().cpu()
        if len(rows) and int(rows.max()) > unlabelled - (labels is not None):
            raise ValueError(
                f"a label is {int(rows.max())} and the network has {unlabelled} classes: expected 0 to "
                f"{unlabelled - 1}, or -1 for images without a label"
            )
        rows = torch.where(rows < 0, unlabelled, rows)
        self._images += torch.bincount(rows, minlength=len(self._images))
        self._sums = self._sums or [e.new_zeros(len(self._images), e.shape[1], dtype=torch.double) for e in shares]
        rows = rows.to(shares[0].device, non_blocking=True)
        for total, e in zip(self._sums, shares, strict=True):
            add_rows(total, rows, F.normalize(e.double(), dim=1))

    def prototypes(self) -> list[Tensor]:
        """(P, K_j) for each layer on the CPU: a row for each class with images, or one in all.

        Raises:
            ValueError: there are no images.
        """
        if not self.images:
            raise ValueError("no training images: expected some that the network was trained on, to fit prototypes to")
        seen, every = self._images[:-1] > 0, len(self._images) - 1
        enough = int((self._images[:-1] >= ENOUGH).sum())
        if 2 * enough < every or every < 2:
            _log.warning(
                "one prototype a layer: %d of %d classes have %d labelled images or more, and at least half should",
                *(enough, every, ENOUGH),
            )
            return [F.normalize(total.sum(0, keepdim=True), dim=1).cpu() for total in self._sums]
        if not seen.all():
            absent = (~seen).nonzero().flatten().tolist()
            _log.warning("no prototype of %d classes without images: %s", len(absent), _few(absent))
        return [F.normalize(total.cpu()[:-1][seen], dim=1) for total in self._sums]


def distance(shares: Sequence[Tensor], prototypes: Sequence[Tensor]) -> Tensor:
    """D = - sum_j max_c cos(E_j, P_cj), (B,) in float64, from (B, K_j) and (P, K_j) for each layer, on one device."""
    cosines = [F.normalize(e.double(), dim=1) @ p.T for e, p in zip(shares, prototypes, strict=True)]
    return -torch.stack([cosine.amax(1) for cosine in cosines]).sum(0)


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
