"""Where gradients are zero, told by forward passes alone: the rectifiers of a network.

A unit that a rectifier cuts off has gradient zero. One that it lets through has a gradient that is not zero, as long
as something behind it is let through as well. So the masks of all rectifiers tell the pattern of every gradient of the
pass that they are taken in (:mod:`.alive`): of g_1 at any split point in the clean pass. At a split that feeds a ReLU,
directly or by way of a batch norm or a residual addition, what the ReLU cuts off stays cut off along the path, as
sign(0) = 0: the pattern of g_i in Eq. 11 lies inside that of the ReLU's own mask.

:class:`RectifiedNetwork` holds what weights and shapes say of this; masks are read image by image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from openood_sandi.detectors.sandi.alive import BackwardGraph
from openood_sandi.detectors.sandi.call_graph import CallGraph, UnreadableError, argument, is_normalisation, is_sum
from openood_sandi.detectors.sandi.links import backward_graph
from openood_sandi.detectors.sandi.open_channels import needed_channels
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
        needed: how many channels must be open at a position for it to hand on gradients for certain, where that is all
            that it takes.
    """

    position: int
    bounds: tuple[float, float]
    pool: tuple[int, Call] | None
    needed: int

    def open_(self, result: Tensor) -> Tensor:
        """As :meth:`mask`, in a byte a position, to be kept."""
        low, high = self.bounds
        open_ = result.bool() if low == 0 else result > low  # the quickest to take; no result is below the bounds
        if not math.isinf(high):
            open_ &= _below(result, low, high)
        return open_ if self.pool is None else open_ & _winners(result, self.pool[1])

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
        places: for each split, the position of the call whose result it is.
        shapes: of the result at each of these places, without the images' dimension.
        gates: for each split that feeds a rectifier and nothing else, the position of that.
        tails: the splits that pools and the last layer alone lie behind.
        call_names: the calls that positions are counted in.
        backward: the ways of gradients back from the logits.
        is_counted: whether counts of open channels prove the patterns along paths, g_2 and on, at all splits
            (:mod:`.open_channels`).
    """

    rectifiers: Mapping[int, Rectifier]
    places: Mapping[Site, int]
    shapes: Mapping[int, Size]
    gates: Mapping[Site, int]
    tails: frozenset[Site]
    call_names: tuple[str, ...]
    backward: BackwardGraph
    is_counted: bool

    @property
    def has_max_pool(self) -> bool:
        """Whether a max-pool stands behind a gate: what loses to a neighbour may win after a step."""
        return any(self.rectifiers[position].pool is not None for position in self.gates.values())


def rectified_network(found: RecordedNetwork, splits: Sequence[Split]) -> RectifiedNetwork | None:
    """The network's rectifiers, from a recorded pass; None where masks do not tell the patterns at all ``splits``."""
    places = found.positions(splits)
    if len(places) < len(splits) or found.output is None or _reads_data(found.calls):
        return None
    graph = CallGraph(found.calls, found.output)
    try:
        first = min(places.values())
        _require_maps(graph, first)
        rectifiers = _rectifiers(graph, first)
        backward = backward_graph(graph, frozenset(rectifiers), first)
        gates = dict(_gates(graph, backward, places, rectifiers))
        for split in splits:
            if split.site not in gates:
                _require_all_behind(graph, places[split.site], found.span(split))
    except UnreadableError:
        return None
    tails = frozenset(site for site, place in places.items() if site not in gates and _is_tail(graph, place))
    needed = None
    if len(gates) + len(tails) == len(splits):
        needed = needed_channels(backward, rectifiers, [places[site] for site in tails])
    if needed is not None:
        rectifiers = {place: replace(rectifier, needed=needed[place]) for place, rectifier in rectifiers.items()}
    shapes = {place: graph.shape(place)[1:] for place in places.values()}
    return RectifiedNetwork(
        rectifiers, places, shapes, gates, tails, found.call_names, backward, is_counted=needed is not None
    )


