"""Which activations of a network count, and which of them end its stages: found once, on one image.

A stage ends where :func:`openood_sandi.engine.features.stages` says; its activation is the last one called by then and
since the stage before, and the last stage's the last of all. In a network whose activations all have one resolution,
as a vision transformer's, three equal consecutive parts of them stand for stages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openood_sandi.detectors.sandi.activation_shares import Counting, activation_input
from openood_sandi.engine.axes import ChannelAxes, usual_channel_axis
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.features import hooked, require_called, stages
from openood_sandi.engine.passes import record_pass

__all__ = ["Activations", "Stages", "find_activations"]

_PARTS = 3


@dataclass(frozen=True)
class Stages:
    """The option ``stages``: the last so many, or the modules that end them.

    Raises:
        ValueError: it is neither.
    """

    option: str | Sequence[str]

    def __post_init__(self) -> None:
        if not self.names or not all(isinstance(name, str) and name for name in self.names):
            raise ValueError(f'stages={self.option!r}: expected "last_3", "last_2", ... or names of modules')

    @property
    def names(self) -> list[str]:
        return [n.strip() for n in self.option.split(",")] if isinstance(self.option, str) else list(self.option)

    @property
    def last(self) -> int | None:
        """N of "last_N", None for names."""
        found = re.fullmatch(r"last_([1-9]\d*)", self.names[0])
        return int(found[1]) if found and len(self.names) == 1 else None


@dataclass(frozen=True)
class Activations:
    """The activation calls of a network, in order.

    Attributes:
        axes: the dimension of each one's input that counts channels; None where it does not count.
        ends: {stage: the number of the call that ends it}.
    """

    axes: tuple[int | None, ...]
    ends: Mapping[str, int]

    @property
    def axes_of_ends(self) -> tuple[int | None, ...]:
        """The same, where only those that end stages count."""
        return tuple(axis if i in self.ends.values() else None for i, axis in enumerate(self.axes))


def find_activations(net: nn.Module, x: Tensor, wanted: Stages) -> Activations:
    """The activations of ``net``, seen on the first of the images ``x`` (B, C, H, W).

    Raises:
        ValueError: the network calls no activation on maps, or not so many stages or no module as ``wanted``.
    """
    x = x[:1]
    if wanted.last is None:
        require_called(net, x, wanted.names)
    names = stages(net, x) if wanted.last else tuple(wanted.names)
    shapes, ends = _shapes(net, x, names)
    axes = tuple(map(_axis, shapes, _channel_axes(net, x, shapes)))
    counted = [i for i, axis in enumerate(axes) if axis is not None]
    if not counted:
        raise ValueError(
            "the network calls no activation (ReLU, GELU, SiLU, hard-swish and their kin) on maps of more than one "
            "position, or calls them where torch's function mode does not see them (TorchScript, custom functions); "
            "S&I-C needs some. SandI has split points of other kinds"
        )
    found = _ends(counted, ends, is_last=wanted.last is not None)
    resolutions = {math.prod(shapes[i]) // shapes[i][axes[i] or 0] for i in counted}
    if wanted.last is not None and (len(resolutions) == 1 or not found):
        found = _parts(counted)
    if not found:
        raise ValueError(f"stages={wanted.option!r}: no activation on maps is called by the end of these modules")
    return Activations(axes, dict(list(found.items())[-(wanted.last or 0) :]))


def _ends(counted: Sequence[int], ends: Mapping[str, int], is_last: bool) -> dict[str, int]:
    """{stage: the last activation that counts, called before its end and since that of the stage before}."""
    found: dict[str, int] = {}
    start = 0
    for place, (name, end) in enumerate(sorted(ends.items(), key=lambda each: each[1])):
        # a norm and its activation may come behind the last stage
        is_end = is_last and place == len(ends) - 1
        stop = len(counted) if is_end else sum(i < end for i in counted)
        if stop > start:
            found[name], start = counted[stop - 1], stop
    return found


def _parts(counted: Sequence[int]) -> dict[str, int]:
    """The last activations of three equal consecutive parts, or of fewer where there are not so many."""
    parts = min(_PARTS, len(counted))
    lasts = [counted[math.ceil(len(counted) * part / parts) - 1] for part in range(1, parts + 1)]
    return {f"activation {last + 1}": last for last in lasts}


def _axis(shape: Sequence[int], axis: int) -> int | None:
    """The channels' dimension where the call counts: one row an image, channels, and more than one position."""
    if len(shape) < 3 or shape[0] != 1 or not 0 < axis < len(shape):
        return None
    return axis if math.prod(shape) > shape[axis] else None


# ---------------------------------------------------------------------------------------- one pass each


def _shapes(net: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[list[tuple[int, ...]], dict[str, int]]:
    """The shape of each activation's input, and {module: how many there are when it returns for the last time}."""
    ends: dict[str, int] = {}
    counting = Counting()

    def returned(name: str, _: Tensor, __: Tensor) -> None:
        ends[name] = len(counting.shapes)

    with torch.no_grad(), hooked({name: net.get_submodule(name) for name in names}, returned), counting:
        net(x)
    return counting.shapes, ends


def _channel_axes(net: nn.Module, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[int]:
    """The channels' dimension of each activation's input, as recorded; as usual, where recording tells none."""
    usual = [usual_channel_axis(len(shape)) for shape in shapes]
    try:
        recorded = record_pass(net, x)
    except (ReplayError, RuntimeError):
        return usual
    axes = ChannelAxes(recorded)
    calls = [call for call in recorded.calls if activation_input(call.func, (x, *call.args[1:]), call.kwargs)]
    if len(calls) != len(shapes):
        return usual
    found = [axes[call.producers[0]] if call.producers else None for call in calls]
    return [axis if axis is not None else otherwise for axis, otherwise in zip(found, usual, strict=True)]
