"""How much memory a replay may plan for."""

from __future__ import annotations

import os

import torch

__all__ = ["free_memory"]


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now, caches that give way to an allocation counted as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_machine_memory(), _container_memory())


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
