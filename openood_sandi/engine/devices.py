"""What devices can do, and how little the host waits for them.

The host runs ahead of a GPU until it asks for a value: then it waits for all that is queued. So what a batch's scoring
has to know of it is asked for at once (:func:`fetch`), and tensors that every batch reads are moved there once
(:class:`Moved`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from openood_sandi.engine.contents import version
from openood_sandi.engine.memory import is_out_of_memory

__all__ = [
    "Moved",
    "add_rows",
    "exact_device",
    "exact_dtype",
    "fetch",
    "has_float64",
    "is_autocast",
    "rows_where",
    "take",
]


def fetch(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU, bit for bit, in one transfer from each device; those that are there stay as they are."""
    fetched = dict(enumerate(tensors))
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        if device.type != "cpu":
            fetched |= _in_one(device, {n: tensor for n, tensor in fetched.items() if tensor.device == device})
    return [fetched[number] for number in range(len(tensors))]


def _in_one(device: torch.device, tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    flat = [tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in tensors.values()]
    parts = torch.split(torch.cat(flat).cpu(), [len(part) for part in flat])
    # a copy each, as an element has to lie where its size divides the address
    pairs = zip(tensors.items(), parts, strict=True)
    return {number: part.clone().view(tensor.dtype).view(tensor.shape) for (number, tensor), part in pairs}


def rows_where(mask: Tensor, count: int) -> Tensor:
    """The places (count,) where ``mask`` (B,) is true, ascending, of which the caller knows how many there are."""
    return mask.to(torch.int8).argsort(descending=True, stable=True)[:count]


def take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """``tensor[rows]`` by numbers of the host's, which are sent without a wait, as those of a list are not."""
    return tensor.index_select(0, torch.tensor(rows, dtype=torch.int64).to(tensor.device, non_blocking=True))


def add_rows(totals: Tensor, rows: Tensor, values: Tensor) -> None:
    """``totals[rows[i]] += values[i]`` for all i, with the same bits every time.

    On GPUs ``index_add_`` adds in the order in which threads come: the processes of ``torchrun`` would learn prototypes
    that differ in their last bits, and refuse to share a task. A product of matrices does not.

    Args:
        totals: (N, K), on the device of the others and of the dtype of ``values``.
        rows: (B,) int64, from 0 to N - 1.
        values: (B, K).
    """
    if totals.device.type == "cpu":
        totals.index_add_(0, rows, values)
    else:
        chosen = rows == torch.arange(len(totals), device=rows.device)[:, None]
        totals.addmm_(chosen.to(values.dtype), values)


class Moved:
    """Tensors as they are on another device, each moved there once."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, int | None, Tensor]] = {}

    def to(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """``tensor`` on the device and in the dtype of ``like``.

        It is moved again where another tensor has taken the ``name``, or something was written into it; writes into
        inference tensors are not counted, so these are moved every time.
        """
        if tensor.device == like.device and tensor.dtype == like.dtype:
            return tensor
        source, written, moved = self._kept.get(name, (None, None, tensor))
        same = source is tensor and written is not None and written == version(tensor)
        if not same or (moved.device, moved.dtype) != (like.device, like.dtype):
            moved = tensor.to(like)
            self._kept[name] = tensor, version(tensor), moved
        return moved


@lru_cache(maxsize=64)
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: those of MPS and some of XPU do not."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums that are not to depend on their order: float64, and float32 where a device has none."""
    return torch.float64 if has_float64(device) else torch.float32


def exact_device(device: torch.device) -> torch.device:
    """Where what needs float64 is computed: on the ``device``, or else on the CPU."""
    return device if has_float64(device) else torch.device("cpu")


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a kind of device; some have none."""
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:
        return False
