"""Which images of a data set are out-of-distribution, by bounds where these tell, and by tau where they do not."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from openood_sandi.detectors.detector import Scores
from openood_sandi.detectors.sandi.bounds import Bounds
from openood_sandi.runs.loaders import batches_of

__all__ = ["decide"]


class _Bounding(Protocol):
    def bounds(self, x: Tensor) -> Bounds: ...

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


def decide(detector: _Bounding, source: Any, threshold: float, device: torch.device) -> Scores:
    """Decisions at ``threshold`` on all images of ``source``, with gradients only for those that bounds leave open.

    These wait until there are as many as a batch of the source has.

    Raises:
        ValueError: there are no images.
    """
    preds: list[Tensor] = []
    scores: list[Tensor] = []
    waiting: list[Tensor] = []
    places: list[Tensor] = []

    def compute() -> None:
        images, where = torch.cat(waiting), torch.cat(places)
        everything = torch.cat(scores)
        everything[where] = detector(images)[1].cpu()
        scores[:] = [everything]
        waiting.clear()
        places.clear()

    seen = 0
    for images, _ in batches_of(source):
        images = images.to(device)
        bounds = detector.bounds(images)
        preds.append(bounds.pred.cpu())
        scores.append(bounds.middle.cpu())
        rows = (~bounds.decided(threshold)).nonzero()[:, 0]
        waiting.append(images[rows])
        places.append(seen + rows.cpu())
        seen += len(images)
        if sum(map(len, waiting)) >= len(images):
            compute()
    if not preds:
        raise ValueError("there are no images to decide on")
    if any(map(len, waiting)):
        compute()
    score = torch.cat(scores)
    return Scores(torch.cat(preds).numpy(), score.numpy(), (~(score <= threshold)).numpy())
