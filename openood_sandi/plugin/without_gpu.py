"""OpenOOD on a machine without a GPU.

OpenOOD calls ``.cuda()`` on networks and batches whether there is a GPU or not, and loads checkpoints that
were saved on one. Where torch sees none, these calls, when they come from OpenOOD's own files, leave
everything on the CPU. With a GPU nothing is changed, and code that is not OpenOOD's never notices.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any


@functools.cache
def stay_on_cpu_without_gpu() -> None:
    """Make OpenOOD's ``.cuda()`` and ``torch.load`` stay on the CPU if there is no GPU; once a process."""
    import torch

    if torch.cuda.device_count():  # unlike is_available, starts nothing that a later fork would trip over
        return
    print("openood-sandi: torch sees no GPU, so OpenOOD runs on the CPU", file=sys.stderr)
    for owner in (torch.Tensor, torch.nn.Module):
        _keep_in_place(owner)
    load = torch.load

    @functools.wraps(load)
    def load_to_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if map_location is None and called_by_openood():
            map_location = "cpu"
        return load(f, map_location, *args, **kwargs)

    torch.load = load_to_cpu


def _keep_in_place(owner: Any) -> None:
    move = owner.cuda

    @functools.wraps(move)
    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self if called_by_openood() else move(self, *args, **kwargs)

    owner.cuda = cuda


def called_by_openood() -> bool:
    """Whether the caller of the function that asks is in a file of OpenOOD's."""
    return is_openood(sys._getframe(2).f_globals.get("__file__") or "")


@functools.cache
def is_openood(file: str) -> bool:
    """Whether ``file`` belongs to OpenOOD: its package, or the scripts beside it."""
    package = os.path.dirname(os.path.realpath(sys.modules["openood"].__file__ or ""))
    scripts = os.path.join(os.path.dirname(package), "scripts")
    return os.path.realpath(file).startswith((package + os.sep, scripts + os.sep))
