"""Small data, a scorer that remembers its calls, and what counts as the same result, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import score_dataset

IMAGES, BATCH = 37, 4  # the last batch has one image
KEY = {"method": "linear", "weights": "0" * 64}


def images(count: int = IMAGES) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(count))


def loader(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(images() if dataset is None else dataset, **{"batch_size": BATCH, **options})


def network() -> nn.Module:
    """With normalisation layers and rectifiers, so that S&I takes its shortcuts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


class Linear:
    """A quick scorer; ``seen`` has the label-like first pixel of the first image of every batch it was given."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.weight = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(2))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(float(x[0, 0, 0, 0]))
        logits = x.flatten(1) @ self.weight
        return logits.argmax(1), -logits.logsumexp(1)

    def batches(self) -> list[int]:
        """The numbers of the batches of :func:`loader` that were scored."""
        first = images().tensors[0][::BATCH, 0, 0, 0].tolist()
        return [first.index(pixel) for pixel in self.seen]

    def after_the_canary(self, rest: list[int]) -> bool:
        """Whether ``rest`` was scored, and ahead of it the first batch and one that was known, drawn at random."""
        batches = self.batches()
        ahead = batches[: len(batches) - len(rest)]
        return batches == ahead + rest and ahead[:1] == [0] and len(ahead) <= 2 and not {*ahead[1:]} & {*rest}


def run(score: Any, folder: Path | None = None, data: Any = None, seconds: float = 10.0, **options: Any) -> Any:
    if folder is not None:
        options = {"cache": ScoreCache(folder, seconds), "key": KEY, **options}
    return score_dataset(score, loader() if data is None else data, "cpu", **{"progress": False, **options})


def as_bytes(result: Any) -> list[tuple[str, bytes]]:
    """Arrays by dtype and bytes: ``==`` of two of these is equality of every bit."""
    return [(array.dtype.str, np.ascontiguousarray(array).tobytes()) for array in result]
