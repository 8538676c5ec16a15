"""Postprocessors that packages offer to OpenOOD, and where their yml files are.

A package joins in by an entry point in the group ``openood.postprocessors``::

    [project.entry-points."openood.postprocessors"]
    mymethod = "mypackage.module:MyPostprocessor"      # a BasePostprocessor; called with OpenOOD's config
    another = "mypackage.another:INFO"                 # or a detector, as a DetectorInfo describes it

and by ``configs/postprocessors/mymethod.yml``, inside ``mypackage`` (as a wheel ships it) or beside it (as a
source checkout has it). A name offered here goes before OpenOOD's own of the same name.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openood_sandi.plugin.warning import warn

if TYPE_CHECKING:
    from openood_sandi.detectors.info import DetectorInfo

GROUP = "openood.postprocessors"

#: One row a detector of this package: its name, the module with its INFO, and the class in
#: :mod:`openood_sandi.postprocessor` that is made of it. A literal, which setup.py reads without importing anything.
DETECTORS = {
    "sandi": ("openood_sandi.detectors.sandi", "SandIPostprocessor"),
    "sandi_c": ("openood_sandi.detectors.sandi.calibrated", "SandICPostprocessor"),
    "gaia": ("openood_sandi.detectors.gaia", "GAIAPostprocessor"),
    "gsc": ("openood_sandi.detectors.gsc", "GSCPostprocessor"),
    "prototype_fusion": ("openood_sandi.detectors.prototype_fusion", "PrototypeFusionPostprocessor"),
}

_POSTPROCESSORS = "openood_sandi.postprocessor"
_added: dict[str, DetectorInfo] = {}


def add(info: DetectorInfo) -> None:
    """Offer a detector to OpenOOD, in this process; see :func:`openood_sandi.register`.

    Raises:
        ValueError: something else is offered under its name.
    """
    if _added.get(info.name) == info:
        return
    if info.name in entry_points():
        raise ValueError(
            f"{info.detector}: its name {info.name!r} is already that of {entry_points()[info.name].value}; "
            "choose one that no package offers"
        )
    _added[info.name] = info
    entry_points.cache_clear()
    _loaded.cache_clear()


def infos() -> dict[str, DetectorInfo]:
    """What the detectors of this package, and those added, say of themselves, by name."""
    own = {name: import_module(module).INFO for name, (module, _) in DETECTORS.items()}
    return own | _added


def own_info(postprocessor: str) -> DetectorInfo | None:
    """This package's detector behind a class of :mod:`openood_sandi.postprocessor`, None if there is none."""
    return next((import_module(module).INFO for module, own in DETECTORS.values() if own == postprocessor), None)


@functools.cache
def entry_points() -> dict[str, metadata.EntryPoint]:
    """Every postprocessor on offer by name; of two with one name the first found stays, with a warning."""
    values = {name: f"{_POSTPROCESSORS}:{own}" for name, (_, own) in DETECTORS.items()}
    values |= {name: info.detector for name, info in _added.items()}
    found = {name: metadata.EntryPoint(name, value, GROUP) for name, value in values.items()}
    for entry in metadata.entry_points(group=GROUP):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            warn(
                f"two packages offer the OpenOOD postprocessor {entry.name!r}: "
                f"{first.value} is used, {entry.value} is left out",
                stacklevel=2,
            )
    return found


@functools.cache
def _loaded() -> dict[str, Any]:
    """Class by name, or the exception that loading it raised, which is also given as a warning."""
    loaded: dict[str, Any] = {}
    for name, entry in entry_points().items():
        try:
            offered = _added[name] if name in _added else entry.load()
            # a class, or a function that gives one; else a DetectorInfo, of which one is made
            loaded[name] = offered if callable(offered) else import_module(_POSTPROCESSORS).postprocessor_of(offered)
        except Exception as error:  # whatever another package's import raises must not stop OpenOOD
            loaded[name] = error
            warn(
                f"the OpenOOD postprocessor {name!r} ({entry.value}) is left out, as it does not load: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
    return loaded


def postprocessor_class(name: str) -> Any | None:
    """The class offered under ``name``, None if no package offers it.

    Raises:
        ImportError: it is offered and does not load.
    """
    offered = _loaded().get(name)
    if isinstance(offered, Exception):
        raise ImportError(
            f"the postprocessor {name!r} ({entry_points()[name].value}) does not load: "
            f"{type(offered).__name__}: {offered}"
        ) from offered
    return offered


def config_file(name: str) -> Path | None:
    """Path of the yml file that the package offering ``name`` ships, None where there is none."""
    entry = entry_points().get(name)
    if entry is None:
        return None
    for folder in _folders(entry.module.partition(".")[0]):
        candidate = folder / "configs" / "postprocessors" / f"{name}.yml"
        if candidate.is_file():
            return candidate
    return None


def _folders(package: str) -> Iterator[Path]:
    """Where a package, or a module that is none, may have its ``configs``: in its folder or beside that."""
    loaded = sys.modules.get(package)
    # find_spec of a top-level name imports nothing; a script that runs has none
    spec = getattr(loaded, "__spec__", None) if loaded else util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        yield Path(folder)
        yield Path(folder).parent
    file = getattr(loaded, "__file__", None) or (spec and spec.origin)
    if file and not (spec and spec.submodule_search_locations):
        yield Path(file).parent


def resolve_config(path: Any) -> Any:
    """``.../postprocessors/<name>.yml`` that is absent from disk becomes the file its package ships."""
    if not isinstance(path, str) or not path.endswith(".yml") or os.path.exists(path):
        return path
    if os.path.basename(os.path.dirname(path)) != "postprocessors":
        return path
    return str(config_file(Path(path).stem) or path)
