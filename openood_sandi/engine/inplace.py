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

from openood_sandi.engine import writes
from openood_sandi.engine.errors import ReplayError

__all__ = ["Overwritten", "name_out_of_place", "out_of_place"]

_IN_PLACE = re.compile(r"[a-z0-9]\w*[a-z0-9]_|[a-z0-9]_")
_IN_PLACE_OPERATOR = re.compile(r"__i(add|sub|mul|div|truediv|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift)__")


_TWINS: dict[str, Callable[..., Any]] = {
    "__setitem__": writes.set_item,
    "index_put_": writes.index_put,
    "copy_": writes.copy,
    "fill_": writes.fill,
    "zero_": torch.zeros_like,
    "detach_": Tensor.detach,
}
# Comparisons in place leave numbers where their twins give Booleans.
_GIVES_BOOLEANS = re.compile(r"(eq|ne|lt|le|gt|ge|less|greater|less_equal|greater_equal|not_equal|logical_\w+)_")
_HARMLESS_ATTRIBUTES = frozenset(("requires_grad", "grad", "_grad", "names", "_backward_hooks"))
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
    if kwargs.get("out") is not None:
        return _without_out(func, args, kwargs)
    attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__set__" else "grad"
    if attribute not in _HARMLESS_ATTRIBUTES:
        raise _no_twin(f".{attribute} = ...", "compute a new tensor instead")
    if name.startswith("_foreach_") and name.endswith("_"):
        raise _no_twin(name, "change one tensor after the other, out of place,")
    twin = _TWINS.get(name)
    if twin is None and name not in _NOT_DATA:
        if _IN_PLACE_OPERATOR.fullmatch(name):
            twin = getattr(Tensor, "__" + name[3:], None)
        elif _IN_PLACE.fullmatch(name):
            found = (getattr(space, name[:-1], None) for space in (Tensor, F, torch))
            twin = next((function for function in found if callable(function)), None)
            if twin is None:
                raise _no_twin(name, "write it without the trailing underscore")
    if twin is None:
        return func, args, kwargs, None
    target = args[0] if args else kwargs["input"]
    if twin not in _TWINS.values() and (_GIVES_BOOLEANS.fullmatch(name) or _promotes(target, args, kwargs)):
        twin = _keeping_dtype(twin, target.dtype)
    return twin, args, kwargs, target


def _without_out(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Tensor]:
    """A call that would have filled the tensor ``out``."""
    out = kwargs["out"]
    if not isinstance(out, Tensor):
        raise _no_twin(f"{getattr(func, '__name__', func)}(out=...)", "leave out= away")
    kept = {key: value for key, value in kwargs.items() if key != "out"}
    return (_keeping_dtype(func, out.dtype) if _promotes(out, args, kept) else func), args, kept, out


def _no_twin(name: str, remedy: str) -> ReplayError:
    return ReplayError(
        f"the network calls {name!r}, which changes a tensor in place and has no out-of-place twin; "
        f"{remedy} in the network's forward"
    )


def _promotes(target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the other operands could give an out-of-place result of another dtype than the target's."""
    dtypes = {value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
    return any(torch.promote_types(target.dtype, dtype) != target.dtype for dtype in dtypes)


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
        """``target`` would now hold ``result``; if that is a view of the same memory, as of ``squeeze_``, it does."""
        memory = target.untyped_storage().data_ptr()
        if result.untyped_storage().data_ptr() != memory:
            self._written.setdefault(memory, []).append((target, result))

    def require_unread(self, func: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """Raises ReplayError if one of a call's ``tensors`` shows memory that was written to."""
        if not self._written:
            return
        for tensor in tensors:
            for target, result in self._written.get(tensor.untyped_storage().data_ptr(), ()):
                # x[i] += y is three calls: v = x[i]; v += y; x[i] = v. The last one completes x.
                completes = func is writes.set_item and tensor is args[0] and args[2] is result
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
