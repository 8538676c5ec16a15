"""What a call does, counted: operators, floating point operations, bytes alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Counts:
    """One call's."""

    launches: int
    """ATen operators that ran, in forward and backward passes, without those that only make a view."""
    flops: int
    """Floating point operations of convolutions and matrix products, by ``torch.utils.flop_counter``'s formulas."""
    peak_bytes: int
    """The most memory held at one time beyond what was held before. On CUDA what torch's allocator has given out;
    elsewhere the tensors alive, without the work space that an operator takes and returns."""


def count(call: Callable[[], object], device: torch.device) -> Counts:
    """The counts of one ``call``, which works on ``device``."""
    on_gpu, before = device.type == "cuda", 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with _Instrument() as mode:
        call()
    peak_bytes = torch.cuda.max_memory_allocated(device) - before if on_gpu else mode.peak_bytes
    return Counts(mode.launches, mode.flops, peak_bytes)


class _Instrument(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every ATen operator below autograd, those of backward passes among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.flops = self.bytes = self.peak_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._known.update(_storages((args, kwargs)))  # what comes as an argument first was there before
        result = func(*args, **kwargs)
        if not func.is_view:
            self.launches += 1
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return result

    def _free(self, size: int) -> None:
        self.bytes -= size


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
