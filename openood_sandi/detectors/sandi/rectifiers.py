"""Where gradients are zero, told by forward passes alone: the rectifiers of a network.

A unit that a rectifier cuts off has gradient zero. One that it lets through has a gradient that is not zero, as long
as something behind it is let through as well. So the masks of all rectifiers tell the pattern of every gradient of the
pass that they are taken in (:mod:`.alive`): of g_1 at any split point in the clean pass. At a split that feeds a ReLU,
directly or by way of a batch norm or a residual addition, what the ReLU cuts off stays cut off along the path, as
sign(0) = 0: the pattern of g_i in Eq. 11 lies inside that of the ReLU's own mask.

:class:`RectifiedNetwork` holds what weights and shapes say of this; masks are read image by image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Size, Tensor

from openood_sandi.detectors.sandi.alive import BackwardGraph
from openood_sandi.detectors.sandi.call_graph import VIEWS, CallGraph, UnreadableError, is_normalisation, is_sum
from openood_sandi.detectors.sandi.links import backward_graph
from openood_sandi.detectors.sandi.open_channels import needed_channels
from openood_sandi.detectors.sandi.reach import Reach, reach_of
from openood_sandi.detectors.sandi.rectifier import PRECISE, Rectifier, rectified_range
from openood_sandi.detectors.sandi.ways import Way
from openood_sandi.detectors.sandi.windows import Windows
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.lanes import tensors_in
from openood_sandi.engine.recorded import Call, Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.splits import RecordedNetwork
from openood_sandi.engine.values import tells_of_form

__all__ = ["RectifiedNetwork", "rectified_network"]


@dataclass(frozen=True)
class RectifiedNetwork:
    """What makes patterns of gradients readable in a network, at one shape of images and one state of its weights.

    Attributes:
        rectifiers: all of them by position.
        places: for each split, the position of the call whose result it is.
        shapes: of the result at each of these places, without the images' dimension.
        ways: for each split that feeds a rectifier and nothing else, how.
        tails: the splits that pools and the last layer alone lie behind.
        call_names: the calls that positions are counted in.
        backward: the ways of gradients back from the logits.
        needed: for each rectifier how many channels must be open at a position for it to hand on gradients for certain;
            None where counts do not prove the patterns along paths, g_2 and on, at all splits (:mod:`.open_channels`).
        reach: how far the steps of the splits reach; None where ``needed`` is.
    """

    rectifiers: Mapping[int, Rectifier]
    places: Mapping[Site, int]
    shapes: Mapping[int, Size]
    ways: Mapping[Site, Way]
    tails: frozenset[Site]
    call_names: tuple[str, ...]
    backward: BackwardGraph
    needed: Mapping[int, int] | None
    reach: Reach | None

    @property
    def has_max_pool(self) -> bool:
        """Whether a max-pool stands behind a way's end: what loses to a neighbour may win after a step."""
        return any(way.rectifier.pool is not None for way in self.ways.values())

    @property
    def is_bounded(self) -> bool:
        """Whether of every split it is known what can change behind it."""
        return bool(self.ways) and len(self.ways) + len(self.tails) == len(self.places)


def rectified_network(found: RecordedNetwork, splits: Sequence[Split], attack: Attack) -> RectifiedNetwork | None:
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
        ways = {way.split.site: way for way in _ways(graph, backward, places, splits, rectifiers)}
        for split in splits:
            if split.site not in ways:
                _require_all_behind(graph, places[split.site], found.span(split))
    except UnreadableError:
        return None
    tails = frozenset(site for site, place in places.items() if site not in ways and _is_tail(graph, place))
    needed = None
    if len(ways) + len(tails) == len(splits):
        needed = needed_channels(backward, rectifiers, [places[site] for site in tails])
    return RectifiedNetwork(
        rectifiers=rectifiers,
        places=places,
        shapes={place: graph.shape(place)[1:] for place in places.values()},
        ways=ways,
        tails=tails,
        call_names=found.call_names,
        backward=backward,
        needed=needed,
        reach=None if needed is None else reach_of(found.calls, rectifiers, needed, list(ways.values()), attack),
    )


