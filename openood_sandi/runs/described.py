"""Anything in plain terms, whose ``repr`` is the same in another process if and only if it does the same.

Values by what is in them; objects by class and attributes; networks by parameters, submodules and hooks; functions and
classes by their code, by the values that they take from their module, and by the sources of that module and of what it
imports. What cannot be told for certain raises :class:`Indescribable`.
"""

from __future__ import annotations

import builtins
import datetime
import decimal
import enum
import functools
import hashlib
import logging
import operator
import os
import re
import threading
import types
import typing
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openood_sandi.runs import bytecode, named_files, sources

__all__ = ["Indescribable", "digest"]

#: What ``repr`` tells in full.
_PLAIN = {type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented)}
_BY_REPR = (
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype, typing.TypeVar),
    *(bytearray, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta),
)
_METHODS_IN_C = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)
_GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
#: What every module has beside weights, submodules and hooks.
_OF_MODULES = {*vars(nn.Module())} - {"training"}
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_backward_pre_hooks", "_backward_hooks"),
)
#: Entries of a class that are Python's own notes, or text.
_OF_CLASSES = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__", "__hash__", "__classcell__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__conditional_annotations__"),
    *("__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl", "__parameters__"),
    *(
        "__slotnames__",
        "__orig_bases__",
        "__type_params__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__match_args__",
    ),
}
#: What is told by its name alone.
_KINDS = {list, tuple, set, frozenset, dict, deque, OrderedDict, defaultdict, Tensor, nn.Parameter, np.ndarray}
#: What no score depends on.
_STATELESS = (logging.Logger, type(threading.Lock()), type(threading.RLock()))
#: Descriptors that do what the class's other entries say.
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, type(vars(namedtuple("_", "a"))["a"]))
#: Lists of so many texts are not looked through for names of files.
_MANY = 100
#: The bytes of an object without slots, its references to attributes and to weak references counted.
_BARE = 32


class Indescribable(ValueError):
    """Something that may decide scores cannot be described; the message names it."""


def digest(*values: object) -> str:
    """SHA-256, in hexadecimal, of values as they are now.

    Raises:
        Indescribable: one is of a kind that cannot be told from others of its kind.
    """
    description = _Description()
    told = [description.of(value) for value in values]
    return hashlib.sha256(repr((told, sources.closure(description.modules))).encode("utf-8", "replace")).hexdigest()


