"""What a network holds: the containers, tensors and functions of its modules, found once and compared quickly."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi.engine.opaque import is_opaque, states
from openood_sandi.engine.wrappers import is_wrapper

__all__ = ["Contents", "Mirror", "version"]

_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
_SEQUENCES = (list, tuple, set, frozenset, deque)
_SHAREABLE = (type(threading.Lock()), type(threading.RLock()), torch.jit.ScriptFunction)


class Contents:
    """What the module tree of ``net`` holds now: all that ``copy.deepcopy`` would copy.

    Attributes:
        tensors: every tensor, registered or kept as an attribute, each once.
        scripted, wrappers: the TorchScript modules and the wrappers (:mod:`.wrappers`) among the modules.
        shareable: locks and scripted functions, which a copy can use as they are.
        bound: the first function or weak reference that holds on to a module of the tree, so that a copy of the tree
            would use the original, in words; "" where there is none.
        lazy: the name of a layer whose parameters are not yet made; None where there is none.
    """

    def __init__(self, net: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self.scripted: list[torch.jit.ScriptModule] = []
        self.wrappers: list[nn.Module] = []
        self.shareable: list[Any] = []
        self.bound = ""
        self.lazy: str | None = None
        self._opaque: list[Any] = []
        self._views: list[Collection[Any]] = []
        self._kept: list[tuple[Any, Any]] = []
        self._modules = list(net.modules())
        own = set(map(id, self._modules))
        for owner, thing in _walk(net):
            self._add(owner, thing)
            if not self.bound and _holds_on(thing, own):
                self.bound = f"{_described(thing)} of layer {owner!r}"
        self._things, self._places, self._kinds = self._now()
        self._states = states(self._opaque)

    def _add(self, owner: str, thing: Any) -> None:
        if isinstance(thing, Tensor):
            self.tensors.append(thing)
            if self.lazy is None and nn.parameter.is_lazy(thing):
                self.lazy = owner
        elif isinstance(thing, torch.jit.ScriptModule):
            self.scripted.append(thing)
        elif isinstance(thing, _SHAREABLE):
            self.shareable.append(thing)
        elif (inside := _inside(thing)) is not None:
            self._views.append(inside)
            self._kept.append(_kept(thing))
            if is_wrapper(thing):
                self.wrappers.append(thing)
        elif is_opaque(thing):
            self._opaque.append(thing)

    def _now(self) -> tuple[list[Any], list[Any], list[type]]:
        """The objects in the containers, where the tensors lie, and what kinds the modules are."""
        things = list(chain.from_iterable(self._views))
        return things, list(map(_place, self.tensors)), list(map(type, self._modules))

    def unchanged(self) -> bool:
        """Whether the containers hold the same objects, the tensors the same memory; values may have changed."""
        with torch._C.DisableTorchFunction():  # addresses are read: no call of a network's
            things, places, kinds = self._now()
        same = len(things) == len(self._things) and all(map(is_, things, self._things))
        return same and places == self._places and kinds == self._kinds

    def unchanged_inside(self) -> bool:
        """Whether the objects that are copied as one piece are what they were, too."""
        return self.unchanged() and states(self._opaque) == self._states

    def restore(self) -> None:
        """Puts back the objects that the containers held; what was written into tensors is not undone."""
        for container, kept in self._kept:
            if isinstance(container, dict):  # never empty for a moment: another thread may be reading it
                for key in container.keys() - kept.keys():
                    del container[key]
                container.update(kept)
            elif isinstance(container, list):
                container[:] = kept
            elif isinstance(container, set):
                container.intersection_update(kept)
                container.update(kept)
            elif isinstance(container, deque):
                container.clear()
                container.extend(kept)


class Mirror:
    """Tensors that are to hold what others hold: ``pairs`` of a source and its copy."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._sources, self._copies = [source for source, _ in pairs], [copied for _, copied in pairs]

    def refresh(self) -> None:
        """Copies all of them again, in one call.

        Counts of writes would tell which to copy, but for writes through ``.data`` or ``.numpy()`` and those of batch
        norm in train mode under ``torch.inference_mode()``, which are not counted.
        """
        if self._sources:
            with torch._C.DisableTorchFunction(), torch.no_grad():  # no call of a network's
                torch._foreach_copy_(self._copies, self._sources)


