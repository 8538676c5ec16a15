"""A long run: tens of thousands of images through a detector, and nothing piles up."""

from __future__ import annotations

import gc
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from openood_sandi import SandI, score_dataset
from openood_sandi.runs.cache import ScoreCache

IMAGES = int(os.environ.get("OPENOOD_SANDI_SOAK_IMAGES", "40000"))
DIFFERENT = 700  # images: a batch ends within a round
BATCH = 100
SETTLED = 0.1  # of the run: caches of torch and Python have filled up
MOST_GROWTH = 0.02  # of the memory held, over the rest of the run

STATM = Path("/proc/self/statm")
needs_proc = pytest.mark.skipif(not STATM.exists(), reason=f"needs {STATM}, which tells the memory held now")


class Rounds(Dataset[tuple[Tensor, int]]):
    """The same images over and over."""

    fingerprint = "rounds"

    def __init__(self, length: int) -> None:
        self.length = length
        self.images = torch.randn(DIFFERENT, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % DIFFERENT], 0


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 8, 1), (8, 16, 2), (16, 16, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


class Watched:
    """A scorer with samples of the memory that the process holds, in bytes, and of the tensors alive in it."""

    def __init__(self, score: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.score = score
        self.held: list[int] = []
        self.tensors: list[int] = []

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.held.append(int(STATM.read_text().split()[1]) * resource.getpagesize())
        self.tensors.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
        return self.score(x)


def growth(held: list[int]) -> float:
    """By which memory grew once settled, by a straight line through the samples, over its mean."""
    settled = np.array(held[int(SETTLED * len(held)) :], float)
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0]
    return float(slope * (len(settled) - 1) / settled.mean())


def scored(images: int, folder: Path, detector: Any) -> tuple[Watched, np.ndarray]:
    watched = Watched(detector)
    loader = DataLoader(Rounds(images), BATCH)
    _, scores, _ = score_dataset(watched, loader, "cpu", cache=ScoreCache(folder), key={"run": "soak"}, progress=False)
    return watched, scores


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("variant", ["Z", "A"])
def test_memory_and_scores_stay_the_same_in_a_long_run(variant: str, tmp_path: Path) -> None:
    watched, scores = scored(IMAGES, tmp_path, SandI(network(), variant=variant))
    assert growth(watched.held) < MOST_GROWTH
    settled = watched.tensors[int(SETTLED * len(watched.tensors)) :]
    # results stay on the device for some batches: three tensors each
    assert max(settled) - min(settled) <= 3 * 64
    assert np.isfinite(scores).all()
    for start in range(DIFFERENT, IMAGES, DIFFERENT):
        later = scores[start : start + DIFFERENT]
        np.testing.assert_allclose(later, scores[: len(later)], rtol=1e-3)


@needs_proc
def test_a_leak_is_seen(tmp_path: Path) -> None:
    detector, kept = SandI(network(), variant="Z"), []

    def leaking(x: Tensor) -> tuple[Tensor, Tensor]:
        pages = mmap.mmap(-1, 4 << 20)  # of its own: the heap of a long test run has room for all of it
        pages.write(b"x" * len(pages))
        kept.append(pages)
        return detector(x)

    watched, _ = scored(40 * BATCH, tmp_path, leaking)
    assert growth(watched.held) > MOST_GROWTH


@pytest.mark.parametrize("leak, grows", [(0, False), (20_000, False), (400_000, True)])
def test_growth_is_told_from_noise(leak: int, grows: bool) -> None:
    """1 GB that takes a tenth of the run to settle, with some noise, and so many bytes lost in each batch."""
    noise = np.random.default_rng(0).normal(0, 1e6, 200)
    held = [int(1e9 - 2e8 * (number < 20) + noise[number] + leak * number) for number in range(200)]
    assert growth(held) == pytest.approx(leak * 179 / 1e9, abs=2e-3)
    assert (growth(held) > MOST_GROWTH) == grows
