"""Where and with what a result was made."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import openood_sandi

LIBRARIES = ("numpy", "scikit-learn", "pandas", "pillow", "matplotlib")


def environment(device: torch.device) -> dict[str, object]:
    """Commit, hardware and versions, ready for JSON."""
    return {
        "commit": _commit(),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processor": _processor(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {
            "openood-sandi": openood_sandi.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
    }


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
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
