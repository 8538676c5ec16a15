"""Where and with what a result was made."""

from __future__ import annotations

import functools
import importlib.util
import platform
import subprocess
import timeit
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import openood_sandi
from openood_sandi.engine.memory import free_memory

__all__ = [
    "described",
    "environment",
    "free_memory",
    "hardware",
    "library_version",
    "on_quickest_threads",
    "same_arithmetic_on_gpus",
]

LIBRARIES = ("numpy", "scikit-learn", "pandas", "pillow", "matplotlib", "torchvision", "pytorch-ood", "faiss-cpu")
"""Those that are missing are left out."""


def environment(device: torch.device) -> dict[str, object]:
    """Commits, hardware and versions, ready for JSON."""
    return {
        "commit": _commit(Path(__file__).parent),
        "openood_commit": library_version("OpenOOD"),
        "hardware": hardware(device),
        "versions": {
            "openood-sandi": openood_sandi.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: version for name in LIBRARIES if (version := library_version(name))},
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


def same_arithmetic_on_gpus(device: torch.device) -> None:
    """Have float32 convolutions be float32 on a GPU, where otherwise no two batch sizes agree."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


def on_quickest_threads(network: nn.Module, images: torch.Tensor) -> None:
    """Have torch use one thread from now on where a batch passes no faster on all of them, as in small networks."""
    everything = torch.get_num_threads()
    if everything == 1:
        return
    seconds = {}
    for count in (everything, 1):
        torch.set_num_threads(count)
        with torch.no_grad():
            network(images)
            seconds[count] = min(timeit.repeat(lambda: network(images), number=1, repeat=3))
    torch.set_num_threads(1 if seconds[1] <= seconds[everything] else everything)


@functools.cache
def library_version(name: str) -> str | None:
    """The version of a library, OpenOOD's as a commit if it is a checkout; None for this package, or if unknown."""
    if name == "openood-sandi":
        return None
    if name == "OpenOOD":  # the one that would be imported
        spec = importlib.util.find_spec("openood")
        folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
        return _commit(Path(folder)) if folder else None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
