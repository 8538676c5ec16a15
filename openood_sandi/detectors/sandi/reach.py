"""How far a perturbation of one split can reach behind it, and which rectifiers stay open all the same.

That the pattern of g_i is the rectifier's mask at z^{i-1} needs what the proof of :mod:`.rectifiers` needs, there: at
every rectifier behind the split, enough channels open at each position. They are, if at z^0 enough of them are open by
more than the perturbation can amount to. How much that is follows from the weights alone. In each unit

    |change of W z + b| <= |W| |change of z|,    |change of relu(z)| <= |change of z|,

a batch norm scales it, an addition adds two up. So one pass over absolute weights, from |change of z_j| <= (T - 1) eta
on, bounds it at every rectifier, for all images. Such a bound grows with every layer, by ten to a hundred times:
it proves what lies a few layers in front of the logits, and small networks; it says nothing about the first layers of
deep ones, whose images are then not proved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.detectors.sandi.call_graph import VIEWS, argument, weight_of
from openood_sandi.detectors.sandi.pooling import clearance
from openood_sandi.detectors.sandi.rectifier import Rectifier
from openood_sandi.detectors.sandi.ways import Way
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.recorded import Call, Site

__all__ = ["Margins", "Reach", "reach_of"]

_TOO_FAR = 1e3
"""No map has values like this at every position: what reaches as far proves nothing, and is not followed on."""
_ROUNDING = 1e-4
"""The rounding of a layer's sums, in shares of the largest value of its map."""
_STEP_ROUNDING = 1e-2
"""That of a step, in shares of eta: what it is at most where activations are not enormous, which is looked at."""


@dataclass(frozen=True)
class Reach:
    """By how much the rectifiers behind a split can change, for each split where that is small enough to say.

    Attributes:
        bounds: {site: {position of a rectifier: the bound}} for z^{T-1}; rectifiers out of its reach are left out.
        unbounded: the sites whose perturbation grows beyond any activation.
        sites: {position of a split's tensor: its sites}, of those in ``bounds``.
        rectifiers: those in ``bounds`` by position, and how many channels each needs.
        step_size: eta.
    """

    bounds: Mapping[Site, Mapping[int, float]]
    unbounded: frozenset[Site]
    sites: Mapping[int, Sequence[Site]]
    rectifiers: Mapping[int, tuple[Rectifier, int]]
    step_size: float


def reach_of(
    calls: Sequence[Call],
    rectifiers: Mapping[int, Rectifier],
    needed: Mapping[int, int],
    ways: Sequence[Way],
    attack: Attack,
) -> Reach:
    """How far the steps of an attack on the splits reach, from the calls of a recorded pass of the network."""
    distance = (attack.steps - 1) * attack.step_size * (1 + _STEP_ROUNDING)
    bounds: dict[Site, dict[int, float]] = {}
    sites: dict[int, list[Site]] = {}
    with torch.no_grad():
        for way in ways:
            reached = _followed(calls, rectifiers, way, distance)
            if reached is not None:
                bounds[way.split.site] = reached
                sites.setdefault(way.position, []).append(way.split.site)
    unbounded = frozenset(way.split.site for way in ways if way.split.site not in bounds)
    looked_at = {place: (rectifiers[place], needed[place]) for reached in bounds.values() for place in reached}
    return Reach(bounds, unbounded, sites, looked_at, attack.step_size)


def _followed(
    calls: Sequence[Call], rectifiers: Mapping[int, Rectifier], way: Way, distance: float
) -> dict[int, float] | None:
    """{position: bound} at the rectifiers behind a split, its own left out; None where it grows too large."""
    start = calls[way.position].result
    change = {way.position: torch.full_like(start[:1], distance)}
    reached: dict[int, float] = {}
    for position in range(way.position + 1, max(rectifiers) + 1):
        call = calls[position]
        if not isinstance(call.result, Tensor) or change.keys().isdisjoint(call.producers):
            continue
        found = change[call.producers[0]] if position in rectifiers else _through(call, change)
        if found is None:
            return None
        change[position] = found
        if position in rectifiers and position != way.rectifier.position:
            reached[position] = float(found.max())
            if not reached[position] < _TOO_FAR:
                return None
    return reached


