"""Whatever is left of an installed package, Python starts in silence, and OpenOOD imports."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import installation

pytestmark = pytest.mark.slow  # every test installs the wheel


def broken(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda packages: (packages / "openood_sandi" / name).write_bytes(content) and None


def removed(*names: str) -> Callable[[Path], None]:
    def remove(packages: Path) -> None:
        for name in names:
            for path in packages.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def unreadable(packages: Path) -> None:
    """As a file that the user may not read; the superuser may read all files, but no folder as a file."""
    (packages / "openood_sandi/startup.py").unlink()
    (packages / "openood_sandi/startup.py").mkdir()


#: What happened to site-packages.
DAMAGES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda packages: None,
    "no package": removed("openood_sandi"),
    "no metadata": removed("*.dist-info"),
    "no start-up module": removed("openood_sandi/startup.py"),
    "no plugin": removed("openood_sandi/plugin/seams.py"),
    "no modules but the start-up module": removed("openood_sandi/[!s]*"),
    "an unreadable start-up module": unreadable,
    "an empty start-up module": broken("startup.py", b""),
    "half a start-up module": broken("startup.py", b"def activate():\n    return (\n"),
    "no Python": broken("startup.py", b"\0\xff\0"),
    "a start-up module that fails": broken("startup.py", b"def activate():\n    raise OSError('disk')\n"),
    "a package that fails": broken("__init__.py", b"1 / 0\n"),
    "a plugin that fails": broken("plugin/seams.py", b"import no_such_module_at_all\n"),
}
#: Those of them that leave a start-up module which finds out when OpenOOD is imported.
TOLD = [damage for name, damage in DAMAGES.items() if "plugin" in name or "no modules" in name]


@pytest.fixture(scope="module")
def python() -> str:
    return installation.environment("damaged")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_python_starts_and_openood_imports(python: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    (packages,) = Path(python).parents[1].glob("lib/python*/site-packages")
    removed("openood_sandi*")(packages)
    zipfile.ZipFile(installation.wheel()).extractall(packages)
    damage(packages)
    started = installation.run(python, "-c", "print('started')", cwd=tmp_path)
    assert (started.stdout, started.stderr) == ("started\n", "")
    (tmp_path / "openood").mkdir()
    (tmp_path / "openood/__init__.py").write_text("print('imported')")
    imported = installation.run(python, "-c", "import openood", cwd=tmp_path)
    assert imported.stdout == "imported\n"
    told = "openood-sandi is left out: openood_sandi.plugin.seams does not load"
    assert imported.stderr.startswith(told) if damage in TOLD else imported.stderr == ""
