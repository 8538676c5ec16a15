"""Where gradients are zero, told by forward passes alone: the rectifiers of a network.

A unit that a rectifier cuts off has gradient zero. One that it lets through has a gradient that is not zero, as long as
something behind it is let through as well: so at a split that feeds a ReLU, directly or by way of a batch norm or a
residual addition, the pattern of g_i in Eq. 11 is the ReLU's own mask in the pass at z^{i-1}, less what a max-pool
behind it drops.

That is proved, not assumed. In a network of ungrouped convolutions, batch norms, additions, rectifiers, pools and
linear layers, every position hands its gradient on to every channel before it, if at every rectifier behind it more
channels are open at each position than there are output channels with a zero weight, windows leave no position out, and
the predicted class's row of the last layer is nowhere zero. :class:`RectifiedNetwork` holds what weights and shapes
say; the open channels are counted image by image, on the clean pass for g_1 and on the pass at z^{i-1} for g_i. Sums
that cancel to exactly zero remain: one position in 5e8 in float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.engine.lanes import tensors_in
from openood_sandi.engine.recorded import Call, Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.splits import RecordedNetwork
from openood_sandi.engine.values import tells_of_form

__all__ = ["RectifiedNetwork", "Rectifier", "rectified_network"]


@dataclass(frozen=True)
class Rectifier:
    """A call that lets some of its input through, unchanged, and cuts the rest off.

    Attributes:
        position: its place in the pass.
        bounds: what is let through lies strictly between these.
        pool: the max-pool that alone uses its result, as a call and its place, if one does.
        needed: how many channels must be open at a position for it to hand on gradients for certain.
    """

    position: int
    bounds: tuple[float, float]
    pool: tuple[int, Call] | None
    needed: int

    @property
    def is_plain(self) -> bool:
        """Whether just what is zero in its result is cut off: a ReLU without a max-pool."""
        return self.pool is None and self.bounds == (0.0, math.inf)

    def mask(self, result: Tensor) -> Tensor:
        """Where the rectifier's input has a gradient, 1 or True there, from its result (N, K, ...)."""
        low, high = self.bounds
        # on CPUs, numbers are several times faster to make and to add up than a boolean mask
        quick = self.pool is None and result.device.type == "cpu" and result.dtype in (torch.float32, torch.float64)
        mask = torch.gt(result, low, out=torch.empty_like(result) if quick else None)
        if not math.isinf(high):
            mask = mask * (result < high)
        return mask if self.pool is None else mask & _winners(result, self.pool[1])


@dataclass(frozen=True)
class RectifiedNetwork:
    """What makes patterns of gradients readable in a network, at one shape of images and one state of its weights.

    Attributes:
        rectifiers: all of them by position.
        gates: for each split, the position of the rectifier that it feeds.
        call_names: the calls that positions are counted in.
        open_rows: (classes,) whether the last layer's row of a class is nowhere zero.
    """

    rectifiers: Mapping[int, Rectifier]
    gates: Mapping[Site, int]
    call_names: tuple[str, ...]
    open_rows: Tensor

    @property
    def has_max_pool(self) -> bool:
        """Whether a max-pool stands behind a gate: what loses to a neighbour may win after a step."""
        return any(self.rectifiers[position].pool is not None for position in self.gates.values())


def rectified_network(found: RecordedNetwork, splits: Sequence[Split]) -> RectifiedNetwork | None:
    """The network's rectifiers, from a recorded pass; None where masks do not tell the patterns at all ``splits``."""
    held = found.positions(splits)
    if len(held) < len(splits) or found.output is None or _reads_data(found.calls):
        return None
    graph = _Graph(found.calls, found.output)
    try:
        rectifiers = dict(graph.rectifiers())
        open_rows = graph.open_rows()
        gates = {site: graph.gate(position) for site, position in held.items()}
    except _Unreadable:
        return None
    return RectifiedNetwork(rectifiers, gates, found.call_names, open_rows)


def _reads_data(calls: Sequence[Call]) -> bool:
    """Whether the network turns what it computes into Python data: other images may lead it to other layers."""
    read = (call for call in calls if call.producers and not tensors_in(call.result))
    return any(not tells_of_form(call.name) for call in read)


class _Unreadable(Exception):
    """The network has something that no mask tells of."""


_PRECISE = (torch.float32, torch.float64)
"""Sums of products in fewer bits are zero by accident, or too small, all the time."""
_POOLS = frozenset(("avg_pool2d", "adaptive_avg_pool2d", "mean"))
_VIEWS = frozenset(("flatten", "view", "reshape"))
_BOUNDS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


