"""Where and with what a result was made."""

from __future__ import annotations

import functools
import importlib.util
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

import openood_sandi

LIBRARIES = ("numpy", "scikit-learn", "pandas", "pillow", "matplotlib", "torchvision", "pytorch-ood", "faiss-cpu")
"""Those that are missing are left out."""


def environment(device: torch.device) -> dict[str, object]:
    """Commits, hardware and versions, ready for JSON."""
    return {
        "commit": _commit(Path(__file__).parent),
        "openood_commit": _openood_commit(),
        "hardware": hardware(device),
        "versions": {
            "openood-sandi": openood_sandi.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: version for name in LIBRARIES if (version := _version(name))},
        },
    }


def hardware(device: torch.device) -> dict[str, object]:
    """What decides how fast things are."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "torch_threads": torch.get_num_threads(),
    }


def described(machine: Mapping[str, object]) -> str:
    """:func:`hardware` in words."""
    if machine["device"] == "cpu":
        return f"{machine['processor']}, {machine['torch_threads']} CPU thread(s)"
    return str(machine["device"])


def library_version(name: str) -> str | None:
    """The version of a library that has methods, OpenOOD's as a commit; None for this package, or if unknown."""
    if name == "OpenOOD":
        return _openood_commit()
    return None if name == "openood-sandi" else _version(name)


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _openood_commit() -> str | None:
    """Of the OpenOOD that would be imported, if it is a checkout."""
    spec = importlib.util.find_spec("openood")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    return _commit(Path(folder)) if folder else None


def _commit(folder: Path) -> str | None:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _processor() -> str:
    # Linux keeps the processor's name out of the platform module.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
