"""In-place calls exchanged for their out-of-place twins.

Recorded results must keep the value they had, and a leaf of the autograd graph must not be written to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.engine.errors import ReplayError

__all__ = ["Overwritten", "name_out_of_place", "out_of_place", "set_item"]

_IN_PLACE = re.compile(r"[a-z0-9]\w*[a-z0-9]_|[a-z0-9]_")
_IN_PLACE_OPERATOR = re.compile(r"__i(add|sub|mul|div|truediv|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift)__")


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def _copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.expand_as(tensor).to(tensor.dtype, copy=True)


_TWINS: dict[str, Callable[..., Any]] = {
    "__setitem__": set_item,
    "copy_": _copy,
    "zero_": torch.zeros_like,
    "fill_": torch.full_like,
    "detach_": Tensor.detach,
}
_NOT_DATA = frozenset(("requires_grad_", "share_memory_"))


def out_of_place(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Tensor | None]:
    """The call with an in-place function exchanged for its twin, and the tensor it would have changed, if it is one.

    Raises:
        ReplayError: the function has no twin.
    """
    name = getattr(func, "__name__", "")
    if kwargs.get("inplace") is True:
        return func, args, {**kwargs, "inplace": False}, args[0] if args else kwargs["input"]
    twin = _TWINS.get(name)
    if twin is None and name not in _NOT_DATA:
        if _IN_PLACE_OPERATOR.fullmatch(name):
            twin = getattr(Tensor, "__" + name[3:], None)
        elif _IN_PLACE.fullmatch(name):
            twin = next((getattr(s, name[:-1]) for s in (Tensor, F, torch) if hasattr(s, name[:-1])), None)
            if twin is None:
                raise ReplayError(
                    f"the network calls {name!r}, which changes a tensor in place and has no out-of-place twin; "
                    f"write it without the trailing underscore in the network's forward"
                )
    if twin is None:
        return func, args, kwargs, None
    target = args[0] if args else kwargs["input"]
    if any(isinstance(arg, Tensor) and arg.dtype != target.dtype for arg in args[1:]):
        twin = _keeping_dtype(twin, target.dtype)
    return twin, args, kwargs, target


@functools.cache
def name_out_of_place(name: str) -> str:
    """``name``, or the name of its out-of-place twin if it is that of an in-place function."""
    if _IN_PLACE_OPERATOR.fullmatch(name):
        return "__" + name[3:]
    return name[:-1] if _IN_PLACE.fullmatch(name) and name not in _NOT_DATA else name


def _keeping_dtype(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """``function`` without type promotion, as its in-place twin would have it."""

    @functools.wraps(function)
    def converted(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs).to(dtype)

    return converted


class Overwritten:
    """The memory that in-place calls would have changed, and a guard against tensors that still show it unchanged.

    A tensor that was itself the target is exchanged for the result wherever it is used. A view of it that the
    network made before, or the tensor that the target was a view of, cannot be: using it later is an error.
    """

    def __init__(self) -> None:
        self._written: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def note(self, target: Tensor, result: Tensor) -> None:
        """``target`` would now hold ``result``."""
        self._written.setdefault(target.untyped_storage().data_ptr(), []).append((target, result))

    def require_unread(self, func: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """Raises ReplayError if one of a call's ``tensors`` shows memory that was written to."""
        if not self._written:
            return
        for tensor in tensors:
            for target, result in self._written.get(tensor.untyped_storage().data_ptr(), ()):
                # x[i] += y is three calls: v = x[i]; v += y; x[i] = v. The last one completes x.
                completes = func is set_item and tensor is args[0] and args[2] is result
                if not completes and _overlap(target, tensor):
                    raise ReplayError(
                        f"the network changes a tensor of shape {tuple(target.shape)} in place and then uses another "
                        f"view of the same memory, of shape {tuple(tensor.shape)}, in {func.__name__!r}; "
                        "make that change out of place in the network's forward"
                    )


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one storage share an element."""
    marks = torch.zeros(first.untyped_storage().nbytes() // first.element_size(), dtype=torch.bool)
    marks.as_strided(first.shape, first.stride(), first.storage_offset()).fill_(True)
    return bool(marks.as_strided(second.shape, second.stride(), second.storage_offset()).any())