class _Graph:
    """The calls of a recorded pass that lead from the images to the logits, and who uses their results."""

    def __init__(self, calls: Sequence[Call], output: int) -> None:
        self.calls, self.output = calls, output
        self.consumers: dict[int, list[int]] = defaultdict(list)
        waiting, self._used = [output], {output}
        while waiting:  # results that do not reach the logits hand on no gradient: not even listed
            position = waiting.pop()
            for producer in calls[position].producers:
                self.consumers[producer].append(position)
                if producer >= 0 and producer not in self._used:
                    self._used.add(producer)
                    waiting.append(producer)

    def rectifiers(self) -> Iterator[tuple[int, Rectifier]]:
        """Every rectifier, after a look at every call.

        Raises:
            _Unreadable: a call is of another kind than those named at the top, or leaves some of its input out.
        """
        rows = set()
        for position, call in self._derived():
            is_map = isinstance(call.result, Tensor) and call.result.dim() > 1 and bool(call.producers)
            if not is_map or call.result.dtype not in _PRECISE or not self._is_covered(position):
                raise _Unreadable
            rows.add(len(call.result))
            if len(rows) > 1:  # images folded into the batch, or something that is none of them
                raise _Unreadable
            bounds = _bounds(call)
            if bounds is not None:
                if not self._spreads(position):
                    raise _Unreadable
                needed = 1 + self._zero_weights(call.producers[0])
                yield position, Rectifier(position, bounds, self._max_pool_behind(position), needed)
            elif not (self._is_linear(call) or self._is_pool(position) or self._acts_by_position(position)):
                raise _Unreadable

    def gate(self, split: int) -> int:
        """The rectifier that a split's tensor feeds."""
        here = split
        while len(self.consumers[here]) == 1:
            here = self.consumers[here][0]
            if _bounds(self.calls[here]) is not None:
                return here
            if not self._acts_by_position(here) or self._dead_channels(here):
                break
        raise _Unreadable

    def open_rows(self) -> Tensor:
        """(classes,): whether the row of the last layer is nowhere zero."""
        position = self.output
        while position >= 0 and self.calls[position].name in (*_POOLS, *_VIEWS):
            position = self.calls[position].producers[0]
        if position < 0 or self.calls[position].name not in ("linear", "conv2d"):
            raise _Unreadable
        rows = (_weight(self.calls[position]) != 0).flatten(1).all(1)
        if self.calls[self.output].result.shape[1:] != rows.shape:
            raise _Unreadable
        return rows

    def _derived(self) -> Iterator[tuple[int, Call]]:
        for position in sorted(self._used):
            yield position, self.calls[position]

    def _is_linear(self, call: Call) -> bool:
        if call.name in ("linear", "conv2d") and bool((_weight(call) == 0).all(0).any()):
            return False  # some input is not read at all
        if call.name == "linear":
            return bool(call.result.dim() == 2)
        return call.name == "conv2d" and _argument(call, 6, "groups", 1) == 1

    def _is_pool(self, position: int) -> bool:
        call = self.calls[position]
        if call.name == "max_pool2d":  # behind anything but a rectifier it drops positions that no mask tells of
            before = call.producers[0]
            pool = self._max_pool_behind(before) if before >= 0 and _bounds(self.calls[before]) is not None else None
            return pool is not None and pool[0] == position
        if call.name in _POOLS:
            return self._is_mean_of_positions(call)
        return self._is_part(call) or self._is_view_of_positions(position)

    def _is_part(self, call: Call) -> bool:
        """Whether it adds zeros, or takes slices of dimensions other than that of the images, beside a call that reads
        all of its input."""
        if call.name == "pad":
            amounts = _argument(call, 1, "pad", ())
            constant = _argument(call, 2, "mode", "constant") == "constant"
            return bool(call.result.dim() == 4 and constant and min(amounts, default=0) >= 0)
        index = call.args[1] if call.name == "__getitem__" and len(call.args) > 1 else ()
        slices = isinstance(index, tuple) and all(isinstance(item, slice) for item in index)
        return bool(slices and index[:1] == (slice(None),) and call.result.dim() == 4)

    def _is_mean_of_positions(self, call: Call) -> bool:
        """Whether a pool keeps images and channels apart, as all but some means do."""
        if call.name != "mean":
            return True
        dims = _argument(call, 1, "dim", None)
        dims = (dims,) if isinstance(dims, int) else dims
        before = call.producers[0]
        rank = self.calls[before].result.dim() if before >= 0 else 0
        return bool(rank and dims) and all(dim % rank > 1 for dim in dims)

    def _is_view_of_positions(self, position: int) -> bool:
        """Whether a view keeps images and channels apart, or is for linear layers alone, which read all there is."""
        call, behind = self.calls[position], self.consumers[position]
        if call.name not in _VIEWS:
            return False
        before = call.producers[0]
        kept = before >= 0 and self.calls[before].result.shape[:2] == call.result.shape[:2]
        return kept or (bool(behind) and all(self.calls[p].name == "linear" for p in behind))

    def _spreads(self, position: int) -> bool:
        """Whether a layer that mixes channels reads all of the call's result, before another rectifier does."""
        for behind in self.consumers[position]:
            call = self.calls[behind]
            if self._is_linear(call):
                return True
            if _bounds(call) is None and not self._dead_channels(behind) and self._spreads(behind):
                return True
        return False

    def _dead_channels(self, position: int) -> int:
        """How many channels a batch norm multiplies by zero; none for other calls."""
        call = self.calls[position]
        scale = _argument(call, 3, "weight", None) if call.name == "batch_norm" else None
        return int((scale == 0).sum()) if isinstance(scale, Tensor) else 0

    def _acts_by_position(self, position: int) -> bool:
        """Whether the call is a plain addition of two results of one shape, or a batch norm in eval mode."""
        call = self.calls[position]
        if call.name == "batch_norm":
            # torch.batch_norm has the same name and its arguments in another order
            return (
                call.func is F.batch_norm
                and len(call.producers) == 1
                and _argument(call, 5, "training", False) is False
            )
        if call.name not in ("add", "__add__", "__radd__") or len(set(call.producers)) != 2:
            return False
        shapes = {self.calls[p].result.shape if p >= 0 else None for p in (*call.producers, position)}
        return len(shapes) == 1 and call.kwargs.get("alpha", 1) == 1

    def _max_pool_behind(self, position: int) -> tuple[int, Call] | None:
        behind = self.consumers[position]
        if len(behind) == 1 and self.calls[behind[0]].name == "max_pool2d":
            return behind[0], self.calls[behind[0]]
        return None

    def _zero_weights(self, position: int) -> int:
        """In how many output channels, at most, an input of the layers before has a zero weight."""
        if position < 0:
            return 0
        call = self.calls[position]
        if call.name in ("linear", "conv2d"):
            return int((_weight(call) == 0).sum(0).max())
        if _bounds(call) is not None or call.name == "max_pool2d":
            return 0
        return self._dead_channels(position) + sum(self._zero_weights(producer) for producer in call.producers)

    def _is_covered(self, position: int) -> bool:
        """Whether every position of the call's result lies in some window of the calls that use it."""
        result, behind = self.calls[position].result, self.consumers[position]
        if result.dim() != 4 or not behind:
            return True
        partly = [self.calls[p] for p in behind if self.calls[p].name in ("conv2d", "avg_pool2d", "__getitem__")]
        if len(partly) < len(behind):
            return True
        windowed = [call for call in partly if call.name != "__getitem__"]
        covered = torch.zeros(result.shape[2:], dtype=torch.bool)
        for call in windowed:
            covered |= _window(call, result.shape[2:])
        return bool(covered.all())


