"""What the options of a detector's class are, and their values where they come from a file or a command line."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["as_option", "options_of"]

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


def options_of(detector: Callable[..., Any]) -> dict[str, Any]:
    """The options of a detector's class, which are its keyword-only arguments, and their defaults."""
    return {name: parameter.default for name, parameter in _parameters(detector).items()}


def as_option(detector: Callable[..., Any], name: str, value: Any) -> Any:
    """``value`` as option ``name`` takes it: of its default's type; a number also from a string.

    Raises:
        TypeError: it has another type.
    """
    parameter = _parameters(detector)[name]
    kind = type(parameter.default)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 0 as an integer and 1e-3 as a string
    takes_lists = "Sequence[" in str(parameter.annotation)  # names, in one string or as a list
    if not isinstance(value, kind) and not (takes_lists and isinstance(value, list)):
        raise TypeError(f"{name}={value!r}: expected {_KINDS.get(kind, f'a {kind.__name__}')}")
    return value


def _parameters(detector: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(detector).parameters
    return {name: each for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}
