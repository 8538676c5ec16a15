"""The calls of a recorded pass that lead from the images to the logits, and who uses their results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor

from openood_sandi.engine.recorded import Call

__all__ = ["VIEWS", "CallGraph", "UnreadableError", "argument", "is_normalisation", "is_sum", "weight_of"]

VIEWS = frozenset(("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone"))
"""Calls that give all of their operand, in its order."""


class UnreadableError(Exception):
    """The network has something that no mask tells of."""


class CallGraph:
    """The calls by position, and those that use the result of each.

    Args:
        calls: of a recorded pass.
        output: the position of the call whose result the logits are.
    """

    def __init__(self, calls: Sequence[Call], output: int) -> None:
        self.calls, self.output = calls, output
        self.consumers: dict[int, list[int]] = defaultdict(list)
        """For each position the calls that use its result, one as often as it does."""
        waiting, used = [output], {output}
        while waiting:  # results that do not reach the logits hand on no gradient: not even listed
            position = waiting.pop()
            for producer in calls[position].producers:
                self.consumers[producer].append(position)
                if producer >= 0 and producer not in used:
                    used.add(producer)
                    waiting.append(producer)
        self.positions = sorted(used)
        """Those of the calls that lead to the logits."""

    def __iter__(self) -> Iterator[tuple[int, Call]]:
        for position in self.positions:
            yield position, self.calls[position]

    def shape(self, position: int) -> Size:
        """Of the result of a call that has one tensor.

        Raises:
            UnreadableError: there is none, as for the images, at position -1.
        """
        result = self.calls[position].result if position >= 0 else None
        if not isinstance(result, Tensor):
            raise UnreadableError
        return result.shape


def argument(call: Call, place: int, name: str, default: Any) -> Any:
    """The argument of a call, given by its place or by its name."""
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)


def weight_of(call: Call) -> Tensor:
    """Of a convolution or a linear layer.

    Raises:
        UnreadableError: it is computed from the images.
    """
    weight = argument(call, 1, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnreadableError
    return weight


def is_normalisation(call: Call) -> bool:
    """Whether the call is a batch norm in eval mode: it multiplies channels by numbers of their own."""
    # torch.batch_norm has the same name and its arguments in another order
    is_norm = call.name == "batch_norm" and call.func is F.batch_norm and len(call.producers) == 1
    return is_norm and argument(call, 5, "training", False) is False


def is_sum(graph: CallGraph, position: int) -> bool:
    """Whether the call is a plain addition of two results of one shape."""
    call = graph.calls[position]
    if call.name not in ("add", "__add__", "__radd__") or len(call.producers) != 2 or len(set(call.producers)) != 2:
        return False
    if min(call.producers) < 0 or call.kwargs.get("alpha", 1) != 1:
        return False
    return len({graph.shape(p) for p in (*call.producers, position)}) == 1
