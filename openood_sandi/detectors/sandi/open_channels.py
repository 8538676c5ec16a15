"""When counts of open channels alone prove that every gradient behind a rectifier arrives: along a path as well.

A layer that mixes channels hands its gradient on to every channel before it if more channels are open at each position
than there are zeros among the weights of any one input. So if that holds at every rectifier, windows leave no position
out and the last layer has no weight of zero, then every position of every rectifier's result has a gradient. Here is
what weights and shapes, as :class:`.alive.Link` has them, say of that. It asks for more than the maps of
:mod:`.alive`, and it can be asked of every replay of a suffix.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import reduce

import torch

from openood_sandi.detectors.sandi.alive import BackwardGraph, Where

__all__ = ["needed_channels"]


def needed_channels(graph: BackwardGraph, rectifiers: Collection[int], tails: Collection[int]) -> dict[int, int] | None:
    """For each of the ``rectifiers`` how many channels must be open at each position of its result.

    Args:
        graph: the ways of gradients back.
        rectifiers: their positions.
        tails: positions of other results that are to have gradients everywhere.

    Returns:
        None where no number of channels proves that the results of all of these have.
    """
    full: set[int] = set()
    """Positions of results that have gradients everywhere if so many are open; those of ``open_`` in enough channels
    of each position."""
    open_ = {graph.output}
    for position, links in graph.links.items():
        everywhere = [
            link.back(None)
            for user, link in links
            if (user in full and user not in rectifiers) or (link.spreads and user in full | open_)
        ]
        kept = [link for user, link in links if user in open_.union(rectifiers) and link.zeros < math.inf]
        if _are_everywhere(everywhere):
            full.add(position)
        elif _are_everywhere([_in_any_channel(link.back(None)) for link in kept]):
            open_.add(position)
    zeros = _zeros(graph, rectifiers)
    # one of the logits has a gradient, and no more
    if zeros.get(graph.output, 0) > 0 or not full.issuperset((*rectifiers, *tails)):
        return None
    return {position: 1 + zeros.get(position, 0) for position in rectifiers}


def _zeros(graph: BackwardGraph, rectifiers: Collection[int]) -> dict[int, int]:
    """By position, :attr:`.alive.Link.zeros` from there back to the last layers that mix channels, at most."""
    zeros: dict[int, int] = {}
    for position in sorted(graph.links):
        for user, link in graph.links[position]:
            before = 0 if link.spreads else None if position in rectifiers else zeros.get(position)
            if before is not None and link.zeros < math.inf:
                zeros[user] = max(zeros.get(user, 0), before + int(link.zeros))
    return zeros


def _in_any_channel(where: Where) -> Where:
    return None if where is None else where.any(1, keepdim=True)


def _are_everywhere(maps: list[Where]) -> bool:
    """Whether there are some, and at least one is True at each place."""
    known = [where for where in maps if where is not None]
    return len(known) < len(maps) or (bool(known) and bool(reduce(torch.logical_or, known).all()))
