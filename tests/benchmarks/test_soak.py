"""The soak's judgement: flat memory passes, a leak does not; and a short run of the real thing."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

for module in ("matplotlib", "sklearn"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')

from tests.helpers import tiny_suite  # isort: skip  # sets the path of what follows
import soak  # isort: skip


def samples(leak: float) -> list[soak.Memory]:
    """1 GB that takes a tenth of the run to settle, with some noise, and so many bytes lost for each image."""
    noise = np.random.default_rng(0).normal(0, 1e6, 200)
    held = [1e9 - 2e8 * (number < 20) + noise[number] + leak * 100 * number for number in range(200)]
    return [soak.Memory(100 * number, int(bytes_), 0) for number, bytes_ in enumerate(held)]


@pytest.mark.parametrize("leak, grows", [(0, False), (200, False), (4_000, True)])
def test_growth(leak: float, grows: bool) -> None:
    grown, share = soak.growth(samples(leak))
    assert abs(grown - leak * 18_000) < 2e6
    assert (share > soak.MOST_GROWTH) == grows


def test_difference_between_rounds() -> None:
    scores = np.array([1.0, 2.0, 4.0, 1.0, 2.0, 4.1, 1.0])
    assert soak.repetition_difference(scores, 3) == pytest.approx(0.025)
    assert soak.repetition_difference(scores[:3], 3) == 0


class Leaking(soak.SandI):
    """Keeps something of every batch, in pages of its own: the heap of a long test run has room for all of it."""

    kept: list[mmap.mmap] = []  # noqa: RUF012

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pages = mmap.mmap(-1, 32 << 20)
        pages.write(b"x" * len(pages))
        self.kept.append(pages)
        return super().__call__(x)


@pytest.mark.parametrize("leaks", [False, True])
def test_a_short_run(leaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak.sources, "load", lambda _: tiny_suite.suite())
    if leaks:
        monkeypatch.setattr(soak, "SandI", Leaking)
    status = soak.main(["--images", "120", "--batch-size", "6", "--device", "cpu", "--out", str(tmp_path)])
    Leaking.kept.clear()
    result = json.loads((tmp_path / "soak.json").read_text())
    assert status == (result["growth_share"] > soak.MOST_GROWTH)
    assert status or not leaks
    assert result["images"] == 120 and result["scores_not_finite"] == 0
    assert result["largest_difference_between_rounds"] < 1e-3
    assert len(result["samples"]) == 20 and result["samples"][-1]["images"] == 114
    assert (tmp_path / "soak.md").read_text().startswith("# A long run")
