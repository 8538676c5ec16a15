"""Memory that runs out: at a chosen allocation, or as soon as more is alive than a small device would hold."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class FailsAt(TorchDispatchMode):
    """The ``number``-th operator, from 1, of those that do not just make a view fails, if there are so many."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = number, error

    @property
    def reached(self) -> bool:
        return self.left <= 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= not func.is_view
        if self.left == 0 and not func.is_view:
            raise self.error
        return func(*args, **(kwargs or {}))


class SmallDevice(TorchDispatchMode):
    """Holds ``limit`` bytes of tensors beside those that were there before; an operator that needs more fails."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.bytes, self.peak = limit, 0, 0
        self.failures = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._known.update(_storages((args, kwargs)))
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage in self._known:
                continue
            if self.bytes + storage.nbytes() > self.limit:
                self.failures += 1
                raise torch.cuda.OutOfMemoryError(f"tried to allocate {storage.nbytes()} bytes")
            self._known.add(storage)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, size: int) -> None:
        self.bytes -= size


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    if isinstance(tree, Tensor):
        return {tree.untyped_storage()}
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return {storage for item in items for storage in _storages(item)}
