"""Warnings that stay warnings: under ``python -W error`` too, OpenOOD goes on without what does not fit it."""

from __future__ import annotations

import warnings

__all__ = ["warn"]


def warn(message: str, stacklevel: int = 1) -> None:
    """As ``warnings.warn``, of the caller's caller by ``stacklevel`` 2; where the filters make errors of warnings, it
    is shown all the same and nothing is raised."""
    try:
        warnings.warn(message, stacklevel=stacklevel + 1)
    except UserWarning:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(message, stacklevel=stacklevel + 1)