class _Description:
    """One walk through values. ``modules`` are those that the functions and classes that were met are from."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._met: dict[int, tuple[int, object]] = {}  # functions and classes, kept alive, in the order of the walk
        self._inside: list[int] = []

    def of(self, value: Any) -> object:
        """``value`` in plain terms."""
        if type(value) in _PLAIN:
            return named_files.told(value) if type(value) is str else value
        if type(value) in (list, tuple) and _PLAIN.issuperset(map(type, value)):
            return type(value).__name__, [named_files.told(item) for item in value] if len(value) < _MANY else [*value]
        if isinstance(value, enum.Enum):
            return "enum", self.of(type(value)), value.name
        if isinstance(value, PurePath):
            return type(value).__name__, named_files.told(str(value))
        if isinstance(value, _BY_REPR):
            return repr(value)
        code = self._code(value)
        if code is not None:
            return code
        if id(value) in self._inside:
            if isinstance(value, (list, tuple, Set, Mapping)):
                raise Indescribable(f"a {type(value).__qualname__} contains itself")
            return "the one so many levels up", len(self._inside) - self._inside.index(id(value))
        self._inside.append(id(value))
        try:
            return self._contents(value)
        finally:
            self._inside.pop()

    # ------------------------------------------------------------------ data

    def _contents(self, value: Any) -> object:
        if isinstance(value, Tensor):
            content = str(value.dtype), tuple(value.shape), _tensor(value)
            return self._kind(value), content, self._hooks_of_tensor(value)
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
            content = repr(value.dtype), value.shape, hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
            return self._kind(value), content
        if isinstance(value, nn.Module):
            return self._network(value)
        if isinstance(value, (list, tuple, deque, np.ndarray)):
            return self._kind(value), [self.of(item) for item in value]
        if isinstance(value, Set):
            return self._kind(value), self._unordered(value)
        if isinstance(value, OrderedDict):
            return self._kind(value), [(self.of(name), self.of(item)) for name, item in value.items()]
        if isinstance(value, Mapping):
            made = self.of(value.default_factory) if isinstance(value, defaultdict) else None
            return self._kind(value), made, self._mapping(value)
        if isinstance(value, slice):
            return "slice", [self.of(part) for part in (value.start, value.stop, value.step)]
        if isinstance(value, re.Pattern):
            return "pattern", value.pattern, value.flags
        if isinstance(value, _STATELESS):
            return "stateless", type(value).__name__
        if isinstance(value, _GETTERS):
            return type(value).__name__, self.of(value.__reduce__()[1:])
        if isinstance(value, functools.partial):
            return "partial", self.of([value.func, value.args, value.keywords])
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        return self._object(value)

    def _kind(self, value: object) -> object:
        """What it is, and what it carries beside what it holds."""
        kind, carried = type(value), getattr(value, "__dict__", None)
        named = kind.__name__ if kind in _KINDS else self.of(kind)
        return (named, self._mapping(carried)) if carried else named

    def _unordered(self, values: Iterable[Any]) -> list[str]:
        """Each in a walk of its own: references to what was met before would depend on the order."""
        return sorted(self._alone(value) for value in values)

    def _alone(self, value: Any) -> str:
        if type(value) in _PLAIN:
            return repr(value)
        walk = _Description()
        walk._inside = [*self._inside]
        told = repr(walk.of(value))
        self.modules |= walk.modules
        return told

    def _mapping(self, value: Mapping[Any, Any]) -> list[object]:
        named = sorted(((self._alone(name), item) for name, item in value.items()), key=lambda pair: pair[0])
        return [(name, self.of(item)) for name, item in named]

    def _object(self, value: Any) -> object:
        kind, slots = type(value), _slots(type(value))
        if kind.__basicsize__ > _BARE + 8 * len(slots) or not (hasattr(value, "__dict__") or slots):
            raise Indescribable(f"a {kind.__qualname__} cannot be told from others of its kind")
        filled = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        return "object", self.of(kind), self._mapping({**filled, **_attributes(value)})

    # ------------------------------------------------------------------ networks

    def _network(self, net: nn.Module) -> object:
        """Its class, mode, attributes and hooks, and the same of its submodules; tensors by name."""
        own = {name: value for name, value in _attributes(net).items() if name not in _OF_MODULES}
        tensors = [(name, self.of(value)) for kind in (net._parameters, net._buffers) for name, value in kind.items()]
        hooks = [self.of(hook) for kind in _HOOKS for hook in (kind, *_values(getattr(net, kind, {})))]
        children = [(name, self.of(child)) for name, child in net._modules.items()]
        return "network", self.of(type(net)), self._mapping(own), tensors, hooks, children

    def _hooks_of_tensor(self, value: Tensor) -> list[object]:
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        return [self.of(hook) for kind in kinds for hook in _values(getattr(value, kind, None))]

    # ------------------------------------------------------------------ code

    def _code(self, value: Any) -> object | None:
        """Functions and classes, and what wraps them; None for anything else."""
        if isinstance(value, (types.GenericAlias, types.UnionType)) or type(value).__module__ == "typing":
            return repr(value)
        if isinstance(value, type):
            return self._once(value, self._class)
        if isinstance(value, types.FunctionType):
            return self._once(value, self._function)
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            named = owner is None or isinstance(owner, (type, types.ModuleType))
            self._from(value.__module__)
            return "builtin", value.__module__, value.__qualname__, None if named else self.of(owner)
        if isinstance(value, _METHODS_IN_C):
            return "builtin", value.__objclass__.__qualname__, value.__name__
        if isinstance(value, np.ufunc):
            return "ufunc", value.__name__
        if isinstance(value, (staticmethod, classmethod)):
            return type(value).__name__, self.of(value.__func__)
        if isinstance(value, property):
            return "property", [self.of(function) for function in (value.fget, value.fset, value.fdel)]
        if isinstance(value, functools.cached_property):
            return "cached property", self.of(value.func)
        if isinstance(value, functools._lru_cache_wrapper):
            return "cached", self.of(value.__wrapped__)
        return None

    def _once(self, value: Any, describe: Callable[[Any], object]) -> object:
        """The first time in full, then by its number in the walk: functions and classes refer to each other."""
        if id(value) in self._met:
            return "as", self._met[id(value)][0]
        self._met[id(value)] = len(self._met), value
        return describe(value)

    def _from(self, module: str | None) -> None:
        if module is not None:
            self.modules.add(module)

    def _class(self, kind: type) -> object:
        if kind.__module__ == "builtins":
            return "class", kind.__qualname__
        self._from(kind.__module__)
        entries = {name: value for name, value in vars(kind).items() if name not in _OF_CLASSES}
        if sources.is_library(kind.__module__):  # its version tells it, unless somebody has put methods in
            entries = {name: value for name, value in entries.items() if sources.is_foreign(value)}
        told = [
            (name, self.of(value)) for name, value in sorted(entries.items()) if not isinstance(value, _DESCRIPTORS)
        ]
        meta = None if type(kind) is type else self.of(type(kind))
        return "class", kind.__module__, kind.__qualname__, [self.of(base) for base in kind.__bases__], meta, told

    def _function(self, function: types.FunctionType) -> object:
        module = function.__globals__.get("__name__")
        self._from(module)
        enclosed = [self.of(_held(cell)) for cell in function.__closure__ or ()]
        bound = enclosed, self.of(function.__defaults__), self.of(function.__kwdefaults__)
        extra = self._mapping({name: value for name, value in vars(function).items() if name != "__wrapped__"})
        if not sources.is_foreign(function):
            return "function", module, function.__qualname__, bound, extra
        takes = bytecode.needed(function.__code__)
        self.modules |= takes.imports
        around = [named_files.told(text) for text in sorted(takes.texts)], _environment(function, takes)
        return "function", bytecode.canonical(function.__code__), bound, extra, self._taken(function, takes), around

    def _taken(self, function: types.FunctionType, takes: bytecode.Needed) -> list[object]:
        """The values that a function looks up in its module when it runs, as they are now."""
        own = function.__globals__
        values = [(name, own[name]) for name in sorted(takes.globals) if name in own]
        everywhere = [(name, getattr(builtins, name, None)) for name in sorted(takes.globals - own.keys())]
        values += [(name, value) for name, value in everywhere if sources.is_foreign(value)]
        return [(name, self._looked_up(value, takes.names)) for name, value in values]

    def _looked_up(self, value: Any, names: frozenset[str]) -> object:
        """A global; of a module those values too that the function may look up in it."""
        if value is os.environ:
            return "environment"  # the variables that are read are told, see `_environment`
        if not isinstance(value, types.ModuleType):
            return self.of(value)
        library, inside = sources.is_library(value.__name__), vars(value)
        found = [(name, inside[name]) for name in sorted(names) if name in inside]
        if library:
            found = [(name, held) for name, held in found if sources.is_foreign(held)]
        deeper = [(name, self._looked_up(held, names - {name})) for name, held in found]
        return self._module(value), deeper

    def _module(self, module: types.ModuleType) -> object:
        self._from(module.__name__)
        return "module", module.__name__


def _environment(function: types.FunctionType, takes: bytecode.Needed) -> list[tuple[str, str | None]]:
    """The variables that a function may read, with their values: their names stand in it, or in what it looks up."""
    held = [function.__globals__[name] for name in takes.globals & function.__globals__.keys()]
    held += [*map(_held, function.__closure__ or ()), *(function.__defaults__ or ())]
    reads = not takes.names.isdisjoint(("environ", "getenv", "environb"))
    if not reads and not any(value is os.environ or value is os.getenv for value in held):
        return []
    texts = takes.texts | {value for value in held if type(value) is str}
    return [(name, os.environ.get(name)) for name in sorted(texts)]


def _held(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return "nothing yet"


def _values(hooks: Mapping[int, Any] | None) -> list[Any]:
    return list((hooks or {}).values())  # their numbers are the process's


def _attributes(value: object) -> dict[str, Any]:
    """What it carries, without what follows from the rest once somebody has asked for it."""
    kind = type(value)
    found: dict[str, Any] = getattr(value, "__dict__", {})
    return {
        name: held
        for name, held in found.items()
        if not isinstance(getattr(kind, name, None), functools.cached_property)
    }


def _slots(kind: type) -> list[str]:
    given = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    names = [name for each in given for name in ((each,) if isinstance(each, str) else each)]
    return sorted({*names} - {"__dict__", "__weakref__"})


def _tensor(value: Tensor) -> str:
    try:
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError) as error:  # meta, sparse, quantised
        raise Indescribable(f"a tensor of {value.dtype}, {value.layout} on {value.device} has no bytes") from error
    return hashlib.sha256(content.data).hexdigest()
