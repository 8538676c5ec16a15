"""Devices other than the CPU: what their memory allows, with stand-ins for the modules of torch that tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openood_sandi.engine.memory import MemoryBudget, free_memory

GIB = 1 << 30


class Images:
    """What a budget asks of a batch on a device that is not there."""

    def __init__(self, device: str, count: int = 8) -> None:
        self.device, self.shape, self._count = torch.device(device), torch.Size((count, 3, 4, 4)), count

    def __len__(self) -> int:
        return self._count


class Memory:
    """Stands in for ``torch.cuda``, ``torch.xpu`` and ``torch.mps`` as far as memory goes.

    There are 10 GiB, of which torch has taken 7, two of them for later allocations.
    """

    def __init__(self, patch: pytest.MonkeyPatch, kind: str) -> None:
        self.emptied = 0
        told: dict[str, Any] = {"empty_cache": self.empty_cache}
        if kind == "mps":
            told |= {"recommended_max_memory": lambda: 10 * GIB, "current_allocated_memory": lambda: 5 * GIB}
        else:
            told |= {"mem_get_info": lambda device: (3 * GIB, 10 * GIB)}
            told |= {"memory_reserved": lambda device: 7 * GIB, "memory_allocated": lambda device: 5 * GIB}
        for name, value in told.items():
            patch.setattr(getattr(torch, kind), name, value, raising=False)

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_free_memory_counts_what_torch_keeps_for_later(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch, kind)
    assert free_memory(torch.device(kind, 0)) == 5 * GIB


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_memory_that_runs_out_is_handed_back_before_the_next_attempt(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, budget, seen = Memory(monkeypatch, kind), MemoryBudget(), []

    def work() -> str:
        seen.append(min(8, budget.images))
        budget.images_now = int(seen[-1])
        if len(seen) < 3:
            assert memory.emptied == len(seen) - 1
            raise RuntimeError(f"{kind.upper()} backend out of memory")
        return "done"

    x: Any = Images(f"{kind}:0")
    assert budget.fit(work, x) == "done"
    assert seen == [8, 4, 2] and memory.emptied == 2


def test_a_kind_of_device_that_tells_nothing_is_worked_on_all_the_same() -> None:
    """Its memory is planned for as the machine's; there is no cache to empty."""
    assert free_memory(torch.device("meta")) > 0
    budget = MemoryBudget()
    errors = iter([RuntimeError("out of memory")])

    def work() -> str:
        for error in errors:
            raise error
        return "done"

    x: Any = Images("meta")
    assert budget.fit(work, x) == "done"


def test_more_taken_than_recommended_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch, "mps")
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 12 * GIB)
    assert free_memory(torch.device("mps")) == 0
