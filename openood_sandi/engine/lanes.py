"""Tensors that carry several perturbed copies ("lanes") of one clean tensor.

A lane tensor has shape ``(lanes, *clean.shape)``. Lane ``i`` holds what the tensor would be had split ``i`` alone been
perturbed. Operands that a perturbation never reached are ordinary tensors; an operand reached by fewer lanes than
its partner is padded with its clean value, so splits join the computation one after the other and share every
later call. Lanes stay a dimension of their own, which is what keeps a network's own shape arithmetic valid: the batch
dimension it sees is the clean one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    *("Lanes", "align", "as_batch", "constant", "find", "join", "lanes_of", "map_tensors", "one_by_one", "spread"),
    *("tag", "tensors_in", "union", "widen"),
]


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
    """``tree`` with every tensor (or ``leaf``) in tuples, lists, dicts and slices replaced by ``function(tensor)``."""
    if isinstance(tree, leaf):
        return function(tree)
    each = partial(map_tensors, function=function, leaf=leaf)
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        items = map(each, tree)
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return dict(zip(tree, map(each, tree.values()), strict=True))
    return slice(*map(each, (tree.start, tree.stop, tree.step))) if isinstance(tree, slice) else tree


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in the tuples, lists, dicts and slices of ``tree``, in order."""
    found: list[Tensor] = []
    rest = [tree]
    while rest:  # not map_tensors: this is done several times a call
        item = rest.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            rest.extend(reversed(item))
        elif isinstance(item, dict):
            rest.extend(reversed(item.values()))
        elif isinstance(item, slice):
            rest.extend((item.step, item.stop, item.start))
    return found


def find(tree: Any) -> list[Tensor]:
    """The lane tensors in ``tree``."""
    return [tensor for tensor in tensors_in(tree) if lanes_of(tensor) is not None]


def tag(result: Any, ids: tuple[int, ...], clean: Any) -> None:
    """Marks every tensor of a call's ``result`` as lanes ``ids`` of the recorded result ``clean``.

    Raises:
        ValueError: they are not ``len(ids)`` copies of the form that the recorded ones have.
    """
    if isinstance(clean, Tensor):
        expected = (len(ids), *clean.shape)
        if not isinstance(result, Tensor) or result.shape != expected or result.dtype != clean.dtype:
            raise ValueError(f"gives {_form(result)} where {len(ids)} copies of {_form(clean)} were due")
        result._sandi_lanes = Lanes(ids, clean)  # type: ignore[attr-defined]
    elif isinstance(clean, (tuple, list)):
        for item, clean_item in zip(result, clean, strict=True):
            tag(item, ids, clean_item)
    elif isinstance(clean, dict):
        for key, clean_item in clean.items():
            tag(result[key], ids, clean_item)


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def constant(tensor: Tensor) -> Tensor:
    """The same values, lanes included, without a gradient."""
    lanes, detached = lanes_of(tensor), tensor.detach()
    if lanes is not None:
        tag(detached, *lanes)
    return detached


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
        tag(joined, (lane,), tensor)
    else:
        joined = torch.cat([tensor, value.unsqueeze(0)])
        tag(joined, (*lanes.ids, lane), lanes.clean)
    return joined


def spread(tensor: Tensor, like: Iterable[Tensor]) -> Tensor:
    """A clean ``tensor`` as lanes of equal value, one for each lane of the tensors in ``like``."""
    if lanes_of(tensor) is not None:
        return tensor
    ids = union(like)
    spread_out = widen(tensor, ids)
    tag(spread_out, ids, tensor)
    return spread_out


def union(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Every lane that any of the tensors has, ascending."""
    return tuple(sorted({lane for tensor in tensors for lane in (lanes_of(tensor) or ((),))[0]}))


def align(tensor: Tensor, ids: tuple[int, ...], rank: int) -> Tensor:
    """A lane tensor with the lanes ``ids`` and ``rank`` dimensions behind them, so that it broadcasts as ever."""
    wide = widen(tensor, ids)
    missing = rank + 1 - wide.dim()
    return wide.reshape(len(ids), *(1,) * missing, *wide.shape[1:]) if missing else wide


def as_batch(tensor: Tensor) -> Tensor:
    """Logits of one image as (1, classes), also where the network has squeezed that dimension away."""
    lanes = lanes_of(tensor)
    if lanes is None:
        return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
    if lanes.clean.dim() != 1:
        return tensor
    batch = tensor.unsqueeze(1)
    tag(batch, lanes.ids, lanes.clean.unsqueeze(0))
    return batch


def one_by_one(tree: Any) -> Iterator[Any]:
    """For each lane of the lane tensors in ``tree``, the tree with their values in that lane, without gradients."""
    ids = union(find(tree))

    def in_lane(number: int, tensor: Tensor) -> Tensor:
        return tensor if lanes_of(tensor) is None else widen(tensor, ids)[number].detach()

    for number in range(len(ids)):
        yield map_tensors(tree, partial(in_lane, number))