def _reads_data(calls: Sequence[Call]) -> bool:
    """Whether the network turns what it computes into Python data: other images may lead it to other layers."""
    read = (call for call in calls if call.producers and not tensors_in(call.result))
    return any(not tells_of_form(call.name) for call in read)


_POOLS_AND_VIEWS = VIEWS | {"avg_pool2d", "adaptive_avg_pool2d", "mean"}


def _require_maps(graph: CallGraph, first: int) -> None:
    """Raises UnreadableError where a result from the first split on is no precise tensor with a row for each image."""
    rows = set()
    for _, call in (item for item in graph if item[0] >= first):
        is_map = isinstance(call.result, Tensor) and call.result.dim() > 1 and bool(call.producers)
        if not is_map or call.result.dtype not in PRECISE:
            raise UnreadableError
        rows.add(len(call.result))
    if len(rows) > 1 or graph.calls[graph.output].result.dim() != 2:
        raise UnreadableError


def _rectifiers(graph: CallGraph, first: int) -> dict[int, Rectifier]:
    """Every rectifier behind the first split, by its position.

    Raises:
        UnreadableError: a max-pool is not behind one, so that it drops positions that no mask tells of.
    """
    found: dict[int, Rectifier] = {}
    for position, call in (item for item in graph if item[0] > first):
        bounds = rectified_range(call)
        if bounds is not None:
            found[position] = Rectifier(position, bounds, _max_pool_behind(graph, position))
        if call.name == "max_pool2d":
            before = found.get(call.producers[0])
            if before is None or before.pool is None:
                raise UnreadableError
    return found


def _max_pool_behind(graph: CallGraph, position: int) -> Windows | None:
    behind = [graph.calls[user] for user in graph.consumers[position]]
    is_pooled = len(behind) == 1 and behind[0].name == "max_pool2d"
    return Windows.of_pool(behind[0], graph.shape(position)) if is_pooled else None


def _ways(
    graph: CallGraph,
    backward: BackwardGraph,
    places: Mapping[Site, int],
    splits: Sequence[Split],
    rectifiers: Mapping[int, Rectifier],
) -> Iterator[Way]:
    """Those of the splits whose tensor feeds one rectifier, directly or by calls that keep positions and channels."""
    for split in splits:
        here = start = places[split.site]
        between: dict[int, Call] = {}
        while len(backward.links.get(here, ())) == 1:
            here, link = backward.links[here][0]
            if here in rectifiers:
                taken = {producer for call in between.values() for producer in call.producers}
                yield Way(split, start, between, rectifiers[here], frozenset(taken - {start, *between}))
                break
            call = graph.calls[here]
            if not (is_normalisation(call) or is_sum(graph, here)) or link.zeros:
                break
            between[here] = replace(call, result=None)


def _is_tail(graph: CallGraph, here: int) -> bool:
    """Whether only pools and views lie between a split's tensor and the layer that gives the logits, and behind it."""
    names = []
    while here != graph.output and len(graph.consumers[here]) == 1:
        here = graph.consumers[here][0]
        names.append(graph.calls[here].name)
    layers = [name for name in names if name not in _POOLS_AND_VIEWS]
    return here == graph.output and layers in (["linear"], ["conv2d"])


def _require_all_behind(graph: CallGraph, place: int, span: range) -> None:
    """Raises UnreadableError where some of what uses a split's tensor may have got it before, or beside, the split,
    where it leads nowhere, or where winners of a max-pool alone have gradients."""
    users = graph.consumers[place]
    if place not in span or any(user < span.stop for user in users) or not (users or place == graph.output):
        raise UnreadableError
    if any(graph.calls[user].name == "max_pool2d" for user in users):
        raise UnreadableError
