"""Where gradients are zero and where they are not, carried back from the logits as maps of True and False.

A backward pass multiplies and adds. A sum of products of which some are not zero is itself zero only by coincidence
(one position in 5e8 in float32), so where a gradient is not zero is known from where those behind it are not, and from
which weights are: no gradient has to be computed. :func:`walk_back` does that for one batch, from the masks of its
rectifiers; :mod:`.links` says what each kind of call hands back.

Most maps need one channel: a convolution without zero weights hands its gradients on to all channels of its input
alike. Only behind a rectifier, in depthwise convolutions and on the ways around a block do channels differ. And where
all of a map is True, it is not kept at all, and nothing is computed of what else leads there.

What cannot be told stays open: each map is a :class:`Pattern` of two, where a gradient is not zero for certain and
where it may be. They differ where weights are zero, where windows of a max-pool overlap, and where it is not known
which units of a rectifier are open: along a path (Eq. 9), masks of what is surely and of what is possibly open
give what is surely and what is possibly not zero in g_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BackwardGraph",
    "Link",
    "Pattern",
    "Where",
    "conjunction",
    "either",
    "everywhere_as_none",
    "union",
    "walk_back",
]

Where = Tensor | None
"""True in some places of a tensor (B, K, ...): a map of its dimensions, each as long as the tensor's or, where that
does not matter, 1. None is True everywhere."""


class Pattern(NamedTuple):
    """Where a tensor is not zero, as far as that is known.

    Attributes:
        surely: where it is not zero.
        possibly: where it is not known to be zero; the same object where all is known.
    """

    surely: Where
    possibly: Where

    @classmethod
    def known(cls, where: Where) -> Pattern:
        """One of which all is known."""
        return cls(where, where)

    def each(self, change: Callable[[Where], Where]) -> Pattern:
        """Both maps changed alike, once where they are one."""
        surely = change(self.surely)
        return Pattern(surely, surely if self.possibly is self.surely else change(self.possibly))


class Link(NamedTuple):
    """What a call hands back to one of its operands.

    Attributes:
        back: from the pattern of its result's gradient to that of the operand's.
        zeros: where more than so many channels are open at a position, no weight that is zero keeps them from handing
            their gradient on; infinite where no number of channels is enough.
        spreads: whether they then hand it on to every channel: those of a layer that mixes all of them.
    """

    back: Callable[[Pattern], Pattern]
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
    graph: BackwardGraph, open_: MutableMapping[int, Pattern], labels: Tensor, classes: int
) -> Iterator[tuple[int, Pattern]]:
    """The pattern of the gradient of logit ``labels[b]`` of each image b, position by position, the last first.

    Args:
        graph: the ways back.
        open_: by position of each rectifier, the units (B, K, ...) that let their input through, less those that lose
            in a max-pool right behind. In a pass whose values are known, all is known of them; see :class:`Pattern`
            for one whose values are not. Each is taken out of the mapping where it is used, so that it can be freed.
        labels: (B,) int64.
        classes: the number of logits.

    Yields:
        Positions, and where the gradient of the call's result there is not zero.
    """
    pattern = Pattern.known(everywhere_as_none(F.one_hot(labels, classes).bool()))
    patterns = {graph.output: pattern}
    needed_until = {user: position for position, links in graph.links.items() for user, _ in links}
    yield graph.output, pattern
    for position, links in graph.links.items():
        pattern = _handed_back(links, patterns)
        yield position, pattern
        patterns[position] = both(pattern, open_.pop(position)) if position in open_ else pattern
        for user, _ in links:
            if needed_until[user] == position:
                patterns.pop(user, None)


def _handed_back(links: Sequence[tuple[int, Link]], patterns: Mapping[int, Pattern]) -> Pattern:
    """The pattern of a gradient that is the sum of what the calls behind hand back."""
    pattern = links[0][1].back(patterns[links[0][0]])
    for user, link in links[1:]:
        if pattern.surely is None:
            break
        pattern = either(pattern, link.back(patterns[user]))
    return pattern


def both(one: Pattern, other: Pattern) -> Pattern:
    """Where both are not zero."""
    surely = _and(one.surely, other.surely)
    if one.possibly is one.surely and other.possibly is other.surely:
        return Pattern.known(surely)
    return Pattern(surely, _and(one.possibly, other.possibly))


def either(one: Pattern, other: Pattern) -> Pattern:
    """Where at least one is not zero: of a sum of the two, but for a coincidence."""
    surely = union(one.surely, other.surely)
    if surely is None or (one.possibly is one.surely and other.possibly is other.surely):
        return Pattern.known(surely)
    return Pattern(surely, union(one.possibly, other.possibly))


def _and(one: Where, other: Where) -> Where:
    if one is None or other is None:
        return other if one is None else one
    return conjunction(one, other)


def conjunction(one: Tensor, other: Tensor) -> Tensor:
    """Where both are True."""
    # on CPUs, up to thirty times as fast as ``one & other`` where one of them is broadcast over the last dimension
    return (one.view(torch.uint8) & other.view(torch.uint8)).view(torch.bool)


def union(one: Where, other: Where) -> Where:
    """Where at least one is True."""
    if one is None or other is None:
        return None
    return everywhere_as_none(one | other)


def everywhere_as_none(where: Tensor) -> Where:
    """None where all of a map is True. On a GPU, to look would be to wait for it, so a map stays one."""
    if where.device.type == "cpu" and bool(where.view(torch.uint8).amin()):
        return None
    return where
