"""Modules under the names that they had before 0.2: they load for one release, with a DeprecationWarning.

An old name gives the very module that has the new one, so that classes are the same ones and old pickles load.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Name of a module in this package before 0.2, and its name now.
MOVED = {
    "attack": "engine.attack",
    "bad_images": "runs.unreadable",
    "batches": "runs.batches",
    "checkpoints": "plugin.checkpoints",
    "checks": "engine.checks",
    "command_line": "plugin.command_line",
    "cpu": "plugin.without_gpu",
    "detector": "detectors.sandi.detector",
    "distributed": "runs.ranks",
    "errors": "engine.errors",
    "features": "engine.features",
    "fingerprints": "runs.keys",
    "gsc": "detectors.gsc",
    "inference": "runs.score",
    "inplace": "engine.inplace",
    "lanes": "engine.lanes",
    "masks": "detectors.sandi.rectifiers",
    "memory": "engine.memory",
    "objectives": "detectors.sandi.losses",
    "paths": "engine.walk",
    "protocol": "plugin.cifar100",
    "prototype_fusion": "detectors.prototype_fusion",
    "rectifiers": "detectors.sandi.rectifiers",
    "registry": "plugin.registry",
    "replay": "engine.tape",
    "score_cache": "runs.cache",
    "shortcut": "detectors.sandi.z_scores",
    "splitting": "engine.splits",
    "standins": "plugin.standins",
    "statistics": "detectors.sandi.densities",
    "torchrun": "plugin.torchrun",
}


def infer(*arguments: Any, description: str = "", progress: bool = True, **options: Any) -> Any:
    """:func:`openood_sandi.score_dataset` as it was called before 0.2."""
    from openood_sandi import score_dataset

    return score_dataset(*arguments, progress=progress and (description or True), **options)


def find(fullname: str) -> ModuleSpec | None:
    """The spec of ``openood_sandi.<old name>``; None for any other name."""
    package, _, name = fullname.partition(".")
    return ModuleSpec(fullname, _Loader(f"{package}.{MOVED[name]}")) if name in MOVED else None  # type: ignore[arg-type]


class _Loader:
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> None:
        """None: an empty module, whose place the real one takes."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warn(old, self.new)
        sys.modules[old] = found = import_module(self.new)
        if old == "openood_sandi.inference":
            vars(found).setdefault("infer", infer)


def warn(old: str, new: str) -> None:
    """Says to whoever asked for ``old`` that it is now called ``new``."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=3)