def _window(call: Call, size: Sequence[int]) -> Tensor:
    """Which positions (H, W) of its input a convolution or an average pool reads."""
    with torch.enable_grad():
        x = torch.zeros(1, 1, *size, requires_grad=True)
        if call.name == "conv2d":
            kernel = torch.ones(1, 1, *_weight(call).shape[2:])
            names = ("stride", "padding", "dilation")
            given = {name: _argument(call, 3 + k, name, None) for k, name in enumerate(names)}
            result = F.conv2d(x, kernel, None, **{name: value for name, value in given.items() if value is not None})
        else:
            result = call.func(x, *call.args[1:], **{k: v for k, v in call.kwargs.items() if k != "input"})
        return torch.autograd.grad(result.sum(), x)[0][0, 0] != 0


def _winners(rectified: Tensor, pool: Call) -> Tensor:
    """Where in ``rectified`` (..., K, H, W) some window of the max-pool has its largest value."""
    options = {k: v for k, v in pool.kwargs.items() if k not in ("input", "return_indices")}
    maps = rectified.reshape(-1, *rectified.shape[-3:])
    indices = F.max_pool2d(maps, *pool.args[1:6], **options, return_indices=True)[1]
    won = torch.zeros_like(maps, dtype=torch.bool).flatten(2)
    return won.scatter_(2, indices.flatten(2), True).view(rectified.shape)


def _bounds(call: Call) -> tuple[float, float] | None:
    """What a rectifier lets through lies strictly between these; None for any other call."""
    if call.name == "hardtanh":
        return float(_argument(call, 1, "min_val", -1.0)), float(_argument(call, 2, "max_val", 1.0))
    return _BOUNDS.get(call.name)


def _weight(call: Call) -> Tensor:
    weight = _argument(call, 1, "weight", None)
    if not isinstance(weight, Tensor):
        raise _Unreadable
    return weight


def _argument(call: Call, place: int, name: str, default: Any) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)
