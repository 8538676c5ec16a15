"""Tensors that carry several perturbed copies ("lanes") of one clean tensor, and torch calls on them.

A lane tensor has shape ``(lanes, *clean.shape)``. Lane ``i`` holds what the tensor would be had split ``i`` alone been
perturbed. Operands that a perturbation never reached are ordinary tensors; an operand reached by fewer lanes than
its partner is padded with its clean value, so splits join the computation one after the other and share every
later call. Lanes stay a dimension of their own, which is what keeps a network's own shape arithmetic valid: the batch
dimension it sees is the clean one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Lanes", "call", "find", "join", "lanes_of", "map_tensors", "spread", "tensors_in", "widen"]


class Lanes(NamedTuple):
    """What a lane tensor's leading dimension means."""

    ids: tuple[int, ...]
    """Lane numbers, ascending: ``tensor[k]`` is the copy of lane ``ids[k]``."""
    clean: Tensor
    """The recorded, unperturbed value, of shape ``tensor.shape[1:]``."""


def lanes_of(tensor: Tensor) -> Lanes | None:
    """The lanes of a tensor, or None for an ordinary (clean) one."""
    return getattr(tensor, "_sandi_lanes", None)


def map_tensors(tree: Any, function: Callable[[Any], Any], leaf: type = Tensor) -> Any:
    """``tree`` with every tensor (or ``leaf``) in its tuples, lists and dicts replaced by ``function(tensor)``."""
    if isinstance(tree, leaf):
        return function(tree)
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        items = [map_tensors(item, function, leaf) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: map_tensors(item, function, leaf) for key, item in tree.items()}
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in the tuples, lists and dicts of ``tree``."""
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return found


def find(tree: Any) -> list[Tensor]:
    """The lane tensors in ``tree``."""
    return [tensor for tensor in tensors_in(tree) if lanes_of(tensor) is not None]


def _tag(tree: Any, ids: tuple[int, ...], clean: Any) -> None:
    """Marks every tensor of a call's result as lanes ``ids`` of the recorded result ``clean``."""
    if isinstance(tree, Tensor):
        tree._sandi_lanes = Lanes(ids, clean)  # type: ignore[attr-defined]
    elif isinstance(tree, (tuple, list)):
        for item, clean_item in zip(tree, clean, strict=True):
            _tag(item, ids, clean_item)


def widen(tensor: Tensor, ids: tuple[int, ...]) -> Tensor:
    """``tensor`` with exactly the lanes ``ids``, its clean value in those it lacks: ``(len(ids), *clean.shape)``."""
    lanes = lanes_of(tensor)
    if lanes is None:
        return tensor.expand(len(ids), *tensor.shape)
    if lanes.ids == ids:
        return tensor
    row = {lane: k for k, lane in enumerate(lanes.ids)}
    parts: list[Tensor] = []
    start = 0
    while start < len(ids):  # runs of lanes that are all present or all absent: few, as splits join in call order
        present, stop = ids[start] in row, start
        while stop < len(ids) and (ids[stop] in row) == present:
            stop += 1
        if present:
            parts.append(tensor[row[ids[start]] : row[ids[stop - 1]] + 1])
        else:
            parts.append(lanes.clean.expand(stop - start, *lanes.clean.shape))
        start = stop
    return torch.cat(parts)


def join(tensor: Tensor, lane: int, value: Tensor) -> Tensor:
    """``tensor`` (clean or of lanes before ``lane``) with one lane more, which holds ``value`` (of the clean shape)."""
    lanes = lanes_of(tensor)
    if lanes is None:
        joined = value.unsqueeze(0)
        _tag(joined, (lane,), tensor)
    else:
        joined = torch.cat([tensor, value.unsqueeze(0)])
        _tag(joined, (*lanes.ids, lane), lanes.clean)
    return joined


def spread(tensor: Tensor, like: Iterable[Tensor]) -> Tensor:
    """A clean ``tensor`` as lanes of equal value, one for each lane of the tensors in ``like``."""
    if lanes_of(tensor) is not None:
        return tensor
    ids = _union(like)
    spread_out = widen(tensor, ids)
    _tag(spread_out, ids, tensor)
    return spread_out


