"""S&I-C fitted to and scoring what one pass over images has told of them, again and again without another pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from openood_sandi import SandIC
from openood_sandi.detectors.sandi.activation_stages import Stages
from openood_sandi.detectors.sandi.calibrated_summary import Summaries, Summary

from .console import progress

__all__ = ["FromSummaries", "rows"]


class FromSummaries(SandIC):
    """S&I-C of a network ``net`` whose activations are found on ``x`` (B, C, H, W)."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self._known = Summaries(net, x, Stages("last_3"))
        super().__init__(net)

    def _start(self) -> None:
        super()._start()
        self._summaries = self._known

    def read(self, loader: DataLoader[Any], title: str) -> tuple[Summary, Tensor]:
        """What a pass tells of images and their labels (N,), Z included."""
        batches = [(self._known(x), y) for x, y in progress(loader, title, "batches")]
        summary = Summary(*map(torch.cat, zip(*(found for found, _ in batches), strict=True)))
        return summary, torch.cat([labels for _, labels in batches])

    def fit_to(self, train: Summary, labels: Tensor, held: Summary) -> FromSummaries:
        """Prototypes of training images with ``labels`` (N,), means and deviations of the images ``held`` out."""
        self._start()
        self._found_values: dict[int, tuple[Summary, dict[str, Tensor]]] = {}
        self._learn(train, labels)
        self._settle(held)
        return self

    def _values(self, summary: Summary) -> dict[str, Tensor]:
        """Computed once for each summary and fit, as most options only change what is made of them."""
        if id(summary) not in self._found_values:
            self._found_values[id(summary)] = summary, super()._values(summary)
        return self._found_values[id(summary)][1]

    def scores(self, summary: Summary) -> npt.NDArray[np.float64]:
        """(N,), larger for OOD."""
        return self._scored(summary).numpy()


def rows(summary: Summary, chosen: Tensor | slice) -> Summary:
    """Those of some images."""
    return Summary(*(part[chosen] for part in summary))
