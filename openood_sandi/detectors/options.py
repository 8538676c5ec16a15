"""What the options of a detector's class are, what their values may be, and values from a file or a command line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

__all__ = [
    "as_option",
    "options_of",
    "plain_numbers",
    "require_choice",
    "require_count",
    "require_name",
    "require_names",
    "require_positive",
    "require_share",
    "require_switch",
]

_CHOICES = {
    "variant": ("auto", "Z", "A"),
    "combine": ("count", "union", "intersection"),
    "attribution": ("max_logit", "cross_entropy"),
    "ascent": ("cross_entropy", "max_logit"),
    "top_over": ("channels", "labels"),
    "denominator": ("mean", "channel"),
    "precision": ("exact", "bounded"),
}

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


def options_of(detector: Callable[..., Any]) -> dict[str, Any]:
    """The options of a detector's class, which are its keyword-only arguments, and their defaults."""
    return {name: parameter.default for name, parameter in _parameters(detector).items()}


def as_option(detector: Callable[..., Any], name: str, value: Any) -> Any:
    """``value`` as option ``name`` takes it: of its default's type; a number also from a string.

    Raises:
        TypeError: it has another type.
    """
    parameter, value = _parameters(detector)[name], _plain(value)
    kind = type(parameter.default)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 0 as an integer and 1e-3 as a string
    takes_lists = "Sequence[" in str(parameter.annotation)  # names, in one string or as a list
    if not isinstance(value, kind) and not (takes_lists and isinstance(value, list)):
        raise TypeError(f"{name}={value!r}: expected {_KINDS.get(kind, f'a {kind.__name__}')}")
    return value


def plain_numbers(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates a detector's ``__init__`` so that options may be NumPy's numbers, as ``np.int64(2)``."""

    @functools.wraps(init)
    def with_plain_numbers(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{name: _plain(value) for name, value in options.items()})

    return with_plain_numbers


def _plain(value: Any) -> Any:
    """A scalar of NumPy's or torch's as Python's own."""
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0):
        return value.item()
    return value


def _parameters(detector: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(detector).parameters
    return {name: each for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}


def require_choice(**options: str) -> None:
    for option, value in options.items():
        if not isinstance(value, str) or value not in _CHOICES[option]:
            raise ValueError(f"{option}={value!r}: expected one of {', '.join(map(repr, _CHOICES[option]))}")


def require_count(**options: int) -> None:
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{option}={value!r}: expected a whole number, at least 1")


def require_positive(**options: float) -> None:
    for option, value in options.items():
        infinite = option == "epsilon" and value == math.inf
        if not infinite and not (_is_number(value) and 0 < value <= torch.finfo(torch.float32).max):
            raise ValueError(f"{option}={value!r}: expected a positive number")


def require_share(**options: float) -> None:
    for option, value in options.items():
        if not _is_number(value) or not 0 < value <= 1:
            raise ValueError(f"{option}={value!r}: expected a share, above 0 and at most 1")


def require_switch(**options: bool) -> None:
    for option, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{option}={value!r}: expected True or False")


def require_name(**options: str) -> None:
    for option, value in options.items():
        if not isinstance(value, str):
            raise TypeError(f"{option}={value!r}: expected a string")


def require_names(**options: str | Sequence[str]) -> None:
    for option, value in options.items():
        if not isinstance(value, str):
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"{option}={value!r}: expected a string or a list of strings")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
