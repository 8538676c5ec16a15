"""How much memory a batch may plan for, and what happens when that was too much."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["MemoryBudget", "free_memory", "is_out_of_memory"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class MemoryBudget:
    """How much is worked on at once: what memory seems to allow, and no more than turned out to fit.

    Attributes:
        images, lanes: limits found by running out of memory; infinite before that.
        bytes: what the lanes of a replay may take together, set anew for every pass.
        images_now, lanes_now: what is being worked on, 0 lanes where nothing is replayed.
    """

    images: float = math.inf
    lanes: float = math.inf
    bytes: int = 0
    images_now: int = 0
    lanes_now: int = 0

    def parts(self, x: Tensor, at_most: int) -> Iterator[Tensor]:
        """``x`` (B, ...) in parts of ``at_most`` images, or as many as fit."""
        for part in torch.split(x, int(min(at_most, self.images))):
            self.images_now, self.lanes_now = len(part), 0
            yield part

    def fit(self, work: Callable[[], T], x: Tensor) -> T:
        """``work()`` on the images ``x``, again with half of what it had at once each time that memory runs out.

        First the lanes of a replay are halved, where that is what did not fit, then the images. ``work`` starts afresh
        each time; the sizes that fit are kept for later batches.

        Raises:
            torch.cuda.OutOfMemoryError: one image with one lane does not fit.
        """
        tried: list[str] = []
        while True:
            self.images_now, self.lanes_now = len(x), 0
            try:
                result = work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
            else:
                if tried:
                    _log.warning("out of memory with %s; going on with %s at a time", "; ".join(tried), self)
                return result
            # From here on nothing refers to the failed attempt: its frames, which hold its tensors, went with `error`.
            tried.append(f"{_size(self.images_now, self.lanes_now)} ({reason})")
            if self.lanes_now > 1:
                self.lanes = self.lanes_now // 2
            elif self.images_now > 1:
                self.images = self.images_now // 2
            else:
                raise torch.cuda.OutOfMemoryError(
                    f"one image of shape {tuple(x.shape[1:])} does not fit into the memory of {x.device}: "
                    f"out of memory with {'; then with '.join(tried)}. "
                    "Free memory there, use smaller images, fewer split points or the CPU"
                )
            gc.collect()
            _empty_cache(x.device)

    def __str__(self) -> str:
        return _size(self.images, self.lanes)


def _size(images: float, lanes: float) -> str:
    """The numbers that say something, in words."""
    counts = {"image": images, "lane": lanes}
    said = [f"{count} {unit}{'s' * (count != 1)}" for unit, count in counts.items() if 0 < count < math.inf]
    return " and ".join(said)


# What torch, its libraries and the C++ runtime say when an allocation fails, beside exceptions of their own.
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "_STATUS_ALLOC_FAILED",
    "could not create a primitive",  # oneDNN, which gives no reason
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now, caches that give way to an allocation counted as free."""
    backend = _backend(device)
    if hasattr(backend, "mem_get_info"):  # CUDA, XPU and their like
        free, _ = backend.mem_get_info(device)
        return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))
    if hasattr(backend, "recommended_max_memory"):  # MPS
        return max(int(backend.recommended_max_memory() - backend.current_allocated_memory()), 0)
    return min(_machine_memory(), _container_memory())  # also for a device that tells nothing


def _empty_cache(device: torch.device) -> None:
    """Hands back what torch keeps of the device's memory for later allocations."""
    empty = getattr(_backend(device), "empty_cache", None)
    if empty is not None:
        empty()


def _backend(device: torch.device) -> Any:
    """``torch.cuda``, ``torch.xpu``, ``torch.mps`` or whatever deals with a device's memory, None for the CPU."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def _machine_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30  # a machine that tells nothing: what any machine that trains networks has


def _container_memory() -> int:
    """What the control group (version 2) this process is in leaves it."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return max(int(limit.read()) - int(used.read()), 0)
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return 1 << 62
