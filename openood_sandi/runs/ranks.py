"""Ranks of ``torchrun``: who this process is among them, and how they exchange results.

Only a few bytes an image are exchanged, so the group runs on gloo, on CPU tensors, whatever the network runs on; ranks
may then also share a GPU. A script that has set up ``torch.distributed`` itself keeps its own group.
"""

from __future__ import annotations

import atexit
import functools
import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = [
    "broadcast",
    "gather",
    "is_main_process",
    "join",
    "launched",
    "own_device",
    "rank",
    "take_own_gpu",
    "world_size",
]

T = TypeVar("T")

#: How long ranks wait for the slowest, at least.
PATIENCE = timedelta(minutes=30)


def launched() -> bool:
    """Whether ``torchrun`` has started this process as one of several."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def join() -> None:
    """Set up ``torch.distributed`` if ``torchrun`` has started this process and nobody has done so yet."""
    if launched() and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        atexit.register(_leave)


def rank() -> int:
    """This process's number; 0 where there is one process only."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the process that prints and writes. Needs no group: ``torchrun`` tells each its rank."""
    return rank() == 0 and (not launched() or int(os.environ["RANK"]) == 0)


def own_device() -> torch.device:
    """The GPU that is this process's by ``LOCAL_RANK``, the one GPU that there is, or the CPU."""
    gpus = torch.cuda.device_count()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus) if gpus else torch.device("cpu")


def take_own_gpu() -> None:
    """Have ``.cuda()`` mean :func:`own_device`, where there is a GPU."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)


def gather(what: str, value: T, patience: timedelta = timedelta()) -> list[T]:
    """The ``value`` of every rank, in their order, on every rank.

    Args:
        what: what the value is, for messages, and the same on all ranks.
        value: anything that can be pickled.
        patience: how long to wait for the others; :data:`PATIENCE` at least.

    Raises:
        RuntimeError: another rank has died, has not come by then, or gives something else; the message says which.
    """
    if world_size() == 1:
        return [value]
    group = _group()
    patience = max(patience, PATIENCE)
    try:
        dist.monitored_barrier(group, patience, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank()} of {world_size()} has waited for the others' {what} in vain, for up to {patience}; the "
            f"rank that failed tells why in an error of its own: {error}"
        ) from error
    given = _exchanged((what, value), group)
    for other, (theirs, _) in enumerate(given):
        if theirs != what:
            raise RuntimeError(
                f"rank {rank()} gives its {what}, but rank {other} its {theirs}: one has gone on after an error, or "
                "the script does not do the same on all ranks"
            )
    return [value for _, value in given]


def broadcast(what: str, value: T) -> T:
    """Rank 0's ``value``, on every rank; see :func:`gather`."""
    return gather(what, value if rank() == 0 else None)[0]  # type: ignore[return-value]


def _exchanged(value: Any, group: Any) -> list[Any]:
    """Every rank's value, by way of rank 0.

    From one rank to another, not by ``all_gather_object``: gloo runs collectives in threads of its own, which free
    their tensors when they like, and for that enter Python. A ``DataLoader`` worker forked at that moment hangs for
    ever in CPython before 3.12 and 3.11.10 (its issue 112275), and with it the run.
    """
    if rank() > 0:
        dist.send_object_list([value], 0, group)
        given = [None] * world_size()
        dist.recv_object_list(given, 0, group)
        return given
    given = [value]
    for other in range(1, world_size()):
        theirs = [None]
        dist.recv_object_list(theirs, other, group)
        given += theirs
    for other in range(1, world_size()):
        dist.send_object_list(given, other, group)
    return given


@functools.cache
def _group() -> Any:
    """A gloo group of all ranks."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
