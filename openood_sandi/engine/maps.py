"""The feature maps of a recorded pass: which results are maps, which of them carry all that the logits see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

from openood_sandi.engine.axes import MOVES, PRODUCTS, ChannelAxes
from openood_sandi.engine.passes import Pass, first_tensor
from openood_sandi.engine.recorded import Call

__all__ = ["last_map", "upstream"]

_REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "max", "logsumexp", "norm", "std", "var", "avg_pool1d"))
_GLOBAL = _REDUCTIONS | {"avg_pool2d", "avg_pool3d", "lp_pool2d", "__getitem__", "select", "narrow", "index_select"}


def last_map(recorded: Pass, axes: ChannelAxes) -> int | None:
    """The tape position of the last feature map, None if the network has none.

    A feature map has channels and positions: maps (B, C, H, W) at any resolution, 1x1 included as long as no global
    pooling made it so, and tokens (B, N, D). Of these it is the last one that all paths from the images to the logits
    go through, which the insides of residual branches, attention and squeeze-and-excitation are not, and that is not
    a projection into attention heads. Where branches run side by side for the second half of the network or more, it is
    the last one on any path.
    """
    flow = _Flow(recorded, axes)
    cut = next(flow.maps(only_cuts=True), None)
    found = cut if cut is not None and 2 * cut > len(recorded.calls) else next(flow.maps(only_cuts=False), None)
    return None if found is None else flow.returned(recorded, found)


def upstream(calls: Sequence[Call], position: int) -> set[int]:
    """Tape positions of what the result at ``position`` was seen to be computed from, and -1, the images."""
    found = {-1, position}
    for earlier in range(min(position, len(calls) - 1), -1, -1):
        if earlier in found:
            found.update(calls[earlier].producers)
    return found


class _Flow:
    """What the calls of a pass hand on to each other, as far as the logits depend on it."""

    def __init__(self, recorded: Pass, axes: ChannelAxes) -> None:
        self._calls, self._axes = recorded.calls, axes
        self._end = recorded.made_by.get(id(recorded.output), len(self._calls) - 1)
        self._consumers: dict[int, list[int]] = defaultdict(list)
        self._live = {self._end}
        for position in range(self._end, -1, -1):
            if position in self._live:
                for producer in self._calls[position].producers:
                    self._live.add(producer)
                    self._consumers[producer].append(position)
        self._pooled: set[int] = set()
        for position in sorted(self._live):
            if position >= 0 and self._is_pooled(position):
                self._pooled.add(position)

    def maps(self, only_cuts: bool) -> Iterator[int]:
        """Tape positions of feature maps, last first."""
        cuts = self._cuts() if only_cuts else self._live
        for position in sorted(cuts, reverse=True):
            if position >= 0 and self._is_map(position) and not self._leads_to_heads(position):
                yield position

    def returned(self, recorded: Pass, position: int) -> int:
        """The map at ``position`` as a module returns it, if all that happens before is that it is moved about."""
        outputs = {id(layer.output) for layer in recorded.layers if layer.name}
        here = position
        while id(self._calls[here].result) not in outputs:
            (here, *others) = self._consumers[here] or [self._end]
            result = self._calls[here].result
            known = isinstance(result, Tensor) and result.dim() > 2 and self._axes[here] is not None
            if others or not known or self._calls[here].name not in MOVES or here in self._pooled:
                return position
        return here

    def _cuts(self) -> set[int]:
        """Results without which nothing of the images reaches the logits."""
        cuts: set[int] = set()
        reach = -1
        for position in sorted(self._live):
            if reach <= position:
                cuts.add(position)
            reach = max([reach, *self._consumers[position]])
        return cuts

    def _is_map(self, position: int) -> bool:
        call, axis = self._calls[position], self._axes[position]
        result = call.result
        if not isinstance(result, Tensor) or not result.is_floating_point() or axis is None or position in self._pooled:
            return False
        return result.dim() > 2 and call.name not in MOVES and not call.name.startswith("adaptive_")

    def _is_pooled(self, position: int) -> bool:
        """Whether a call, or one before it, pools all positions, and no spatial convolution makes a map since."""
        call = self._calls[position]
        result = first_tensor(call.result)
        if result is None or _is_spatial_convolution(call):
            return False
        if call.name in PRODUCTS or call.name == "scaled_dot_product_attention":
            if result.dim() > 2 and result.shape[-2] == 1 and any(map(self._has_rows, call.producers)):
                return True
        if call.name in _GLOBAL or call.name.startswith("adaptive_"):
            axis = self._axes[position]
            lengths = [length for i, length in enumerate(result.shape) if i not in (0, axis)]
            if axis is not None and all(length == 1 for length in lengths):
                return True
        return all(producer in self._pooled for producer in call.producers)

    def _has_rows(self, position: int) -> bool:
        """Whether more than one vector is what an attention pools here."""
        tensor = first_tensor(self._calls[position].result) if position >= 0 else None
        return tensor is not None and tensor.dim() > 2 and tensor.shape[-2] > 1

    def _leads_to_heads(self, position: int) -> bool:
        """Whether all that is done with the result is to cut its channels into the heads of an attention."""
        for consumer in self._consumers[position]:
            if self._calls[consumer].name not in MOVES:
                return False
            if self._axes[consumer] is not None and not self._leads_to_heads(consumer):
                return False
        return bool(self._consumers[position])


def _is_spatial_convolution(call: Call) -> bool:
    """Whether it is a convolution that sees more than one position."""
    weight = call.args[1] if len(call.args) > 1 else call.kwargs.get("weight")
    return call.name.startswith("conv") and isinstance(weight, Tensor) and weight[0, 0].numel() > 1
