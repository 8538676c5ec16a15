"""Modules by what they are made of: libraries by version, others by their source files and all that these import.

The imports are read off the sources, not off ``sys.modules``: a module that a function imports when it is first called
belongs to what that function does, before the call and after it, in whatever order others were imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FunctionType
from typing import Any

__all__ = ["closure", "is_foreign", "is_library", "package_files", "version"]

#: Libraries that every key tells by version, wherever they are installed, and the names they are installed under.
ALWAYS = {"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow"}
#: The names of folders that installers put libraries in.
_INSTALLED = {"site-packages", "dist-packages"}
_OWN = __name__.partition(".")[0]


def closure(modules: Iterable[str]) -> list[tuple[str, str | None]]:
    """Modules and everything that their sources import, in turn, sorted by name.

    Args:
        modules: full names. ``__main__`` and names without a source file are left out: what is defined there is told
            by its code.

    Returns:
        (name, SHA-256 of the file) of each module, (name, version) of each library; Python itself and this package,
        which every key has anyway, are left out.
    """
    found: dict[str, str | None] = {}
    waiting = sorted(modules)
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in found or top in found or name == "__main__":
            continue
        if is_library(name):
            if top != _OWN and not _is_standard(top):
                found[top] = version(top)
            continue
        parent, _, _ = name.rpartition(".")
        file = _file(name)
        if file is not None:
            content = _content(file, *_stamp(file))
            found[name] = content.digest
            waiting += [*content.imports(name, file.stem == "__init__"), *([parent] if parent else [])]
    return sorted(found.items())


@functools.cache
def is_library(module: str) -> bool:
    """Whether a module's version tells it: Python's own, this package's, and those that an installer put in place."""
    top = module.partition(".")[0]
    if top in (_OWN, *ALWAYS) or _is_standard(top):
        return True
    spec = _found(top)
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
    return any(_INSTALLED & {*Path(place).parts} for place in places) and version(top) is not None


def is_foreign(value: Any) -> bool:
    """Whether it is a function, or a called object, that no library's version tells of, wherever it has been put."""
    inner = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    inner = inner.func if isinstance(inner, functools.partial) else inner
    if isinstance(inner, type) or not callable(inner):
        return False
    module = inner.__globals__.get("__name__") if isinstance(inner, FunctionType) else type(inner).__module__
    return not isinstance(module, str) or not is_library(module)


@functools.cache
def version(top: str) -> str | None:
    """The version of the library that gives the module ``top``; None if it tells none."""
    for names in (lambda: (ALWAYS.get(top, top),), lambda: _distributions().get(top, ())):
        for name in names():
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return None


_distributions = functools.cache(metadata.packages_distributions)  # takes a while: it looks at every library


def package_files() -> list[tuple[str, str]]:
    """(path within this package, SHA-256) of every source file of it."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    return [(file.relative_to(package).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


@functools.cache
def _is_standard(top: str) -> bool:
    if top not in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(top), "__file__", None)  # a script's own module may be called as one of Python's
    return file is None or any(Path(file).is_relative_to(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib"))


def _file(module: str) -> Path | None:
    """Its file; None if it has none, as a folder without ``__init__.py``, or if there is no such module."""
    origin = getattr(sys.modules.get(module), "__file__", None)
    if origin is None:
        spec = _found(module)
        origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and os.path.isfile(origin) else None


def _found(module: str) -> ModuleSpec | None:
    """A module's spec, without importing it or its parents."""
    known = getattr(sys.modules.get(module), "__spec__", None)
    if known is not None:
        return known  # type: ignore[no-any-return]
    parent, _, _ = module.rpartition(".")
    try:
        if not parent:
            return PathFinder.find_spec(module) or importlib.util.find_spec(module)
        above = _found(parent)
        places = None if above is None else above.submodule_search_locations
        return None if places is None else PathFinder.find_spec(module, list(places))
    except (ImportError, ValueError, AttributeError):
        return None


def _stamp(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_ctime_ns


class _Content:
    """A file's digest, and the names that it imports as they stand there: (module, number of leading dots)."""

    def __init__(self, content: bytes, is_source: bool) -> None:
        self.digest = hashlib.sha256(content).hexdigest()
        self._names = sorted(set(_imports(content))) if is_source else []

    def imports(self, module: str, is_package: bool) -> Iterator[str]:
        """Full names of what ``module``, whose file this is, imports, their parents too; some may not be modules."""
        for name, dots in self._names:
            above = module.split(".")[: None if is_package and dots == 1 else -(dots - is_package)] if dots else []
            parts = [*above, *name.split(".")] if name else above
            yield from (".".join(parts[: count + 1]) for count in range(len(parts)))


@functools.lru_cache(4096)
def _content(file: Path, *_: int) -> _Content:
    return _Content(file.read_bytes(), file.suffix == ".py")


def _imports(source: bytes) -> Iterator[tuple[str, int]]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # another Python's; its bytes tell it all the same
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield base, node.level
            yield from ((f"{base}.{alias.name}".strip("."), node.level) for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value.lstrip("."), 0
