"""Writes into a part of a tensor, as functions that return the changed tensor, also where the data choose the part.

How many positions ``y > 1`` holds differs from one perturbed copy to the next, so what is written through it has no
shape for all of them. The result has: ``y[y > 1] = c`` is ``torch.where(y > 1, c, y)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["copy", "fill", "index_put", "set_item"]


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """``tensor`` as it is after ``tensor[index] = value``."""
    items = index if isinstance(index, tuple) else (index,)
    changed = _through_mask(tensor, items, value)
    if changed is None:
        changed = tensor.clone()
        changed[index] = value
    return changed


set_item.__name__ = "__setitem__"  # what messages call it


def index_put(tensor: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """``tensor.index_put(indices, values, accumulate)``."""
    items = tuple(slice(None) if item is None else item for item in indices)
    changed = _through_mask(tensor, items, values, accumulate)
    return tensor.index_put(tuple(indices), values, accumulate) if changed is None else changed


def copy(tensor: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """``tensor`` as it is after ``tensor.copy_(src)``."""
    return src.expand_as(tensor).to(tensor.device, tensor.dtype, copy=True)


def fill(tensor: Tensor, value: Any) -> Tensor:
    """``tensor`` as it is after ``tensor.fill_(value)``."""
    return copy(tensor, value) if isinstance(value, Tensor) else torch.full_like(tensor, value)


def _through_mask(tensor: Tensor, items: tuple[Any, ...], value: Any, accumulate: bool = False) -> Tensor | None:
    """What a write through the one Boolean mask among ``items`` leaves; None for an index of any other kind.

    Likewise None where each position of the mask is given a value of its own, by its number among them.
    """
    masks = [at for at, item in enumerate(items) if isinstance(item, Tensor) and item.dtype == torch.bool]
    if len(masks) != 1 or not all(at in masks or _is_basic(item) for at, item in enumerate(items)):
        return None
    at, mask = masks[0], items[masks[0]]
    whole = (*items[:at], *(slice(None),) * mask.dim(), *items[at + 1 :])
    part = tensor[whole]
    behind = _dimensions_behind(items, at, part.dim() - mask.dim())
    new = _scalar_or_tensor(value, tensor)
    if new.dim() > behind:
        count = new.dim() - behind - 1  # of the value's dimensions, the one along the mask's positions
        if new.shape[count] != 1:
            return None
        new = new.reshape(*new.shape[:count], *(1,) * mask.dim(), *new.shape[count + 1 :])
    written = torch.where(mask.reshape(*mask.shape, *(1,) * behind), part + new if accumulate else new, part)
    if all(isinstance(item, slice) and item == slice(None) for item in whole):
        return written
    changed = tensor.clone()
    changed[whole] = written
    return changed


def _scalar_or_tensor(value: Any, like: Tensor) -> Tensor:
    """``value`` as a tensor of the dtype and on the device of the tensor that it is written into."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _is_basic(item: Any) -> bool:
    """Whether an item of an index takes a view: an integer, a slice, an ellipsis or a new dimension."""
    return item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int


def _dimensions_behind(items: tuple[Any, ...], at: int, others: int) -> int:
    """How many of a part's ``others`` dimensions, those that the mask at ``items[at]`` leaves, lie behind its own."""

    def kept(side: tuple[Any, ...]) -> int:
        return sum(item is None or isinstance(item, slice) for item in side)

    return kept(items[at + 1 :]) if any(item is Ellipsis for item in items[:at]) else others - kept(items[:at])
