"""How this package's detectors, and others', get into OpenOOD."""

#: What the module that had this name before 0.2 offered; it is :mod:`openood_sandi.plugin.seams` now.
_MOVED = ("SEAMS", "find_openood", "open_seam", "register")


def __getattr__(name: str) -> object:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from openood_sandi import moved

    moved.warn(f"{__name__}.{name}", f"{__name__}.seams.{name}")
    return getattr(import_module(f"{__name__}.seams"), name)
