"""``--key value`` and ``--key=value`` of OpenOOD's command line, read without evaluating anything.

:func:`parse_args` takes the place of OpenOOD's ``Config.parse_args``, which runs ``eval`` on what follows a colon. A
value has the type of the one that it replaces. ``VALUE:TYPE``, with TYPE int, float, str, bool or list, says another;
any other colon belongs to the value. Lists are written ``[mnist,texture]`` or ``mnist,texture``, their items as in a
yml file.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["WrongArgument", "did_you_mean", "pairs", "parse_args"]


class WrongArgument(ValueError):
    """An argument that cannot be taken; the message names it, what was expected, and what there is."""


def parse_args(config: Any, cmd_args: Sequence[str] | None = None, strict: bool = True) -> list[str]:
    """Change settings of ``config``, an OpenOOD ``Config``, as the command line says.

    Args:
        config: the settings, each of which may be named by its path: ``network.checkpoint``.
        cmd_args: the arguments; ``sys.argv`` without them.
        strict: whether names that ``config`` does not have are refused.

    Returns:
        The arguments with names that ``config`` does not have.

    Raises:
        WrongArgument: a name is unknown, or a value has the wrong type.
    """
    unknown: list[str] = []
    for key, text in pairs(sys.argv[1:] if cmd_args is None else cmd_args):
        if key in config:
            config[key] = _value(key, text, _present(key, config))
        elif strict:
            raise WrongArgument(f"--{key}: there is no such setting. {_near(key, config)}")
        else:
            unknown += [f"--{key}", text]
    return unknown


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of each ``--key value`` or ``--key=value``."""
    rest = iter(arguments)
    for argument in rest:
        key, equals, text = argument[2:].partition("=")
        if not argument.startswith("--") or not key or key.startswith("-"):
            raise WrongArgument(f"{argument!r}: expected --key value or --key=value")
        if not equals:
            text = next(rest, "--")
            if text.startswith("--"):
                raise WrongArgument(f"--{key}: expected a value after it (one that begins with -- as --{key}=--...)")
        yield key, text


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The question that ends an error about ``name``: the known names that are like it, or all."""
    return f"Did you mean: {', '.join(difflib.get_close_matches(name, known) or known)}?"


def _present(key: str, config: Any) -> Any:
    """What a setting is, also where it refers to another: ``'@{num_workers}'``."""
    value = config[key]
    if isinstance(value, str) and value.startswith("@{") and value[2:-1] in config:
        return config[value[2:-1]]
    return value


def _near(key: str, config: Any) -> str:
    known = [str(each) for each in config.all_keys()]
    group, _, last = key.rpartition(".")
    same = [each for each in known if each.rpartition(".")[2] == last]
    return did_you_mean(key, same or difflib.get_close_matches(key, known) or _beside(group, known))


def _beside(group: str, known: Sequence[str]) -> Sequence[str]:
    """The settings of a group, or else the groups."""
    same = [each for each in known if group and each.startswith(f"{group}.")]
    return same or sorted({each.partition(".")[0] for each in known})


def _value(key: str, text: str, present: object) -> Any:
    """``text`` as the setting ``key``, which is ``present``, takes it."""
    value, _, kind = text.rpartition(":")
    if kind not in _READERS or ":" not in text:
        value, kind = text, type(present).__name__
        if isinstance(present, dict):
            raise WrongArgument(
                f"--{key} {text}: expected one of its settings, such as --{key}.{next(iter(present), '')}"
            )
    if kind == "NoneType":  # what it is to be is not told
        value, kind = text, "str"
    read, expected = _READERS.get(kind, _READERS["str"])
    try:
        return read(value)
    except (ValueError, KeyError) as error:
        raise WrongArgument(
            f"--{key} {text}: expected {expected}" + ("" if text != value else f", as the present {present!r} is")
        ) from error


def _switch(text: str) -> bool:
    return {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}[text]


def _list(text: str) -> list[Any]:
    import yaml  # type: ignore[import-untyped]  # which OpenOOD needs, and this package alone does not

    items = text.strip()
    if items.startswith("[") and items.endswith("]"):
        items = items[1:-1]
    try:
        return list(yaml.safe_load(f"[{items}]"))
    except yaml.YAMLError as error:
        raise ValueError(text) from error


#: How a type's values are read, and what they are called.
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "a string"),
    "bool": (_switch, "True or False"),
    "list": (_list, "a list, such as [mnist,texture]"),
}
