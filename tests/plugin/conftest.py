"""A real OpenOOD for the tests: the checkout $OPENOOD_HOME, or one cloned into the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    """An unmodified checkout called ``openood``, without data and results; skips where it cannot run."""
    checkout = tmp_path_factory.mktemp("bare") / "openood"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(openood_home), str(checkout)], check=True)
    code = "import openood_sandi; openood_sandi.register(); import openood.pipelines"
    trial = installation.run(sys.executable, "-c", code, cwd=checkout, check=False, PYTHONPATH=str(installation.ROOT))
    if trial.returncode:
        reason = trial.stderr.strip().splitlines()[-1]
        pytest.skip(f'OpenOOD does not import ({reason}): pip install "openood-sandi[openood]"')
    return checkout


@pytest.fixture(scope="session")
def checkout(bare_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the data and network of :mod:`tests.helpers.tiny`, importable in this process."""
    checkout = tmp_path_factory.mktemp("full") / "openood"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(bare_checkout), str(checkout)], check=True)
    import_openood_from(checkout)
    tiny.write_images(checkout)
    tiny.write_checkpoint(tiny.network(), checkout)
    return checkout


def import_openood_from(checkout: Path) -> None:
    import openood_sandi

    openood_sandi.register()
    sys.path.append(str(checkout))  # last: a checkout has a package "tests" of its own


def git_status(checkout: Path) -> str:
    """What ``git status`` finds changed or added in a checkout."""
    return subprocess.run(
        ["git", "-C", str(checkout), "status", "--porcelain"], check=True, capture_output=True, text=True
    ).stdout