def _reads_data(calls: Sequence[Call]) -> bool:
    """Whether the network turns what it computes into Python data: other images may lead it to other layers."""
    read = (call for call in calls if call.producers and not tensors_in(call.result))
    return any(not tells_of_form(call.name) for call in read)


_PRECISE = (torch.float32, torch.float64)
"""Sums of products in fewer bits are zero by accident, or too small, all the time."""
_POOLS_AND_VIEWS = frozenset(("avg_pool2d", "adaptive_avg_pool2d", "mean", "flatten", "view", "reshape"))
_BOUNDS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def _require_maps(graph: CallGraph, first: int) -> None:
    """Raises UnreadableError where a result from the first split on is no precise tensor with a row for each image."""
    rows = set()
    for _, call in (item for item in graph if item[0] >= first):
        is_map = isinstance(call.result, Tensor) and call.result.dim() > 1 and bool(call.producers)
        if not is_map or call.result.dtype not in _PRECISE:
            raise UnreadableError
        rows.add(len(call.result))
    if len(rows) > 1 or graph.calls[graph.output].result.dim() != 2:
        raise UnreadableError


def _rectifiers(graph: CallGraph, first: int) -> dict[int, Rectifier]:
    """Every rectifier behind the first split, by its position.

    Raises:
        UnreadableError: a max-pool is not behind one, so that it drops positions that no mask tells of.
    """
    found = {}
    for position, call in (item for item in graph if item[0] > first):
        bounds = _bounds(call)
        if bounds is not None:
            found[position] = Rectifier(position, bounds, _max_pool_behind(graph, position), needed=1)
        if call.name == "max_pool2d":
            before = found.get(call.producers[0])
            if before is None or before.pool is None or before.pool[0] != position:
                raise UnreadableError
    return found


def _max_pool_behind(graph: CallGraph, position: int) -> tuple[int, Call] | None:
    behind = graph.consumers[position]
    if len(behind) == 1 and graph.calls[behind[0]].name == "max_pool2d":
        return behind[0], graph.calls[behind[0]]
    return None


def _gates(
    graph: CallGraph, backward: BackwardGraph, places: Mapping[Site, int], rectifiers: Mapping[int, Rectifier]
) -> Iterator[tuple[Site, int]]:
    """The splits whose tensor feeds one rectifier, as it is or by way of calls that keep positions and channels."""
    for site, here in places.items():
        while len(backward.links.get(here, ())) == 1:
            here, link = backward.links[here][0]
            if here in rectifiers:
                yield site, here
                break
            if not (is_normalisation(graph.calls[here]) or is_sum(graph, here)) or link.zeros:
                break


def _is_tail(graph: CallGraph, here: int) -> bool:
    """Whether only pools and views lie between a split's tensor and the layer that gives the logits, and behind it."""
    names = []
    while here != graph.output and len(graph.consumers[here]) == 1:
        here = graph.consumers[here][0]
        names.append(graph.calls[here].name)
    layers = [name for name in names if name not in _POOLS_AND_VIEWS]
    return here == graph.output and layers in (["linear"], ["conv2d"])


def _require_all_behind(graph: CallGraph, place: int, span: range) -> None:
    """Raises UnreadableError where some of what uses a split's tensor may have got it before, or beside, the split, or
    where it leads nowhere."""
    users = graph.consumers[place]
    if place not in span or any(user < span.stop for user in users) or not (users or place == graph.output):
        raise UnreadableError


def _below(result: Tensor, low: float, high: float) -> Tensor:
    """Where numbers from ``low`` to ``high`` are not the latter."""
    if result.device.type != "cpu" or low < 0 or high not in range(1, 128):
        return result < high
    whole = result.to(torch.int8)  # rounded down: on CPUs, to compare bytes is several times as fast
    return torch.lt(whole, int(high), out=torch.empty_like(whole)).view(torch.bool)


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
        return float(argument(call, 1, "min_val", -1.0)), float(argument(call, 2, "max_val", 1.0))
    return _BOUNDS.get(call.name)
