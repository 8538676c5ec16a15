"""What scoring costs, in forward passes: by a clock that tests can wind, and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


from comparison import cost


@pytest.mark.parametrize("seconds, turns", [(1e-4, 7), (2.0, 7), (30.0, 3)], ids=["fast", "usual", "slow"])
def test_cost_is_scoring_time_over_forward_time(monkeypatch: pytest.MonkeyPatch, seconds: float, turns: int) -> None:
    clock = 0.0
    scored = 0

    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            nonlocal clock
            clock += seconds
            return images

    def scorer(images: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal clock, scored
        clock += 3.5 * seconds
        scored += 1
        return images, images

    monkeypatch.setattr("time.perf_counter", lambda: clock)
    measured = cost.measure(Net(), scorer, torch.zeros(7, 1))
    assert measured.forwards == pytest.approx((3.5, 3.5, 3.5))
    assert measured.images_per_second == pytest.approx(7 / (3.5 * seconds))
    assert scored - 1 == max(turns, int(np.ceil(cost.MIN_SECONDS / (4.5 * seconds))))  # one warms up


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1", b"\xff"])
def test_a_damaged_measurement_is_made_again(tmp_path: Path, damage: bytes) -> None:
    scorers = iter([torch.relu, torch.abs])

    def measured(key: str) -> cost.Expense:
        images = torch.ones(50, 3, 4, 4)
        device = torch.device("cpu")
        return cost.kept_expense(tmp_path, {"key": key}, nn.Identity(), lambda: (next(scorers), images), device)

    first = measured("a")
    assert first.batch_size == cost.CPU_BATCH and first.peak_bytes == 4 * 48 * cost.CPU_BATCH
    assert measured("a") == first
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert measured("a").cost != first.cost  # a clock gives no time twice
    with pytest.raises(StopIteration):
        measured("b")


def test_cost_takes_the_turns_and_the_clock_it_is_given() -> None:
    now = 0.0
    durations = iter([9.0, 1.0, 2.0, 3.0])  # the first, the warm-up's, does not count

    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            nonlocal now
            now += 0.5
            return images

    def scorer(images: Tensor) -> None:
        nonlocal now
        now += next(durations)

    measured = cost.measure(Net(), scorer, torch.zeros(4, 1), turns=3, clock=lambda: now)
    assert measured.forwards == pytest.approx((3.0, 4.0, 5.0))
    assert measured.images_per_second == pytest.approx(2.0)
