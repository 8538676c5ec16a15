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

from openood_sandi.detectors.sandi.call_graph import argument, weight_of
from openood_sandi.detectors.sandi.pooling import clearance
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork, Rectifier
from openood_sandi.detectors.sandi.ways import Way
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.recorded import Call, Site
from openood_sandi.engine.splits import RecordedNetwork

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
        positions: {position of a split's tensor: its site}, of those in ``bounds``.
        step_size: eta.
    """

    bounds: Mapping[Site, Mapping[int, float]]
    unbounded: frozenset[Site]
    positions: Mapping[int, Site]
    step_size: float

    @property
    def rectifiers(self) -> frozenset[int]:
        """The positions of all rectifiers that have to be looked at."""
        return frozenset(position for bounds in self.bounds.values() for position in bounds)


def reach_of(found: RecordedNetwork, rectified: RectifiedNetwork, ways: Sequence[Way], attack: Attack) -> Reach:
    """How far the steps of an attack on the splits reach, from a recorded pass of the network.

    Nobody asks where counts of open channels prove nothing: there all are unbounded.
    """
    if not rectified.is_counted:
        return Reach({}, frozenset(rectified.places), {}, attack.step_size)
    distance = (attack.steps - 1) * attack.step_size * (1 + _STEP_ROUNDING)
    bounds: dict[Site, dict[int, float]] = {}
    unbounded: set[Site] = set()
    with torch.no_grad():
        for way in ways:
            reached = _followed(found.calls, rectified, way, distance)
            if reached is None:
                unbounded.add(way.split.site)
            else:
                bounds[way.split.site] = reached
    positions = {way.position: way.split.site for way in ways if way.split.site in bounds}
    return Reach(bounds, frozenset(unbounded), positions, attack.step_size)


def _followed(calls: Sequence[Call], rectified: RectifiedNetwork, way: Way, distance: float) -> dict[int, float] | None:
    """{position: bound} at the rectifiers behind a split, its own left out; None where it grows too large."""
    start = calls[way.position].result
    change = {way.position: torch.full_like(start[:1], distance)}
    reached: dict[int, float] = {}
    last = max(rectified.rectifiers)
    for position in range(way.position + 1, last + 1):
        call = calls[position]
        before = [change.get(producer) for producer in call.producers]
        if not isinstance(call.result, Tensor) or all(each is None for each in before):
            continue
        if position in rectified.rectifiers:
            change[position] = changed = change[call.producers[0]]
            if position != way.rectifier.position:
                reached[position] = float(changed.max())
                if not reached[position] < _TOO_FAR:
                    return None
            continue
        found = _through(call, change)
        if found is None:
            return None
        change[position] = found
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
    if call.name in ("flatten", "view", "reshape"):
        return x.reshape(1, *call.result.shape[1:])
    if call.name == "avg_pool2d" and argument(call, 6, "divisor_override", None) is not None:
        return None
    if call.name in ("avg_pool2d", "adaptive_avg_pool2d", "mean", "max_pool2d", "pad", "__getitem__"):
        result = call.rerun({call.producers[0]: x})
        return result if isinstance(result, Tensor) else None
    return None


class Margins:
    """By how much the rectifiers of a pass are open at z^0, and which splits that proves at z^{i-1}.

    Args:
        reach: the network's.
        rectified: its rectifiers.
    """

    def __init__(self, reach: Reach, rectified: RectifiedNetwork) -> None:
        self._reach = reach
        self._rectifiers = {position: rectified.rectifiers[position] for position in reach.rectifiers}
        self._margins: dict[int, Tensor] = {}
        self._steps_as_they_are: dict[Site, Tensor] = {}

    def call(self, position: int, result: Tensor) -> None:
        """Looks at the ``result`` (B, K, ...) of a rectifier, or at a split's tensor."""
        if position in self._rectifiers:
            self._margins[position] = _margin(result, self._rectifiers[position])
        site = self._reach.positions.get(position)
        if site is not None:
            rounding = torch.finfo(result.dtype).eps * result.abs().flatten(1).amax(1)
            self._steps_as_they_are[site] = rounding < _STEP_ROUNDING * self._reach.step_size

    def proved(self, site: Site) -> Tensor | None:
        """(B,): the images whose rectifiers behind a split stay open at z^{i-1}; None for none."""
        if site in self._reach.unbounded:
            return None
        proved = self._steps_as_they_are[site]
        for position, bound in self._reach.bounds[site].items():
            proved = proved & (self._margins[position] > bound)
        return proved

    def proved_everywhere(self) -> Tensor | None:
        """(B,): the images of which that holds for all splits; None for none."""
        if self._reach.unbounded:
            return None
        proved = [self.proved(site) for site in self._reach.bounds]
        return torch.stack([each for each in proved if each is not None]).all(0)


def _margin(result: Tensor, rectifier: Rectifier) -> Tensor:
    """(B,): the largest change that leaves, at every position, as many channels open as it takes."""
    low, high = rectifier.bounds
    open_by = torch.minimum(result - low, high - result) if high < float("inf") else result - low
    if rectifier.pool is not None:
        open_by = torch.minimum(open_by, clearance(result, rectifier.pool[1]) / 2)
    enough = open_by.amax(1) if rectifier.needed == 1 else _largest(open_by, rectifier.needed)
    largest = result.abs().flatten(1).amax(1)
    return enough.reshape(len(result), -1).amin(1) - _ROUNDING * largest


def _largest(values: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest over the channels of (B, K, ...); 0 where there are fewer."""
    if rank > values.shape[1]:
        return torch.zeros_like(values[:, 0])
    return values.topk(rank, dim=1).values[:, -1]
