"""Hooks that act in one thread only: a network that other threads use as well is none of a pass's business there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["in_this_thread"]


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook`` as one that acts in passes of the thread that made it, and lets those of others be."""
    thread = threading.get_ident()

    def acting(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == thread else None

    return acting
