"""A long run: tens of thousands of images through a detector, and nothing piles up."""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import subprocess
import sys
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

ROOT = Path(__file__).parents[2]
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


def soak(images: int, variant: str, leaks: int, folder: Path) -> dict[str, Any]:
    """A long run in this process; ``leaks`` bytes are kept of every batch."""
    torch.set_num_threads(1)
    detector, kept = SandI(network(), variant=variant), []

    def score(x: Tensor) -> tuple[Tensor, Tensor]:
        if leaks:
            kept.append(mmap.mmap(-1, leaks))
            kept[-1].write(b"x" * leaks)
        return detector(x)

    watched, loader = Watched(score), DataLoader(Rounds(images), BATCH)
    _, scores, _ = score_dataset(watched, loader, "cpu", cache=ScoreCache(folder), key={"run": "soak"}, progress=False)
    return {"held": watched.held, "tensors": watched.tensors, "scores": scores.tolist()}


def in_its_own_process(*arguments: object) -> dict[str, Any]:
    """The run's record. What glibc's heap keeps of freed memory is no leak, so it is told to keep little."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.runs.test_soak", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


@pytest.mark.long
@needs_proc
@pytest.mark.parametrize("variant", ["Z", "A"])
def test_memory_and_scores_stay_the_same_in_a_long_run(variant: str, tmp_path: Path) -> None:
    record = in_its_own_process(IMAGES, variant, 0, tmp_path)
    assert growth(record["held"]) < MOST_GROWTH
    # a batch's scores are a tensor that stays; the results of some batches are three on the device
    assert record["tensors"][-1] - record["tensors"][0] <= len(record["tensors"]) + 3 * 64
    scores = np.array(record["scores"])
    assert len(scores) == IMAGES and np.isfinite(scores).all()
    for start in range(DIFFERENT, IMAGES, DIFFERENT):
        later = scores[start : start + DIFFERENT]
        np.testing.assert_allclose(later, scores[: len(later)], rtol=1e-3)


@needs_proc
@pytest.mark.slow
def test_a_leak_is_seen(tmp_path: Path) -> None:
    record = in_its_own_process(30 * BATCH, "Z", 2 << 20, tmp_path)
    assert growth(record["held"]) > MOST_GROWTH


@pytest.mark.parametrize("leak, grows", [(0, False), (20_000, False), (400_000, True)])
def test_growth_is_told_from_noise(leak: int, grows: bool) -> None:
    """1 GB that takes a tenth of the run to settle, with some noise, and so many bytes lost in each batch."""
    noise = np.random.default_rng(0).normal(0, 1e6, 200)
    held = [int(1e9 - 2e8 * (number < 20) + noise[number] + leak * number) for number in range(200)]
    assert growth(held) == pytest.approx(leak * 179 / 1e9, abs=5e-3)
    assert (growth(held) > MOST_GROWTH) == grows


if __name__ == "__main__":
    print(json.dumps(soak(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))))
