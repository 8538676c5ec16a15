"""S&I (Splitting & Integrating, ICML 2025): out-of-distribution detection by layer-splitting attribution.

>>> from openood_sandi import SandI
>>> detector = SandI(net)
>>> pred, tau = detector(images)          # tau (B,): larger = more out-of-distribution

Importing the package imports nothing else: the names below are loaded when they are first used, because
the package is touched at every Python start (see :mod:`openood_sandi.startup`).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from openood_sandi.detectors.sandi.detector import SandI
    from openood_sandi.plugin.seams import register

__all__ = ["SandI", "__version__", "register"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "SandI":
        from openood_sandi.detectors.sandi.detector import SandI

        return SandI
    if name == "register":
        from openood_sandi.plugin.seams import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
