"""The pattern of non-zero gradients without gradients, where a split feeds a rectifier.

A unit that a rectifier cuts off has gradient zero, and one that it lets through has, but for coincidences behind the
rectifier, a gradient that is not zero: at a split that feeds a ReLU, directly or through a residual addition, the
pattern of g_i in Eq. 11 is the ReLU's own mask at z^{i-1} (plus the clean residual), less what a max-pool behind it
drops. Z then needs no pass through the suffixes for i <= 2. Coincidences exist (a dead suffix, say), so
:class:`openood_sandi.SandI` checks a gate against true gradients before it relies on it, and again as it goes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openood_sandi.lanes import has_tensor
from openood_sandi.replay import Call, Site

__all__ = ["Gate", "find_gates"]


@dataclass(frozen=True)
class Gate:
    """The rectifier behind a split: it lets through what lies strictly between ``low`` and ``high``."""

    low: float
    high: float
    entry: int
    """Tape position of what enters the rectifier."""
    residual: int | None
    """Tape position of what is added to the split's tensor on the way there; None where nothing is."""
    pooling: tuple[Call, Call] | None
    """The rectifier and a max-pool that alone follows it, which lets through the largest of each window."""

    def clean(self, calls: Sequence[Call]) -> Tensor:
        """The mask of what is let through in the recorded pass, of the split's shape."""
        return self._mask(calls[self.entry].result.detach())

    def perturbed(self, z: Tensor, calls: Sequence[Call]) -> Tensor:
        """The mask with the split's tensor at ``z`` and all else as recorded."""
        return self._mask(z if self.residual is None else z + calls[self.residual].result.detach())

    def _mask(self, entering: Tensor) -> Tensor:
        if self.pooling is not None:
            with torch.enable_grad():
                entering = pooled = entering.detach().requires_grad_(True)
                for call in self.pooling:
                    pooled = call.func(pooled, *call.constants, **call.options)
                total = pooled.sum()
            return torch.autograd.grad(total, entering)[0] != 0
        mask = entering > self.low
        return mask if math.isinf(self.high) else mask & (entering < self.high)


def find_gates(calls: Sequence[Call], held: Mapping[Site, int]) -> dict[Site, Gate]:
    """The gates of those sites that have one.

    Args:
        calls: a recorded forward pass.
        held: for each site, the position of the call whose result it is.
    """
    consumers: dict[int, list[int]] = defaultdict(list)
    for position, call in enumerate(calls):
        if has_tensor(call.result):
            for producer in call.producers:
                consumers[producer].append(position)
    gates: dict[Site, Gate] = {}
    for site, position in held.items():
        entry, residual = position, None
        following = consumers[position]
        if len(following) == 1 and calls[following[0]].name in ("add", "__add__", "__radd__"):
            entry, residual = following[0], _other_operand(calls, following[0], position)
            following = consumers[entry] if residual is not None else []
        bounds = _bounds(calls[following[0]]) if len(following) == 1 else None
        if bounds is not None:
            rectifier, behind = calls[following[0]], consumers[following[0]]
            pooling = (rectifier, calls[behind[0]]) if _is_max_pool(calls, behind) else None
            gates[site] = Gate(*bounds, entry, residual, pooling)
    return gates


def _other_operand(calls: Sequence[Call], addition: int, operand: int) -> int | None:
    """The position of the second operand of a plain element-wise addition of two recorded results of one shape."""
    call = calls[addition]
    others = [producer for producer in call.producers if producer != operand]
    if len(call.producers) != 2 or len(others) != 1 or others[0] < 0 or call.options.get("alpha", 1) != 1:
        return None
    shapes = {getattr(calls[position].result, "shape", None) for position in (operand, others[0], addition)}
    return others[0] if len(shapes) == 1 else None


def _is_max_pool(calls: Sequence[Call], positions: Sequence[int]) -> bool:
    return (
        len(positions) == 1
        and calls[positions[0]].name == "max_pool2d"
        and isinstance(calls[positions[0]].result, Tensor)
    )


def _bounds(call: Call) -> tuple[float, float] | None:
    if call.name == "relu":
        return 0.0, math.inf
    if call.name == "relu6":
        return 0.0, 6.0
    if call.name == "hardtanh":
        return float(call.options.get("min_val", -1.0)), float(call.options.get("max_val", 1.0))
    return None
