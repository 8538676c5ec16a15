"""Functions of libraries that somebody has replaced in memory, as ``torch.nn.functional.relu = mine`` does.

A library is told by its version, and so are the functions that its own modules call; this tells what is left of that.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType

from openood_sandi.runs import sources

__all__ = ["functions"]

#: Modules whose functions networks and transforms call, and classes whose methods they do.
_MODULES = (
    *("torch", "torch.functional", "torch.nn.functional", "torch.nn.init", "numpy"),
    *("PIL.Image", "PIL.ImageFile", "PIL.ImageOps", "torchvision.datasets.folder"),
    *(f"torchvision.transforms.{name}" for name in ("functional", "_functional_pil", "_functional_tensor")),
    *(
        f"torchvision.transforms.v2.functional{name}"
        for name in ("", "._color", "._geometry", "._misc", "._type_conversion")
    ),
)
_CLASSES = (("torch", "Tensor"), ("PIL.Image", "Image"))
#: Modules that are always there, so that what they call by another name is the same in every process.
_ALWAYS = ("torch", "torch.nn.functional")


def functions() -> list[object]:
    """(where, name, function) of each that is no library's, and of those under another's name its own name."""
    found: list[object] = []
    for module in _MODULES:
        inside = vars(sys.modules[module]) if module in sys.modules else {}
        found += [(module, name, value) for name, value in sorted(inside.items()) if sources.is_foreign(value)]
    for module, name in _CLASSES:
        kind = getattr(sys.modules.get(module), name, None)
        inside = dict(vars(kind)) if kind is not None else {}
        found += [
            (f"{module}.{name}", each, value) for each, value in sorted(inside.items()) if sources.is_foreign(value)
        ]
    backend = getattr(sys.modules.get("torchvision"), "get_image_backend", lambda: "PIL")()
    found += [("torchvision", "image backend", backend)] if backend != "PIL" else []
    for module in _ALWAYS:
        known = vars(sys.modules[module]).items()
        called = [
            (name, value.__name__)
            for name, value in sorted(known)
            if isinstance(value, (FunctionType, BuiltinFunctionType))
        ]
        found += [(module, *pair) for pair in called if pair[0] != pair[1]]
    return found
