"""A real OpenOOD for the tests: the checkout $OPENOOD_HOME, or one cloned into the user's cache."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import openood_sandi
from tests.helpers import installation, tiny

#: OpenOOD's files for its CIFAR-100 protocol, but the postprocessor's.
CONFIGS = [
    "configs/datasets/cifar100/cifar100.yml",
    "configs/datasets/cifar100/cifar100_ood.yml",
    "configs/networks/resnet18_32x32.yml",
    "configs/pipelines/test/test_ood.yml",
    "configs/preprocessors/base_preprocessor.yml",
]

ADDRESS = "https://github.com/Jingkang50/OpenOOD"
COMMIT = "3c35632"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "openood-sandi" / f"OpenOOD-{COMMIT}"
REMEDY = f"git clone {ADDRESS} DIR && git -C DIR checkout {COMMIT}, then OPENOOD_HOME=DIR pytest"


@pytest.fixture(scope="session")
def openood_home() -> Path:
    """An OpenOOD checkout to clone from; skips where there is none and none can be had."""
    home = os.environ.get("OPENOOD_HOME")
    if home:
        return Path(home).resolve()
    if not (CACHE / "main.py").is_file():
        try:
            subprocess.run(
                ["git", "clone", "--quiet", ADDRESS, str(CACHE)], check=True, timeout=300, capture_output=True
            )
            subprocess.run(["git", "-C", str(CACHE), "checkout", "--quiet", COMMIT], check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"needs OpenOOD, which could not be cloned ({type(error).__name__}): {REMEDY}")
    return CACHE


@pytest.fixture(scope="session")
def bare_checkout(openood_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unmodified checkout, without data and results, for other processes; skips where it cannot run."""
    checkout = clone(openood_home, tmp_path_factory.mktemp("bare"))
    code = "import openood_sandi; openood_sandi.register(); import openood.pipelines"
    trial = installation.run(sys.executable, "-c", code, cwd=checkout, check=False, PYTHONPATH=str(installation.ROOT))
    if trial.returncode:
        skip_without_openood(trial.stderr.strip().splitlines()[-1])
    return checkout


@pytest.fixture(scope="session")
def checkout(openood_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the data and network of :mod:`tests.helpers.tiny`, imported in this process; skips likewise."""
    checkout = clone(openood_home, tmp_path_factory.mktemp("full"))
    openood_sandi.register()
    sys.path.append(str(checkout))  # last: a checkout has a package "tests" of its own
    try:
        importlib.import_module("openood.pipelines")
    except Exception as error:  # imgaug dies of an AttributeError, for one
        skip_without_openood(f"{type(error).__name__}: {error}")
    tiny.write_images(checkout)
    tiny.write_checkpoint(tiny.network(), checkout)
    return checkout


def clone(home: Path, folder: Path) -> Path:
    """A checkout called ``openood``: scripts are run by that name from the folder above."""
    checkout = folder / "openood"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(home), str(checkout)], check=True)
    return checkout


def skip_without_openood(reason: str) -> NoReturn:
    pytest.skip(f'OpenOOD does not import ({reason}): pip install "openood-sandi[openood]"')


def git_status(checkout: Path) -> str:
    """What ``git status`` finds changed or added in a checkout."""
    return subprocess.run(
        ["git", "-C", str(checkout), "status", "--porcelain"], check=True, capture_output=True, text=True
    ).stdout
