"""Libraries that bring networks, imported when one is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from . import SourceError


def imported(module: str) -> Any:
    """A module of a library; SourceError if it is not installed."""
    package = module.partition(".")[0]
    try:
        if package == "openood":
            openood_importable()
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "let OPENOOD_HOME name a checkout, or " if package == "openood" else ""
        raise SourceError(f"{package} cannot be imported ({error}): {remedy}pip install it.") from error


def openood_importable() -> None:
    """Let a checkout that ``$OPENOOD_HOME`` names be imported, without the packages that no benchmark needs of it."""
    from openood_sandi import register

    register()
    home = os.environ.get("OPENOOD_HOME")
    if home and home not in sys.path:
        sys.path.append(home)  # last: a checkout has a package "tests" of its own
