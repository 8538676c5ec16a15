"""What each kind of call hands back of where its gradient is not zero: of what places of its operands it was made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Size, Tensor

from openood_sandi.detectors.sandi.alive import BackwardGraph, Link, Where, everywhere_as_none, union
from openood_sandi.detectors.sandi.call_graph import (
    VIEWS,
    CallGraph,
    UnreadableError,
    argument,
    is_normalisation,
    is_sum,
    weight_of,
)
from openood_sandi.detectors.sandi.windows import Windows
from openood_sandi.engine.recorded import Call, Produced

__all__ = ["backward_graph"]

_CONCATENATIONS = frozenset(("cat", "concat", "concatenate"))


def backward_graph(graph: CallGraph, rectifiers: frozenset[int], first: int) -> BackwardGraph:
    """The ways of gradients back through a network.

    Args:
        graph: its calls.
        rectifiers: the positions of those among them; their masks stand for their links.
        first: the position of the first result whose gradient is asked for; what lies before it may be anything.

    Raises:
        UnreadableError: a call is of a kind that is not known here.
    """
    links: dict[int, list[tuple[int, Link]]] = {}
    for position, call in graph:
        if max(call.producers) < first:
            continue
        for producer, link in _links(graph, position, position in rectifiers):
            if producer >= first:
                links.setdefault(producer, []).append((position, link))
    for uses in links.values():
        uses.sort(key=lambda use: not use[1].spreads)
    return BackwardGraph(graph.output, {position: links[position] for position in sorted(links, reverse=True)})


def _links(graph: CallGraph, position: int, is_rectifier: bool) -> Iterator[tuple[int, Link]]:
    """The operands of a call that depend on the images, and the link to each."""
    call = graph.calls[position]
    if is_sum(graph, position):
        yield from ((producer, _UNCHANGED) for producer in call.producers)
    elif call.name in _CONCATENATIONS:
        yield from _concatenation(graph, call)
    elif len(call.producers) != 1 or not (is_rectifier or call.name in _LINKS):
        raise UnreadableError
    else:
        before = call.producers[0]
        yield before, _UNCHANGED if is_rectifier else _LINKS[call.name](call, graph.shape(before))


_UNCHANGED = Link(lambda where: where)


def _unless_everywhere(change: Callable[[Tensor], Where]) -> Callable[[Where], Where]:
    """The ``change`` of a map that leaves what is True everywhere so."""
    return lambda where: None if where is None else change(where)


def _of_all_positions(change: Callable[[Tensor], Where], behind: Tensor) -> Callable[[Where], Where]:
    """The ``change`` of a map after it was given all positions of the result ``behind``."""
    return lambda where: change(_filled(where, behind))


def _uncounted_unless(channels_are_kept: bool) -> float:
    """:attr:`Link.zeros` of a call that leaves out no channel, or may leave out all that are open."""
    return 0 if channels_are_kept else math.inf


def _mixing(nonzero: Tensor) -> dict[str, Any]:
    """:attr:`Link.zeros` and ``spreads`` of a layer that reads all channels, by its weights (outputs, inputs, ...)."""
    reads_all = bool(nonzero.any(0).all())
    return {"zeros": int((~nonzero).sum(0).max()), "spreads": True} if reads_all else {"zeros": math.inf}


def _form(tensor: Tensor) -> Tensor:
    """A tensor of the same form in next to no memory: links outlive the pass that they are read from."""
    return tensor.new_empty(()).expand(tensor.shape)


def _filled(where: Where, like: Tensor) -> Tensor:
    """A map (B or 1, K or 1, ...) with all the positions that ``like`` has."""
    if where is None:
        return torch.ones(1, 1, *like.shape[2:], dtype=torch.bool, device=like.device)
    return where.expand(-1, -1, *like.shape[2:])


# ---------------------------------------------------------------------- layers that mix channels


def _convolution(call: Call, given: Size) -> Link:
    weight, groups = weight_of(call), argument(call, 6, "groups", 1)
    nonzero = (weight != 0).detach()
    windows = Windows.of_convolution(call, given, weight.shape[2:])
    by_group = nonzero.view(groups, -1, *nonzero.shape[1:])
    read = by_group.any(1)  # whether a place of the window is read at all, in a channel
    zeros = int((~by_group).sum(1).masked_fill(~read, 0).max())
    reached = windows if bool(read.all()) else windows.reading(read.flatten(0, 1))

    def without_zeros(where: Tensor) -> Where:
        if where.shape[1] == 1:
            return reached(where)
        return reached(_of_all_channels(_any(where.view(len(where), groups, -1, *where.shape[2:])), given[1]))

    def with_zeros(where: Tensor) -> Where:
        if where.shape[1] == 1:
            return reached(where)
        counts = _counts(where.view(len(where), groups, -1, *where.shape[2:]))
        # each place is read in more open channels than could have a zero weight there, or it may be read in none
        found = reached(_of_all_channels(counts > zeros, given[1]))
        unclear = (counts > 0) & (counts <= zeros)
        if found is None or (where.device.type == "cpu" and not unclear.any()):
            return found
        return union(found, windows.through_weights(where, unclear.any(1), by_group))

    counted = _mixing(nonzero) if groups == 1 else {"zeros": math.inf}
    return Link(_of_all_positions(with_zeros if zeros else without_zeros, _form(call.result)), **counted)


def _any(parts: Tensor) -> Tensor:
    """(B, groups, H, W): where some channel of a group is True, of (B, groups, channels, H, W)."""
    return parts[:, :, 0] if parts.shape[2] == 1 else parts.view(torch.uint8).amax(2).view(torch.bool)


def _counts(parts: Tensor) -> Tensor:
    """(B, groups, H, W): how many channels of a group are True, of (B, groups, channels, H, W)."""
    counts = parts.new_zeros(1, dtype=torch.int32)
    for start in range(0, parts.shape[2], 255):  # so many are summed in a byte, several times as fast as in more
        few = parts[:, :, start : start + 255].view(torch.uint8)
        counts = counts + few.sum(2, dtype=torch.uint8)
    return counts


def _of_all_channels(where: Tensor, channels: int) -> Tensor:
    """A map with a channel for each group as one of all ``channels``; one of a single group stays as it is."""
    groups = where.shape[1]
    return where if groups in (1, channels) else where.repeat_interleave(channels // groups, 1)


def _linear(call: Call, given: Size) -> Link:
    if call.result.dim() != 2:
        raise UnreadableError
    nonzero = (weight_of(call) != 0).detach()
    return Link(_through_matrix(nonzero), **_mixing(nonzero))


def _through_matrix(nonzero: Tensor) -> Callable[[Where], Where]:
    """From maps (B, outputs or 1) to maps (B, inputs or 1), through weights (outputs, inputs)."""
    read = everywhere_as_none(nonzero.any(0, keepdim=True))
    every = bool(nonzero.all())

    def change(where: Where) -> Where:
        if where is None:
            return read
        if every or where.shape[1] == 1:
            some = where.any(1, keepdim=True)
            return everywhere_as_none(some if read is None else some & read)
        return everywhere_as_none(where.float() @ nonzero.float() > 0)  # no number is negative: none cancel

    return change


# ---------------------------------------------------------------------- layers that keep channels apart


def _normalisation(call: Call, given: Size) -> Link:
    if not is_normalisation(call):
        raise UnreadableError
    scale = argument(call, 3, "weight", None)
    if not isinstance(scale, Tensor) or bool((scale != 0).all()):
        return _UNCHANGED
    kept = (scale != 0).detach().view(1, -1, *[1] * (len(given) - 2))
    dead = int((~kept).sum())
    return Link(lambda where: kept if where is None else where & kept, zeros=dead)


def _dropout(call: Call, given: Size) -> Link:
    if argument(call, 2, "training", True) is not False:
        raise UnreadableError
    return _UNCHANGED


def _average_pool(call: Call, given: Size) -> Link:
    return Link(_of_all_positions(Windows.of_pool(call, given), _form(call.result)))


def _max_pool(call: Call, given: Size) -> Link:
    """Every position, less those where no window, or not every window, hands on to its winner: who wins is the matter
    of the rectifier before it, whose mask has winners alone."""
    windows, behind = Windows.of_pool(call, given), _form(call.result)

    def every_window(where: Where) -> Where:
        if where is None:
            return None
        some_closed = windows(~_filled(where, behind))
        return torch.zeros_like(where[:1, :1, :1, :1]) if some_closed is None else ~some_closed

    def some_window(where: Where) -> Where:
        return None if where is None else windows(_filled(where, behind))

    return Link(some_window) if windows.are_apart else Link(every_window, possibly=some_window)


def _adaptive_pool(call: Call, given: Size) -> Link:
    behind = _form(call.result)

    def change(where: Tensor) -> Where:
        for dim, size in ((2, given[2]), (3, given[3])):
            results = behind.shape[dim]
            out = where.new_zeros([*where.shape[:dim], size, *where.shape[dim + 1 :]])
            for place in range(results):
                start, stop = place * size // results, -(-(place + 1) * size // results)
                out.narrow(dim, start, stop - start).logical_or_(where.narrow(dim, place, 1))
            where = out
        return everywhere_as_none(where)

    return Link(_of_all_positions(change, behind)) if behind.shape[2:].numel() > 1 else _UNCHANGED


def _mean(call: Call, given: Size) -> Link:
    dims = argument(call, 1, "dim", None)
    dims = (dims,) if isinstance(dims, int) else dims
    if not dims or not all(isinstance(dim, int) and dim % len(given) > 0 for dim in dims):
        raise UnreadableError
    gone = sorted(dim % len(given) for dim in dims) if call.result.dim() < len(given) else []
    zeros = _uncounted_unless(all(dim % len(given) != 1 for dim in dims))
    change = _unless_everywhere(lambda where: reduce(lambda before, dim: before.unsqueeze(dim), gone, where))
    return Link(change, zeros=zeros)


def _view(call: Call, given: Size) -> Link:
    behind = call.result.shape
    if behind == given:
        return _UNCHANGED
    if behind.numel() != given.numel() or behind[0] != given[0]:
        raise UnreadableError

    def change(where: Tensor) -> Tensor:
        if where[0].numel() == 1:
            return where.view(-1, *[1] * (len(given) - 1))
        return where.expand(-1, *behind[1:]).reshape(-1, *given[1:])

    return Link(_unless_everywhere(change), zeros=_uncounted_unless(behind[:2] == given[:2]))


def _padding(call: Call, given: Size) -> Link:
    amounts = argument(call, 1, "pad", ())
    if argument(call, 2, "mode", "constant") != "constant" or min(amounts, default=0) < 0:
        raise UnreadableError
    before = {call.result.dim() - 1 - k // 2: amounts[k] for k in range(0, len(amounts), 2)}

    def change(where: Tensor) -> Where:
        for dim, amount in before.items():
            where = where if where.shape[dim] == 1 else where.narrow(dim, amount, given[dim])
        return everywhere_as_none(where.contiguous())

    return Link(_unless_everywhere(change), zeros=_uncounted_unless(call.result.shape[1] == given[1]))


def _slices(call: Call, given: Size) -> Link:
    index = call.args[1] if len(call.args) > 1 else ()
    is_tuple = isinstance(index, tuple) and all(isinstance(item, slice) for item in index)
    if not is_tuple or index[:1] != (slice(None),):
        raise UnreadableError
    taken = [dim for dim, item in enumerate(index) if len(range(*item.indices(given[dim]))) < given[dim]]
    behind = _form(call.result)

    def change(where: Where) -> Where:
        where = torch.ones([1] * behind.dim(), dtype=torch.bool, device=behind.device) if where is None else where
        where = where.expand([behind.shape[dim] if dim in taken else -1 for dim in range(behind.dim())])
        out = where.new_zeros([given[dim] if dim in taken else where.shape[dim] for dim in range(behind.dim())])
        out[tuple(index[dim] if dim in taken else slice(None) for dim in range(behind.dim()))] = where
        return everywhere_as_none(out)

    return Link(change, zeros=_uncounted_unless(1 not in taken)) if taken else _UNCHANGED


def _concatenation(graph: CallGraph, call: Call) -> Iterator[tuple[int, Link]]:
    parts: Sequence[object] = call.args[0] if call.args else call.kwargs["tensors"]
    dim = argument(call, 1, "dim", call.kwargs.get("axis", 0)) % call.result.dim()
    if dim == 0:
        raise UnreadableError
    start = 0
    for part in parts:
        shape = graph.shape(part.by) if isinstance(part, Produced) else part.shape  # type: ignore[attr-defined]
        if isinstance(part, Produced):
            change = _unless_everywhere(_part(dim, start, shape[dim]))
            yield part.by, Link(change, zeros=_uncounted_unless(dim != 1))
        start += shape[dim]


def _part(dim: int, start: int, length: int) -> Callable[[Tensor], Where]:
    def change(where: Tensor) -> Where:
        return where if where.shape[dim] == 1 else everywhere_as_none(where.narrow(dim, start, length))

    return change


_LINKS: dict[str, Callable[[Call, Size], Link]] = {
    "conv2d": _convolution,
    "linear": _linear,
    "batch_norm": _normalisation,
    "dropout": _dropout,
    "avg_pool2d": _average_pool,
    "max_pool2d": _max_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    "pad": _padding,
    "__getitem__": _slices,
    **dict.fromkeys(VIEWS, _view),
}
