"""When counts of open channels alone prove that every gradient behind a rectifier arrives: along a path as well.

In a network of ungrouped convolutions, batch norms, additions, rectifiers, pools and linear layers, every position
hands its gradient on to every channel before it, if at every rectifier behind it more channels are open at each
position than there are output channels with a zero weight, windows leave no position out, and the predicted class's
row of the last layer is nowhere zero. Here is what weights and shapes say of that. It asks for more than the maps of
:mod:`.alive`, and it can be asked of every replay of a suffix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.call_graph import (
    CallGraph,
    UnreadableError,
    argument,
    is_normalisation,
    is_sum,
    weight_of,
)
from openood_sandi.detectors.sandi.windows import Windows
from openood_sandi.engine.recorded import Call

__all__ = ["POOLS", "VIEWS", "OpenChannels", "dead_channels"]

POOLS = frozenset(("avg_pool2d", "adaptive_avg_pool2d", "mean"))
VIEWS = frozenset(("flatten", "view", "reshape"))


class OpenChannels:
    """What counts of open channels say in a network.

    Args:
        graph: its calls.
        rectifiers: the positions of those among them.

    Raises:
        UnreadableError: they say nothing: a call is of another kind than those named at the top, or leaves some of its
            input out.
    """

    def __init__(self, graph: CallGraph, rectifiers: frozenset[int]) -> None:
        self._graph, self._rectifiers = graph, rectifiers
        self.calls, self.consumers = graph.calls, graph.consumers
        for position, call in graph:
            is_map = isinstance(call.result, Tensor)
            if not (is_map and self._is_covered(position) and self._is_known(position, call)):
                raise UnreadableError
        self.needed = {position: 1 + self._zero_weights(self.calls[position].producers[0]) for position in rectifiers}
        """For each rectifier how many channels must be open at a position for it to hand on gradients for certain."""

    def open_rows(self) -> Tensor:
        """(classes,): whether the row of the last layer is nowhere zero."""
        position = self._graph.output
        while position >= 0 and self.calls[position].name in (*POOLS, *VIEWS):
            position = self.calls[position].producers[0]
        if position < 0 or self.calls[position].name not in ("linear", "conv2d"):
            raise UnreadableError
        rows = (weight_of(self.calls[position]) != 0).flatten(1).all(1)
        if self.calls[self._graph.output].result.shape[1:] != rows.shape:
            raise UnreadableError
        return rows

    def _is_known(self, position: int, call: Call) -> bool:
        if position in self._rectifiers:
            return self._spreads(position)
        if is_normalisation(call) or is_sum(self._graph, position):
            return True
        return self._is_linear(call) or self._is_pool(position)

    def _is_linear(self, call: Call) -> bool:
        if call.name in ("linear", "conv2d") and bool((weight_of(call) == 0).all(0).any()):
            return False  # some input is not read at all
        return call.name == "linear" or (call.name == "conv2d" and argument(call, 6, "groups", 1) == 1)

    def _is_pool(self, position: int) -> bool:
        call = self.calls[position]
        if call.name == "mean":  # :mod:`.links` has seen that it keeps images apart
            before = self._graph.shape(call.producers[0])
            dims = argument(call, 1, "dim", None)
            return all(dim % len(before) > 1 for dim in ((dims,) if isinstance(dims, int) else dims))
        if call.name in ("pad", "__getitem__"):
            return bool(call.result.dim() == 4)
        return call.name in ("avg_pool2d", "adaptive_avg_pool2d", "max_pool2d") or self._is_view_of_positions(position)

    def _is_view_of_positions(self, position: int) -> bool:
        """Whether a view keeps images and channels apart, or is for linear layers alone, which read all there is."""
        call, behind = self.calls[position], self.consumers[position]
        if call.name not in VIEWS:
            return False
        kept = self._graph.shape(call.producers[0])[:2] == call.result.shape[:2]
        return kept or (bool(behind) and all(self.calls[p].name == "linear" for p in behind))

    def _spreads(self, position: int) -> bool:
        """Whether a layer that mixes channels reads all of the call's result, before another rectifier does."""
        for behind in self.consumers[position]:
            if self._is_linear(self.calls[behind]):
                return True
            if behind not in self._rectifiers and not dead_channels(self.calls[behind]) and self._spreads(behind):
                return True
        return False

    def _zero_weights(self, position: int) -> int:
        """In how many output channels, at most, an input of the layers before has a zero weight."""
        if position < 0:
            return 0
        call = self.calls[position]
        if call.name in ("linear", "conv2d"):
            return int((weight_of(call) == 0).sum(0).max())
        if position in self._rectifiers or call.name == "max_pool2d":
            return 0
        return dead_channels(call) + sum(self._zero_weights(producer) for producer in call.producers)

    def _is_covered(self, position: int) -> bool:
        """Whether every position of the call's result lies in some window of the calls that use it."""
        result, behind = self.calls[position].result, self.consumers[position]
        if result.dim() != 4 or not behind:
            return True
        partly = [self.calls[p] for p in behind if self.calls[p].name in ("conv2d", "avg_pool2d", "__getitem__")]
        if len(partly) < len(behind):
            return True
        covered = torch.zeros(1, 1, *result.shape[2:], dtype=torch.bool)
        for call in partly:
            if call.name != "__getitem__":
                covered |= _window(call, result)
        return bool(covered.all())


def dead_channels(call: Call) -> int:
    """How many channels a batch norm multiplies by zero; none for other calls."""
    scale = argument(call, 3, "weight", None) if call.name == "batch_norm" else None
    return int((scale == 0).sum()) if isinstance(scale, Tensor) else 0


def _window(call: Call, given: Tensor) -> Tensor:
    """Which positions (1, 1, H, W) of its input a convolution or an average pool reads."""
    is_pool = call.name == "avg_pool2d"
    windows = (
        Windows.of_pool(call, given.shape)
        if is_pool
        else Windows.of_convolution(call, given.shape, weight_of(call).shape[2:])
    )
    found = windows(torch.ones(1, 1, *call.result.shape[2:], dtype=torch.bool))
    return torch.ones(1, 1, *given.shape[2:], dtype=torch.bool) if found is None else found
