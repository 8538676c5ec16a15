"""The pattern of non-zero gradients without gradients, where a split feeds a rectifier.

A unit that a rectifier cuts off has gradient zero, and one that it lets through has, but for coincidences behind the
rectifier, a gradient that is not zero: at a split that feeds a ReLU, directly or through a residual addition or a batch
norm, the pattern of g_i in Eq. 11 is the ReLU's own mask at z^{i-1} (plus the clean residual), less what a max-pool
behind it drops. Z then needs no pass through the suffixes for i <= 2. Coincidences exist (a dead suffix, say), so
:class:`openood_sandi.SandI` checks a gate against true gradients before it relies on it, and again as it goes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openood_sandi.engine.lanes import tensors_in
from openood_sandi.engine.tape import Call, Site

__all__ = ["Certificate", "Gate", "Rectifier", "find_certificate", "find_gates"]


@dataclass(frozen=True)
class Rectifier:
    """A call that lets some of its input through, unchanged, and cuts the rest off."""

    position: int
    """Its position on the tape."""
    bounds: tuple[float, float]
    """What is let through lies strictly between these."""
    pool: int | None
    """The position of the max-pool that alone uses its result, if one does."""

    @property
    def is_plain(self) -> bool:
        """Whether just what is zero in its result is cut off: a ReLU without a max-pool."""
        return self.pool is None and self.bounds == (0.0, math.inf)

    def mask(self, entering: Tensor, calls: Sequence[Call]) -> Tensor:
        """1 or True where ``entering`` has a gradient behind the rectifier, and a max-pool behind it, and 0 where not.

        The rectifier's result, which is cut off alike, may stand for what enters it.
        """
        if self.pool is not None:
            with torch.enable_grad():
                entering = entering.detach().requires_grad_(True)
                rectified = calls[self.position].rerun({calls[self.position].producers[0]: entering})
                total = calls[self.pool].rerun({self.position: rectified}).sum()
            return torch.autograd.grad(total, entering)[0] != 0
        # on CPUs, numbers are several times faster to make and to add up than a boolean mask
        quick = entering.device.type == "cpu" and entering.dtype in (torch.float32, torch.float64)
        mask = torch.gt(entering, self.bounds[0], out=torch.empty_like(entering) if quick else None)
        return mask if math.isinf(self.bounds[1]) else mask * (entering < self.bounds[1])


@dataclass(frozen=True)
class Gate:
    """The rectifier behind a split, and the way there in positions on the tape."""

    split: int
    """The call whose result the split is."""
    way: tuple[int, ...]
    """The calls from there to the rectifier, each of which acts on every position by itself and is monotonic."""
    rectifier: Rectifier

    def perturbed(self, z: Tensor, calls: Sequence[Call]) -> Tensor:
        """The rectifier's mask with the split's tensor at ``z`` and all else as recorded."""
        previous = self.split
        for position in self.way:
            values = {producer: calls[producer].result.detach() for producer in calls[position].producers}
            z = calls[position].rerun({**values, previous: z})
            previous = position
        return self.rectifier.mask(z, calls)


@dataclass(frozen=True)
class Certificate:
    """What makes sure, from a forward pass alone, that nothing behind a gate is dead for some image.

    In a network of ungrouped convolutions, batch norms, additions, rectifiers, pools and linear layers, a position
    that a rectifier lets through in any channel hands its gradient on to every channel before, as long as
    that holds at the rectifiers behind it too. (Weights that are zero, and positions that a stride skips, are the
    same for all images, and seen on the first batch.)
    """

    rectifiers: tuple[Rectifier, ...]
    """Every rectifier of the network."""


def find_certificate(calls: Sequence[Call]) -> Certificate | None:
    """The network's certificate, from a recorded pass; None if it contains anything else than named there."""
    consumers = _consumers(calls)
    rectifiers: list[Rectifier] = []
    for position, call in enumerate(calls):
        if not call.producers or not tensors_in(call.result):
            continue
        before = calls[call.producers[0]] if call.producers[0] >= 0 else None
        rectifier = _rectifier(calls, consumers, position)
        if rectifier is not None:
            if before is None:
                return None
            rectifiers.append(rectifier)
        elif call.name == "max_pool2d":
            # behind anything but a rectifier it drops positions that no mask tells of
            alone = _max_pool_behind(calls, consumers, call.producers[0]) == position
            if before is None or _bounds(before) is None or not alone:
                return None
        elif call.name == "conv2d":
            if (call.args[6] if len(call.args) > 6 else call.kwargs.get("groups", 1)) != 1:
                return None
        elif call.name not in _LINEAR and not _is_position_by_position(calls, position, call.producers[0]):
            return None
    return Certificate(tuple(rectifiers))


