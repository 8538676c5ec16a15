"""Inert stand-ins for packages that OpenOOD imports and that a current Python does not have.

OpenOOD imports all of its methods at once, and with them packages that only a few need and that do not
install or import beside NumPy 2. For those, and only for an import statement in a module of OpenOOD's own, a
package that is missing, or dies on import, gives way to a module whose attributes say what to install when
they are used. The stand-in leaves ``sys.modules`` at the next import, or when that module of OpenOOD is
executed, so that no other library meets it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any, NoReturn, TypeVar

#: Package by import name, and how to get the real one.
INSTALL = {
    "cv2": "pip install opencv-python-headless",
    "diffdist": "pip install diffdist",
    "foolbox": "pip install foolbox",
    "gdown": "pip install gdown",
    "imgaug": "pip install six imageio scikit-image shapely matplotlib opencv-python-headless"
    " && pip install --no-deps imaug",
    "libmr": "pip install Cython setuptools && pip install --no-build-isolation libmr",
    "statsmodels": "pip install statsmodels",
    "timm": "pip install timm",
}

#: What the extra ``openood-sandi[openood]`` installs, by import name: needed by all of OpenOOD, never stood in for.
EXTRA = ("PIL", "faiss", "pandas", "scipy", "sklearn", "torchvision", "tqdm", "yaml")

_reasons: dict[str, str] = {}  # package: why it is stood in for
_present: set[str] = set()  # names of stand-ins now in sys.modules

T = TypeVar("T")


class StandIn(ModuleType):
    """A module, any of whose attributes can be imported and none used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class Missing:
    """An attribute of a stand-in; calling it or reading from it raises ImportError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise missing(self.name)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise missing(f"{self.name}.{name}")


def missing(name: str, user: str = "this part of OpenOOD") -> ImportError:
    """The error for using ``name`` of a package that is stood in for: why, and how to install it."""
    package = name.partition(".")[0]
    reason = _reasons.get(package, "is not installed")
    what = package if name == package else f"{package} ({name})"
    return ImportError(f"{user} needs {what}, which {reason}: {INSTALL[package]}", name=package)


def require_real(postprocessor: T) -> T:
    """Returns ``postprocessor``, or raises ImportError where the module that defines it met a stand-in."""
    cls = type(postprocessor)
    for value in vars(sys.modules[cls.__module__]).values():
        if isinstance(value, (StandIn, Missing)):
            name = value.__name__ if isinstance(value, StandIn) else value.name
            raise missing(name, f"the postprocessor {cls.__name__} ({cls.__module__})")
    return postprocessor


class StandInFinder:
    """Meta-path finder that answers OpenOOD's own imports of the packages in :data:`INSTALL`."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        withdraw(keep=package)
        if package not in INSTALL or not _importer_is_openood():
            return None
        if fullname != package:
            # a submodule: only of a stand-in, never of the real package
            return _stand_in(fullname) if isinstance(sys.modules.get(package), StandIn) else None
        for finder in sys.meta_path:
            if finder is not StandInFinder and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return _tolerate(spec)
        _reasons[package] = "is not installed"
        return _stand_in(fullname)


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        _present.add(module.__name__)


def _stand_in(fullname: str) -> ModuleSpec:
    return ModuleSpec(fullname, _Loader(), is_package=True)  # type: ignore[arg-type]


def _tolerate(spec: ModuleSpec) -> ModuleSpec:
    """The spec of a real package, changed so that the package becomes a stand-in if its import fails."""
    if not hasattr(spec.loader, "exec_module"):
        return spec
    execute = spec.loader.exec_module  # type: ignore[union-attr]

    def execute_or_stand_in(module: ModuleType) -> None:
        try:
            execute(module)
        except Exception as error:
            _reasons[spec.name] = f"does not import ({type(error).__name__}: {error})"
            for name in list(vars(module)):
                if not name.startswith("__"):
                    delattr(module, name)
            module.__class__ = StandIn
            module.__path__ = []
            _present.add(spec.name)
            # what the package has imported of itself before it failed
            _present.update(name for name in sys.modules if name.startswith(f"{spec.name}."))

    spec.loader.exec_module = execute_or_stand_in  # type: ignore[union-attr, method-assign]
    return spec


def _importer_is_openood() -> bool:
    """Whether the import under way stands in the body of one of OpenOOD's modules."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("importlib", "openood_sandi"):
            return name.partition(".")[0] == "openood" and frame.f_code.co_name == "<module>"
        frame = frame.f_back
    return False


@contextmanager
def extra_named() -> Iterator[None]:
    """Has the error of an OpenOOD module that misses a package of :data:`EXTRA` say how to install all of them."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in EXTRA and _REMEDY not in error.msg:
            error.msg += _REMEDY
        raise


_REMEDY = ', which OpenOOD needs: pip install "openood-sandi[openood]" installs all that it imports'


def install() -> None:
    """Put :class:`StandInFinder` first on ``sys.meta_path``, once."""
    if StandInFinder not in sys.meta_path:
        sys.meta_path.insert(0, StandInFinder)


def withdraw(keep: str | None = None) -> None:
    """Take the stand-ins, but for package ``keep``, out of ``sys.modules``; what OpenOOD has bound stays."""
    for name in [name for name in _present if name.partition(".")[0] != keep]:
        sys.modules.pop(name, None)
        _present.discard(name)
