"""E_jk = the share of positions where activation j lets channel k through, by one forward pass alone.

An activation lets through what is positive and below its upper clip, where it has one: the mask of ReLU and ReLU6, and
the same quantity for GELU, SiLU, Mish, hard-swish, leaky and parametric ReLUs and the rest of their kin. Sigmoid, tanh
and softmax are gates and none of these, and neither is any activation of a single position: those of squeeze-and-excite
branches, and of linear layers behind the last pool.

Calls are seen by a :class:`torch.overrides.TorchFunctionMode`, as modules or as functions, in place or not: it holds in
its own thread and its own pass, so that nothing is hung onto the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openood_sandi.engine import checks

__all__ = ["ActivationPass", "Counting", "activation_input", "activation_pass", "counts"]

_ALIKE = (
    *("relu", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "softplus"),
    *("gelu", "silu", "mish", "hardswish"),
)
_HEADS = frozenset(("linear", "conv2d"))
_Clip = Callable[[Sequence[Any], Mapping[str, Any]], Any]


def _argument(position: int, name: str, default: float | None) -> _Clip:
    return lambda args, kwargs: args[position] if len(args) > position else kwargs.get(name, default)


_CLIPS: dict[str, _Clip] = {
    **dict.fromkeys((*_ALIKE, "clamp_min"), lambda *_: math.inf),
    "relu6": lambda *_: 6.0,
    "hardtanh": _argument(2, "max_val", 1.0),
    **dict.fromkeys(("clamp", "clip"), _argument(2, "max", math.inf)),
}
"""By the name of an activation's function, its upper clip from its arguments."""
_CLIPS |= {f"{name}_": clip for name, clip in _CLIPS.items()}  # in place
_FLOORS = {"clamp": "min", "clip": "min", "clamp_min": "min"}
"""Functions that are rectifiers only where this argument is 0."""


@dataclass
class ActivationPass:
    """What one pass tells.

    Attributes:
        logits: (B, classes).
        counts: {number of the activation call: how many positions it lets through (B, K_j)}.
        positions: {the same: and of how many, R_j S_j}.
        feature: the input (B, D) of the last linear layer or 1x1 convolution, its weight (C, D) and its result (B, C).
    """

    logits: Tensor
    counts: dict[int, Tensor]
    positions: dict[int, int]
    feature: tuple[Tensor, Tensor, Tensor] | None


@torch.no_grad()
def activation_pass(net: nn.Module, x: Tensor, axes: Sequence[int | None]) -> ActivationPass:
    """One pass of ``net`` over images ``x`` (B, C, H, W), whose activation calls are known.

    Args:
        net: a classifier in eval mode.
        x: the images.
        axes: for each activation call in order, the dimension of its input that counts channels; None leaves it out.

    Raises:
        ValueError: it calls other activations than these.
    """
    with Counting(axes) as counting:
        logits = net(x)
    checks.require_logits(logits)
    seen = len(counting.shapes)
    if seen != len(axes):
        raise ValueError(
            f"the network called {seen} activations for these images and {len(axes)} for the first ones; "
            "expected a network whose calls do not depend on the images. Use one detector for each of its paths"
        )
    feature = None if counting.last is None else _feature(*counting.last)
    return ActivationPass(logits, counting.counts, counting.positions, feature)


class Counting(TorchFunctionMode):
    """Counts what activations let through, while it is entered.

    Args:
        axes: as of :func:`activation_pass`; calls beyond these are left out as well.

    Attributes:
        shapes: of the input of each call.
        counts, positions: as of :class:`ActivationPass`.
        last: arguments and result of the last layer that may give the logits.
    """

    def __init__(self, axes: Sequence[int | None] = ()) -> None:
        super().__init__()
        self.axes = axes
        self.shapes: list[tuple[int, ...]] = []
        self.counts: dict[int, Tensor] = {}
        self.positions: dict[int, int] = {}
        self.last: tuple[Sequence[Any], Mapping[str, Any], Any] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        given = activation_input(func, args, kwargs) if name in _CLIPS else None
        if given is not None:  # before the call, which may write into its input
            self._count(*given)
        result = func(*args, **kwargs)
        if name in _HEADS:
            self.last = args, kwargs, result
        return result

    def _count(self, x: Tensor, clip: float) -> None:
        seen = len(self.shapes)
        axis = self.axes[seen] if seen < len(self.axes) else None
        if axis is not None:
            self.counts[seen] = counts(x, clip, axis)
            self.positions[seen] = math.prod(size for dim, size in enumerate(x.shape) if dim not in (0, axis))
        self.shapes.append(tuple(x.shape))


def activation_input(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, float] | None:
    """An activation's input and its upper clip (infinity without one); None for any other call."""
    name = getattr(func, "__name__", "")
    if name not in _CLIPS:
        return None
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    floor = _FLOORS.get(name.rstrip("_"))
    low = _argument(1, floor, None)(args, kwargs) if floor else 0
    if not isinstance(low, (int, float)) or low != 0:  # also a tensor of floors
        return None
    clip = _CLIPS[name](args, kwargs)
    return (x, math.inf if clip is None else clip) if isinstance(clip, (int, float, type(None))) else None


def counts(x: Tensor, clip: float, axis: int) -> Tensor:
    """At how many positions 0 < x < clip: (B, K) in float32, of pre-activations whose ``axis`` counts the channels."""
    dims = [dim for dim in range(1, x.dim()) if dim != axis]
    # numbers are several times faster to make and add up than a boolean mask, and exact up to 2^24
    if math.isinf(clip):
        return torch.gt(x, 0, out=torch.empty_like(x, dtype=torch.float32)).sum(dims)
    # the derivative of clipping, in one step; NaN counts there, and makes the logits NaN
    mask: Tensor = torch.ops.aten.hardtanh_backward(x.new_ones(()).expand_as(x), x, 0, clip)
    return mask.sum(dims, dtype=torch.float32)


def _feature(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    given, weight = (args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(("input", "weight")))
    if isinstance(given, Tensor) and isinstance(weight, Tensor) and isinstance(result, Tensor):
        return given, weight, result
    return None
