"""Postprocessors that installed packages offer to OpenOOD, and where their yml files are.

A package joins in by an entry point in the group ``openood.postprocessors``::

    [project.entry-points."openood.postprocessors"]
    mymethod = "mypackage.module:MyPostprocessor"      # a BasePostprocessor; called with OpenOOD's config

and by ``configs/postprocessors/mymethod.yml``, inside ``mypackage`` (as a wheel ships it) or beside it (as a
source checkout has it). A name offered here goes before OpenOOD's own of the same name.
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib import metadata, util
from pathlib import Path
from typing import Any

GROUP = "openood.postprocessors"

#: This package's own, so that a plain source checkout on ``PYTHONPATH`` has them without installed metadata.
OWN = {
    "sandi": "openood_sandi.postprocessor:SandIPostprocessor",
    "gaia": "openood_sandi.postprocessor:GAIAPostprocessor",
    "gsc": "openood_sandi.postprocessor:GSCPostprocessor",
    "prototype_fusion": "openood_sandi.postprocessor:PrototypeFusionPostprocessor",
}


@functools.cache
def entry_points() -> dict[str, metadata.EntryPoint]:
    """Every entry point of the group by name; of two with one name the first found stays, with a warning."""
    found = {name: metadata.EntryPoint(name, value, GROUP) for name, value in OWN.items()}
    for entry in metadata.entry_points(group=GROUP):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            warnings.warn(
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
            loaded[name] = entry.load()
        except Exception as error:  # whatever another package's import raises must not stop OpenOOD
            loaded[name] = error
            warnings.warn(
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
    # find_spec of a top-level name imports nothing
    spec = util.find_spec(entry.module.partition(".")[0])
    for package in (spec and spec.submodule_search_locations) or ():
        for folder in (Path(package), Path(package).parent):
            candidate = folder / "configs" / "postprocessors" / f"{name}.yml"
            if candidate.is_file():
                return candidate
    return None


def resolve_config(path: Any) -> Any:
    """``.../postprocessors/<name>.yml`` that is absent from disk becomes the file its package ships."""
    if not isinstance(path, str) or not path.endswith(".yml") or os.path.exists(path):
        return path
    if os.path.basename(os.path.dirname(path)) != "postprocessors":
        return path
    return str(config_file(Path(path).stem) or path)
