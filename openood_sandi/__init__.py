"""S&I (Splitting & Integrating, ICML 2025): out-of-distribution detection by layer-splitting attribution.

>>> from openood_sandi import SandI
>>> detector = SandI(net)
>>> pred, tau = detector(images)          # tau (B,): larger = more out-of-distribution

Importing the package imports nothing else: the names below are loaded when they are first used, because
the package is touched at every Python start (see :mod:`openood_sandi.startup`).
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from openood_sandi.detectors.detector import Detector, Scores
    from openood_sandi.detectors.gsc import GradientShortCircuit
    from openood_sandi.detectors.info import DetectorInfo
    from openood_sandi.detectors.prototype_fusion import PrototypeFusion
    from openood_sandi.detectors.sandi.calibrated import SandIC
    from openood_sandi.detectors.sandi.detector import SandI
    from openood_sandi.detectors.sandi.served import ServedSandIC
    from openood_sandi.engine.backward import Objective
    from openood_sandi.engine.errors import ReplayError
    from openood_sandi.engine.network import SplitNetwork
    from openood_sandi.engine.walk import Observer, Walk
    from openood_sandi.plugin.seams import register
    from openood_sandi.runs.loaders import folder
    from openood_sandi.runs.score import score_dataset

__version__ = "0.1.0"

#: The public names, and the modules that they are loaded from.
_HOMES = {
    "Detector": "detectors.detector",
    "DetectorInfo": "detectors.info",
    "GradientShortCircuit": "detectors.gsc",
    "Objective": "engine.backward",
    "Observer": "engine.walk",
    "PrototypeFusion": "detectors.prototype_fusion",
    "ReplayError": "engine.errors",
    "SandI": "detectors.sandi.detector",
    "SandIC": "detectors.sandi.calibrated",
    "Scores": "detectors.detector",
    "ServedSandIC": "detectors.sandi.served",
    "SplitNetwork": "engine.network",
    "Walk": "engine.walk",
    "folder": "runs.loaders",
    "register": "plugin.seams",
    "score_dataset": "runs.score",
}

__all__ = [
    "Detector",
    "DetectorInfo",
    "GradientShortCircuit",
    "Objective",
    "Observer",
    "PrototypeFusion",
    "ReplayError",
    "SandI",
    "SandIC",
    "Scores",
    "ServedSandIC",
    "SplitNetwork",
    "Walk",
    "__version__",
    "folder",
    "register",
    "score_dataset",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class OldNames:
    """Meta-path finder for this package's modules under the names that they had before 0.2; the last to be asked."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        if not fullname.startswith("openood_sandi."):
            return None
        from openood_sandi import moved

        return moved.find(fullname)


sys.meta_path.append(OldNames)
