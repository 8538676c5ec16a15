"""What runs at every Python start: put a finder in place that waits for OpenOOD, and nothing else.

``openood_sandi.pth`` (``openood_sandi.start`` from Python 3.15 on, PEP 829) in site-packages calls
:func:`activate`. Until a module named ``openood`` is imported this costs one string comparison an import;
only then is :mod:`openood_sandi.plugin.seams` loaded. The module imports nothing that Python has not imported by
then.

Set the environment variable ``OPENOOD_SANDI_DISABLE`` to ``1`` (``true``, ``yes``, ``on``) to switch it off.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SWITCH = "OPENOOD_SANDI_DISABLE"
#: Values of the switch that leave the package at work; whoever sets it to any other wants it off.
NOT_DISABLED = ("", "0", "false", "no", "off")


class OpenOODFinder:
    """Meta-path finder for ``openood`` and its submodules; leaves every other name alone."""

    @staticmethod
    def find_spec(
        fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname != "openood" and not fullname.startswith("openood."):
            return None
        try:
            from openood_sandi.plugin import seams
        except Exception as error:  # a package that is half removed must not take OpenOOD with it
            sys.meta_path.remove(OpenOODFinder)
            reason = f"{type(error).__name__}: {error}"
            print(f"openood-sandi is left out: openood_sandi.plugin.seams does not load ({reason})", file=sys.stderr)
            return None
        return seams.find_openood(fullname, path, target)


def activate() -> None:
    """Put :class:`OpenOODFinder` first on ``sys.meta_path``, once, unless the environment switches it off."""
    if os.environ.get(SWITCH, "").strip().lower() in NOT_DISABLED:
        install()


def install() -> None:
    """Put :class:`OpenOODFinder` first on ``sys.meta_path``, once."""
    if OpenOODFinder not in sys.meta_path:
        sys.meta_path.insert(0, OpenOODFinder)