def _union(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Every lane that any of the tensors has, ascending."""
    return tuple(sorted({lane for tensor in tensors for lane in (lanes_of(tensor) or ((),))[0]}))


def _functions(*names: str) -> frozenset[Callable[..., Any]]:
    """Every function called one of ``names`` in torch's namespaces."""
    spaces = (torch, F, Tensor, torch._C._nn)
    return frozenset(getattr(space, name) for name in names for space in spaces if hasattr(space, name))


# Element-wise in one tensor, or over trailing dimensions alone: a further leading dimension changes nothing.
_UNARY = _functions(
    *("relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "leaky_relu", "hardtanh"),
    *(
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "logsigmoid",
        "tanh",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "abs",
        "neg",
        "square",
        "clamp",
    ),
    *("clamp_min", "clamp_max", "clip", "dropout", "feature_dropout", "contiguous", "linear", "layer_norm", "clone"),
)
# Element-wise in two tensors: right-aligned broadcasting skips the lanes while all lane operands have equal rank.
_BINARY = _functions(
    *("add", "sub", "mul", "div", "true_divide", "maximum", "minimum", "__add__", "__radd__", "__sub__", "__rsub__"),
    *("__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
)
# Dimension 0 of the first argument is the batch (or, unbatched, channels treated alike): lanes fold into it.
# The value is the rank from which that holds.
_FOLD = {
    function: rank
    for rank, names in {
        2: ("batch_norm", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "group_norm"),
        3: ("conv1d", "conv_transpose1d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
        4: ("conv2d", "conv_transpose2d", "local_response_norm", "pixel_shuffle", "interpolate"),
        5: ("conv3d", "conv_transpose3d"),
    }.items()
    for function in _functions(*names)
}


def _positional(args: Iterable[Any]) -> list[Tensor]:
    return [item for item in args if isinstance(item, Tensor)]


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], clean: Any) -> Any:
    """The result of ``func(*args, **kwargs)`` for every lane of its lane arguments, as lane tensors.

    ``clean`` is the recorded result of the same call. The three shortcuts are a matter of speed only; whatever they
    do not cover runs through ``torch.vmap``.
    """
    perturbed = find(args) + find(list(kwargs.values()))
    ids = _union(perturbed)

    def wide(tensor: Tensor) -> Tensor:
        return tensor if lanes_of(tensor) is None else widen(tensor, ids)

    first_only = len(perturbed) == 1 and bool(args) and args[0] is perturbed[0]
    rank = perturbed[0].dim() - 1
    if func in _UNARY and first_only:
        result = func(wide(args[0]), *args[1:], **kwargs)
    elif (
        func in _BINARY
        and len({t.dim() for t in perturbed}) == 1
        and all(t.dim() <= rank or lanes_of(t) is not None for t in _positional(args))
    ):
        result = func(*map_tensors(args, wide), **kwargs)
    elif func in _FOLD and first_only and rank >= _FOLD[func]:
        folded = func(wide(args[0]).flatten(0, 1), *args[1:], **kwargs)
        result = map_tensors(folded, lambda t: t.unflatten(0, (len(ids), -1)))
    elif func in (torch.cat, torch.concat) and isinstance(clean, Tensor) and _axis(args, kwargs, rank) > 0:
        tensors = args[0] if args else kwargs["tensors"]
        result = torch.cat([widen(t, ids) for t in tensors], _axis(args, kwargs, rank) + 1)
    else:
        result = _vmap(func, args, kwargs, ids, clean)
    _tag(result, ids, clean)
    return result


def _axis(args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> int:
    """The non-negative dimension that a ``torch.cat`` of tensors of this rank joins along."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return dim % rank if isinstance(dim, int) and rank else 0


@dataclass(frozen=True)
class _Slot:
    """Holds the place of the lane argument ``index`` in a call's arguments."""

    index: int


def _vmap(func: Callable[..., Any], args: Any, kwargs: Any, ids: tuple[int, ...], clean: Any) -> Any:
    """Any call at all, one lane at a time as far as ``func`` can tell."""
    inputs: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor | _Slot:
        if lanes_of(tensor) is None:
            return tensor
        inputs.append(widen(tensor, ids))
        return _Slot(len(inputs) - 1)

    slots = map_tensors((args, kwargs), take)

    def one_lane(*lane: Tensor) -> tuple[Tensor, ...]:
        lane_args, lane_kwargs = map_tensors(slots, lambda slot: lane[slot.index], _Slot)
        outputs: list[Tensor] = []  # vmap returns tensors alone; a result may also hold None or numbers
        map_tensors(func(*lane_args, **lane_kwargs), outputs.append)
        return tuple(outputs)

    outputs = iter(torch.vmap(one_lane)(*inputs))
    return map_tensors(clean, lambda _: next(outputs))
