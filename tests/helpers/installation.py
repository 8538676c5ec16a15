"""The package as users install it: a wheel, or an editable install, in a virtual environment of its own.

The environments see the libraries of the Python that runs the tests, but not its start-up files and not this
checkout.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.helpers.places import ROOT

SOURCES = ("openood_sandi", "configs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@functools.cache
def workspace() -> Path:
    """A temporary folder for the whole test session."""
    folder = tempfile.mkdtemp(prefix="openood-sandi-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def source() -> Path:
    """A copy of the checkout, for builds to write into."""
    copy = workspace() / "source"
    for name in SOURCES:
        original, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if original.is_dir():
            shutil.copytree(original, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(original, target)
    return copy


@functools.cache
def wheel() -> Path:
    """The built wheel."""
    folder = workspace() / "wheel"
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source()))
    (built,) = folder.glob("*.whl")
    return built


@functools.cache
def wheel_python() -> str:
    """Python of an environment that has the wheel."""
    python = environment("from-wheel")
    pip(python, "install", "--ignore-installed", str(wheel()))
    return python


@functools.cache
def editable_python() -> str:
    """Python of an environment that has an editable install."""
    python = environment("editable")
    pip(python, "install", "--ignore-installed", "--no-build-isolation", "-e", str(source()))
    return python


def environment(name: str) -> str:
    """Python of a new virtual environment that sees this Python's libraries."""
    folder = workspace() / name
    venv.create(folder, with_pip=False)
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # plain lines: the start-up files in these folders stay unread
    (site_packages / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    return str(folder / "bin" / "python")


def pip(python: str, command: str, *arguments: str) -> None:
    """Run pip without dependencies and without an index."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    run(python, "-m", "pip", command, *options, *arguments, cwd=workspace())


def variables_of() -> dict[str, str]:
    """The environment with two threads and without PYTHONPATH, as that of a user of an installed package."""
    left_out = ("PYTHONPATH", "OPENOOD_SANDI_DISABLE")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**inherited, "OMP_NUM_THREADS": "2", "PYTHONNOUSERSITE": "1"}


def run(
    *command: str, cwd: Path, check: bool = True, timeout: float = 600, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command without stdin, in the environment of :func:`variables_of` with ``variables`` added."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**variables_of(), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result
