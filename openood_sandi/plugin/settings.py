"""What is asked of a postprocessor's settings, the ``postprocessor:`` of a yml file, whoever's method it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["require_sound"]


def require_sound(settings: Any) -> None:
    """Check the kinds of ``APS_mode``, ``postprocessor_args`` and ``postprocessor_sweep``, where they are given.

    Raises:
        ValueError: one is of another kind, such as the text 'False', which OpenOOD would take for true.
    """
    name, search = settings.get("name"), settings.get("APS_mode")
    if search is not None and not isinstance(search, bool):
        raise ValueError(f"{name}: APS_mode={search!r}: expected True or False")
    for group in ("postprocessor_args", "postprocessor_sweep"):
        given = settings.get(group)
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"{name}: {group}={given!r}: expected options by name, such as steps: 2")
    for option, values in (settings.get("postprocessor_sweep") or {}).items():
        if not isinstance(values, list):
            raise ValueError(f"{name}: postprocessor_sweep: {option}={values!r}: expected a list of values")
