"""Which images of a data set are out-of-distribution, by bounds where these tell, and by tau where they do not."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from openood_sandi.detectors.detector import Scores
from openood_sandi.detectors.sandi.bounds import Bounds
from openood_sandi.engine.devices import fetch, take
from openood_sandi.runs.loaders import batches_of

__all__ = ["decide", "is_ood"]


class _Bounding(Protocol):
    def bounds(self, x: Tensor) -> Bounds: ...

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


def is_ood(detector: _Bounding, x: Tensor, threshold: float, hard: bool) -> Tensor:
    """Whether tau of images ``x`` (B, C, H, W) exceeds ``threshold``, (B,) bool; see :meth:`Bounds.decided`."""
    bounds = detector.bounds(x)
    tau = bounds.high.clone()
    rows = (~bounds.decided(threshold, hard)).nonzero()[:, 0]
    if len(rows):
        tau[rows] = detector(x[rows])[1]
    return ~(tau <= threshold)


def decide(detector: _Bounding, source: Any, threshold: float, device: torch.device, hard: bool = True) -> Scores:
    """Decisions at ``threshold`` on all images of ``source``, with gradients only for those that bounds leave open.

    These wait until there are as many as a batch of the source has. ``hard`` is that of :meth:`Bounds.decided`.

    Raises:
        ValueError: there are no images.
    """
    preds: list[Tensor] = []
    scores: list[Tensor] = []
    open_ = _Waiting(detector)
    for images, _ in batches_of(source):
        images = images.to(device, non_blocking=True)
        bounds = detector.bounds(images)
        pred, score, decided = fetch(bounds.pred, bounds.middle, bounds.decided(threshold, hard))
        preds.append(pred)
        scores.append(score)
        rows = (~decided).nonzero()[:, 0].tolist()
        open_.add(take(images, rows), [(score, row) for row in rows])
        if len(open_.places) >= len(images):
            open_.compute()
    if not preds:
        raise ValueError("there are no images to decide on")
    open_.compute()
    every = torch.cat(scores)
    return Scores(torch.cat(preds).numpy(), every.numpy(), (~(every <= threshold)).numpy())


class _Waiting:
    """Images that bounds leave open, until they are computed."""

    def __init__(self, detector: _Bounding) -> None:
        self._detector = detector
        self._images: list[Tensor] = []
        self.places: list[tuple[Tensor, int]] = []
        """For each image the scores of its batch, and which of them is its own."""

    def add(self, images: Tensor, places: list[tuple[Tensor, int]]) -> None:
        self._images.append(images)
        self.places += places

    def compute(self) -> None:
        """Puts tau where the middle of its bounds is."""
        if self.places:
            tau = self._detector(torch.cat(self._images))[1].cpu()
            for (scores, row), score in zip(self.places, tau, strict=True):
                scores[row] = score
        self._images, self.places = [], []
