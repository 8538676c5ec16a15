"""Objects that are copied as one piece, and whether they are still what they were when they were copied.

NumPy arrays, configurations with slots, namespaces and whatever else has its own way of being copied are not looked
into, and may be changed in place. What a pickle says of them tells; what cannot be pickled is taken to be constant.
"""

from __future__ import annotations

import enum
import io
import pickle
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_opaque", "states"]

_CONSTANT = (
    *(nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, enum.Enum),
    *(int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout, range, slice),
    *(torch.jit.ScriptFunction, torch.utils.hooks.RemovableHandle, weakref.ref, type(None), type(Ellipsis)),
)


def is_opaque(thing: object) -> bool:
    """Whether ``thing``, which is copied as one piece, can change in place."""
    return not isinstance(thing, _CONSTANT)


def states(things: Sequence[object]) -> list[bytes | None]:
    """What tells each of the ``things`` from itself after a change; None for what cannot be pickled."""
    return list(map(_state, things))


class _Pickler(pickle.Pickler):
    """Writes down which tensors and modules an object refers to, and nothing of them but tensors' counts of writes."""

    def persistent_id(self, thing: Any) -> object:
        if isinstance(thing, Tensor):
            return id(thing), 0 if thing.is_inference() else thing._version
        return id(thing) if isinstance(thing, (nn.Module, types.FunctionType)) else None


def _state(thing: object) -> bytes | None:
    written = io.BytesIO()
    try:
        with torch._C.DisableTorchFunction():
            _Pickler(written).dump(thing)
    except Exception:  # whatever an object's own way of being pickled raises
        return None
    return written.getvalue()