def _through(call: Call, change: Mapping[int, Tensor]) -> Tensor | None:
    """What bounds the change of a call's result (1, ...), from what bounds that of its operands; None if unknown."""
    x = change.get(call.producers[0])
    if call.name in ("add", "__add__", "__radd__"):
        parts = [change[producer] for producer in call.producers if producer in change]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]
    if x is None:
        return None
    if call.name in ("conv2d", "linear"):
        names = ("stride", "padding", "dilation", "groups") if call.name == "conv2d" else ()
        options = {name: argument(call, 3 + k, name, None) for k, name in enumerate(names)}
        given = {name: value for name, value in options.items() if value is not None}
        weight = weight_of(call).abs()
        return F.conv2d(x, weight, None, **given) if call.name == "conv2d" else F.linear(x, weight)
    if call.name == "batch_norm":
        variance, scale = argument(call, 2, "running_var", None), argument(call, 3, "weight", None)
        slope = (variance + argument(call, 7, "eps", 1e-5)).rsqrt()
        slope = slope if scale is None else slope * scale.abs()
        return x * torch.as_tensor(slope).view(1, -1, *[1] * (x.dim() - 2))
    if call.name in VIEWS:
        return x.reshape(1, *call.result.shape[1:])
    if call.name == "avg_pool2d" and argument(call, 6, "divisor_override", None) is not None:
        return None
    if call.name in ("avg_pool2d", "adaptive_avg_pool2d", "mean", "max_pool2d", "pad", "__getitem__"):
        result: Tensor = call.rerun({call.producers[0]: x})
        return result
    return None


class Margins:
    """By how much the rectifiers of a pass are open at z^0, and which splits that proves at z^{i-1}.

    Args:
        reach: the network's.
    """

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._margins: dict[int, Tensor] = {}
        self._steps_as_they_are: dict[Site, Tensor] = {}

    def call(self, position: int, result: Tensor) -> None:
        """Looks at the ``result`` (B, K, ...) of a rectifier, or at a split's tensor."""
        if position in self._reach.rectifiers:
            self._margins[position] = _margin(result, *self._reach.rectifiers[position])
        if position in self._reach.sites:
            rounding = torch.finfo(result.dtype).eps * result.abs().flatten(1).amax(1)
            as_they_are = rounding < _STEP_ROUNDING * self._reach.step_size
            self._steps_as_they_are.update(dict.fromkeys(self._reach.sites[position], as_they_are))

    def proved(self) -> dict[Site, Tensor]:
        """{site: (B,)}: the images whose rectifiers behind a split stay open at z^{i-1}; not of unbounded splits."""
        proved = {}
        for site, bounds in self._reach.bounds.items():
            proved[site] = self._steps_as_they_are[site]
            for position, bound in bounds.items():
                proved[site] = proved[site] & (self._margins[position] > bound)
        return proved


def _margin(result: Tensor, rectifier: Rectifier, needed: int) -> Tensor:
    """(B,): the largest change that leaves, at every position, as many channels open as it takes."""
    low, high = rectifier.bounds
    open_by = torch.minimum(result - low, high - result) if high < float("inf") else result - low
    if rectifier.pool is not None:
        open_by = torch.minimum(open_by, clearance(result, rectifier.pool) / 2)
    enough = open_by.amax(1) if needed == 1 else _largest(open_by, needed)
    largest = result.abs().flatten(1).amax(1)
    return enough.reshape(len(result), -1).amin(1) - _ROUNDING * largest


def _largest(values: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest over the channels of (B, K, ...); 0 where there are fewer."""
    if rank > values.shape[1]:
        return torch.zeros_like(values[:, 0])
    return values.topk(rank, dim=1).values[:, -1]
