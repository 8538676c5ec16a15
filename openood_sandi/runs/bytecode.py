"""Code objects in plain terms that are the same in every process: what a function does, wherever it was typed."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

__all__ = ["Needed", "canonical", "needed"]

#: Flags of what a call does (how arguments are bound, generators, coroutines); the rest are the compiler's.
_FLAGS = 0x3FF
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")


def canonical(code: CodeType) -> object:
    """``code`` without file, lines and name; sets among the constants are sorted, as their order is the process's."""
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAGS
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    handlers = getattr(code, "co_exceptiontable", b"")  # from Python 3.11 on
    return "code", code.co_code, handlers, counts, names, [_constant(value) for value in code.co_consts]


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return canonical(value)
    if isinstance(value, frozenset):
        return "frozenset", sorted((_constant(item) for item in value), key=repr)
    if isinstance(value, tuple):
        return "tuple", [_constant(item) for item in value]
    return value


class Needed(NamedTuple):
    """What a function takes from outside."""

    globals: frozenset[str]
    """Names that it looks up in its module."""
    names: frozenset[str]
    """All names that it looks up anywhere: attributes too."""
    imports: frozenset[str]
    """Modules that it imports when it runs."""
    texts: frozenset[str]
    """Texts that stand in its code."""


def needed(code: CodeType) -> Needed:
    """What a function of this code, and the functions in it, take from outside."""
    inside = [code, *_nested(code)]
    read = [instruction for each in inside for instruction in dis.get_instructions(each)]
    return Needed(
        frozenset(str(step.argval) for step in read if step.opname in _GLOBAL),
        frozenset(name for each in inside for name in each.co_names),
        frozenset(str(step.argval) for step in read if step.opname == "IMPORT_NAME" and step.argval),
        frozenset(text for each in inside for text in each.co_consts if isinstance(text, str)),
    )


def _nested(code: CodeType) -> Iterator[CodeType]:
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield value
            yield from _nested(value)