# Besides convolutions: what hands every gradient on.
_LINEAR = frozenset(("linear", "avg_pool2d", "adaptive_avg_pool2d", "mean", "flatten", "view", "reshape"))


def find_gates(calls: Sequence[Call], held: Mapping[Site, int]) -> dict[Site, Gate]:
    """The gates of those sites that have one.

    Args:
        calls: a recorded forward pass.
        held: for each site, the position of the call whose result it is.
    """
    consumers = _consumers(calls)
    gates: dict[Site, Gate] = {}
    for site, split in held.items():
        way: list[int] = []
        here = split
        while len(consumers[here]) == 1 and _is_position_by_position(calls, consumers[here][0], here):
            here = consumers[here][0]
            way.append(here)
        rectifier = _rectifier(calls, consumers, consumers[here][0]) if len(consumers[here]) == 1 else None
        if rectifier is not None:
            gates[site] = Gate(split, tuple(way), rectifier)
    return gates


def _rectifier(calls: Sequence[Call], consumers: Mapping[int, list[int]], position: int) -> Rectifier | None:
    """The call at ``position`` as a rectifier, if it is one."""
    bounds = _bounds(calls[position])
    return None if bounds is None else Rectifier(position, bounds, _max_pool_behind(calls, consumers, position))


def _consumers(calls: Sequence[Call]) -> dict[int, list[int]]:
    """For each call, the positions of those that compute something from its result."""
    consumers: dict[int, list[int]] = defaultdict(list)
    for position, call in enumerate(calls):
        if tensors_in(call.result):
            for producer in call.producers:
                consumers[producer].append(position)
    return consumers


def _max_pool_behind(calls: Sequence[Call], consumers: Mapping[int, list[int]], position: int) -> int | None:
    """The position of the max-pool that alone uses the result at ``position``, if one does."""
    behind = consumers[position]
    if len(behind) == 1 and calls[behind[0]].name == "max_pool2d" and isinstance(calls[behind[0]].result, Tensor):
        return behind[0]
    return None


def _is_position_by_position(calls: Sequence[Call], position: int, operand: int) -> bool:
    """Whether the call is a plain addition of two recorded results of one shape, or a batch norm in eval mode."""
    call = calls[position]
    if call.name == "batch_norm":
        return call.producers == (operand,) and call.kwargs.get("training") is False
    if call.name not in ("add", "__add__", "__radd__") or len(set(call.producers)) != 2 or len(call.producers) != 2:
        return False
    shapes = {getattr(calls[p].result, "shape", None) if p >= 0 else None for p in (*call.producers, position)}
    return len(shapes) == 1 and call.kwargs.get("alpha", 1) == 1


def _bounds(call: Call) -> tuple[float, float] | None:
    """What a rectifier lets through lies strictly between these; None for any other call."""
    if call.name == "relu":
        return 0.0, math.inf
    if call.name == "relu6":
        return 0.0, 6.0
    if call.name == "hardtanh":
        return float(call.kwargs.get("min_val", -1.0)), float(call.kwargs.get("max_val", 1.0))
    return None