def version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


def _walk(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that ``net`` holds, each object once, with the name of the module that holds it."""
    names = {id(module): name for name, module in net.named_modules()}
    seen: dict[int, Any] = {}  # the object too: short-lived ones keep their id
    waiting: list[tuple[str, Any]] = [("", net)]
    while waiting:
        owner, thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        yield owner, thing
        owner = names.get(id(thing), owner)
        waiting.extend((owner, held) for held in tuple(_inside(thing) or ()) if type(held) not in _PLAIN)


def _inside(thing: Any) -> Collection[Any] | None:
    """What a copy of ``thing`` would copy with it, as it is whenever looked at; None for what holds nothing."""
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, _SEQUENCES):
        return thing
    if isinstance(thing, types.MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, functools.partial):
        return (thing.func, thing.args, thing.keywords)
    if is_wrapper(thing):
        return thing._modules.values()  # type: ignore[no-any-return]
    return None if _is_whole(thing) else vars(thing).values()


def _is_whole(thing: Any) -> bool:
    """Whether ``thing`` is copied as one piece, or not at all."""
    if isinstance(thing, nn.Module):
        return isinstance(thing, torch.jit.ScriptModule)
    kind: Any = type(thing)
    return (
        isinstance(thing, (Tensor, type, types.ModuleType, types.FunctionType))
        or not hasattr(thing, "__dict__")
        or hasattr(kind, "__deepcopy__")
        or kind.__reduce__ is not object.__reduce__
        or kind.__reduce_ex__ is not object.__reduce_ex__
    )


def _kept(thing: Any) -> tuple[Any, Any]:
    """The container behind ``thing``, and a copy of it to put back."""
    if isinstance(thing, (dict, *_SEQUENCES)):
        return thing, thing.copy() if isinstance(thing, (dict, list, set, deque)) else thing
    if isinstance(thing, (types.MethodType, functools.partial)) or is_wrapper(thing):
        return thing, None
    return vars(thing), vars(thing).copy()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's elements lie: ``.data = ...``, ``.to()`` and ``.half()`` change it and leave the object."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
        return ()
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _holds_on(thing: Any, modules: set[int]) -> bool:
    """Whether a function (or weak reference) reaches one of ``modules`` other than by its arguments."""
    if isinstance(thing, nn.Module) and not isinstance(thing, torch.jit.ScriptModule):
        thing = type(thing).forward
    if not isinstance(thing, (types.FunctionType, weakref.ReferenceType)) or _is_torch(thing):
        return False
    seen: set[int] = set()
    waiting: list[Any] = [thing]
    while waiting:
        held = waiting.pop()
        if id(held) in modules:
            return True
        if id(held) not in seen:
            seen.add(id(held))
            waiting.extend(_reached(held))
    return False


def _is_torch(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").startswith("torch.")


def _reached(thing: Any) -> Iterable[Any]:
    """What a function, or what it keeps, leads to."""
    if isinstance(thing, types.FunctionType):
        return _captured(thing)
    if isinstance(thing, weakref.ReferenceType):
        return (thing(),)
    if isinstance(thing, (dict, *_SEQUENCES, types.MethodType, functools.partial)):
        return _inside(thing) or ()
    return ()


def _captured(function: types.FunctionType) -> Iterator[Any]:
    """The objects in a function's closure and defaults, and the modules among the globals that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # still empty
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _names(function.__code__):
        found = function.__globals__.get(name)
        if isinstance(found, (nn.Module, types.MethodType)):
            yield found


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _described(thing: Any) -> str:
    if isinstance(thing, weakref.ReferenceType):
        return "a weak reference"
    function = thing if isinstance(thing, types.FunctionType) else type(thing).forward
    return f"the function {function.__qualname__!r}"
