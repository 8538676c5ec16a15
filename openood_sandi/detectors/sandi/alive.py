"""Where gradients are zero and where they are not, carried back from the logits as maps of True and False.

A backward pass multiplies and adds. A sum of products of which some are not zero is itself zero only by coincidence
(one position in 5e8 in float32), so where a gradient is not zero is known from where those behind it are not, and from
which weights are: no gradient has to be computed. :func:`walk_back` does that for one batch, from the masks of its
rectifiers; :mod:`.links` says what each kind of call hands back.

Most maps need one channel: a convolution without zero weights hands its gradients on to all channels of its input
alike. Only behind a rectifier, in depthwise convolutions and on the ways around a block do channels differ. And where
all of a map is True, it is not kept at all, and nothing is computed of what else leads there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BackwardGraph", "Link", "Where", "conjunction", "everywhere_as_none", "union", "walk_back"]

Where = Tensor | None
"""True in some places of a tensor (B, K, ...): a map of its dimensions, each as long as the tensor's or, where that
does not matter, 1. None is True everywhere."""


class Link(NamedTuple):
    """What a call hands back to one of its operands.

    Attributes:
        back: from where its result's gradient is not zero to where that of the operand is not.
        possibly: the same, with the places where it is not known; None where it is known everywhere. They are those
            of overlapping windows of a max-pool, in front of which a rectifier is.
        zeros: where more than so many channels are open at a position, no weight that is zero keeps them from handing
            their gradient on; infinite where no number of channels is enough.
        spreads: whether they then hand it on to every channel: those of a layer that mixes all of them.
    """

    back: Callable[[Where], Where]
    possibly: Callable[[Where], Where] | None = None
    zeros: float = 0
    spreads: bool = False


@dataclass(frozen=True)
class BackwardGraph:
    """The ways of gradients from the logits back, at one shape of images and one state of the weights.

    Attributes:
        output: the position of the call whose result the logits (B, classes) are.
        links: for each position, from the last to the first, the calls that use its result and what they hand back;
            those first that hand on to all channels alike. A rectifier's link changes nothing: its mask does.
    """

    output: int
    links: Mapping[int, Sequence[tuple[int, Link]]]


def walk_back(
    graph: BackwardGraph, open_: MutableMapping[int, Tensor], labels: Tensor, classes: int, unclear: Tensor
) -> Iterator[tuple[int, Where]]:
    """Where the gradient of logit ``labels[b]`` of each image b is not zero, position by position, the last first.

    Args:
        graph: the ways back.
        open_: by position of each rectifier, the units (B, K, ...) that let their input through, less those that lose
            in a max-pool right behind. Each is taken out of the mapping where it is used, so that it can be freed.
        labels: (B,) int64.
        classes: the number of logits.
        unclear: (B,) bool, set to True for the images of which it cannot be told.

    Yields:
        Positions, and where the gradient of the call's result there is not zero.
    """
    patterns = {graph.output: everywhere_as_none(F.one_hot(labels, classes).bool())}
    needed_until = {user: position for position, links in graph.links.items() for user, _ in links}
    yield graph.output, patterns[graph.output]
    for position, links in graph.links.items():
        where = _handed_back(links, patterns)
        yield position, where
        if position in open_:
            mask = open_.pop(position)
            if links[0][1].possibly is not None and where is not None:
                possibly = links[0][1].possibly(patterns[links[0][0]])
                doubtful = mask & ~where if possibly is None else mask & possibly & ~where
                unclear |= doubtful.flatten(1).any(1)
            where = mask if where is None else conjunction(mask, where)
        patterns[position] = where
        for user, _ in links:
            if needed_until[user] == position:
                patterns.pop(user, None)


def _handed_back(links: Sequence[tuple[int, Link]], patterns: Mapping[int, Where]) -> Where:
    """Where a gradient is not zero that is the sum of what the calls behind hand back."""
    (user, link), *others = links
    where = link.back(patterns[user])
    for user, link in others:
        if where is None:
            break
        where = union(where, link.back(patterns[user]))
    return where


def conjunction(one: Tensor, other: Tensor) -> Tensor:
    """Where both are True."""
    # on CPUs, up to thirty times as fast as ``one & other`` where one of them is broadcast over the last dimension
    return (one.view(torch.uint8) & other.view(torch.uint8)).view(torch.bool)


def union(one: Where, other: Where) -> Where:
    """Where at least one is True: a sum of the two is not zero there, but for a coincidence."""
    return None if one is None or other is None else everywhere_as_none(one | other)


def everywhere_as_none(where: Tensor) -> Where:
    """None where all of a map is True. On a GPU, to look would be to wait for it, so a map stays one."""
    if where.device.type == "cpu" and bool(where.view(torch.uint8).amin()):
        return None
    return where
