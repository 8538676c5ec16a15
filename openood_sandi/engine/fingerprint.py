"""Whether tensors hold what they held before, by reading them.

Counts of writes do not tell: writes through ``.data`` or ``.numpy()``, as pruning makes them, are not counted, nor are
those into inference tensors. Norms do not tell either: a weight of 1e-9 beside others of 0.1 may become zero, and rows
may change places, without a bit of the norm changing. So the bytes are read, once, and summed in lanes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openood_sandi.engine.contents import version

__all__ = ["Fingerprint"]

_LANES = 251
"""A prime: what moves within a tensor, as a row or a channel, comes to lie in other lanes."""
_ROW = 8 * _LANES
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


class Fingerprint:
    """What tells apart the states of ``tensors``, as often as it is asked for.

    Each lane is the sum of every 251st element's bits, without loss: any single change shows.

    Args:
        tensors: they keep their memory as long as this is used.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._arrays: dict[int, tuple[NDArray[np.uint64], NDArray[np.uint8]]] = {}
        """Of the CPU's memory, by address: tensors may share it."""
        self._elsewhere: dict[torch.device, list[Tensor]] = defaultdict(list)
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                if tensor.layout != torch.strided:  # the counts alone tell of these
                    continue
                if tensor.device.type != "cpu":
                    self._elsewhere[tensor.device].append(tensor)
                    continue
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
                whole = len(memory) // _ROW * _ROW
                lanes = memory[:whole].view(np.uint64).reshape(-1, _LANES)
                self._arrays[tensor.untyped_storage().data_ptr()] = lanes, memory[whole:]

    def counts(self) -> list[int | None]:
        """How often each of the tensors was written to, as far as torch counts it."""
        with torch._C.DisableTorchFunction():
            return list(map(version, self._tensors))

    def sums(self) -> list[Tensor]:
        """The sums of lanes, and the elements that fill none: (N,) on each device that has any of the tensors."""
        found = []
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            if self._arrays:  # NumPy sums integers four times as fast as torch does on the CPU
                arrays = self._arrays.values()
                parts = [part for rows, rest in arrays for part in (np.add.reduce(rows, 0).view(np.uint8), rest)]
                found.append(torch.from_numpy(np.concatenate(parts)))
            for tensors in self._elsewhere.values():
                found.append(torch.cat([part for tensor in tensors for part in _lanes(tensor.detach())]))
        return found


def _lanes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    bits = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    bits = bits.view(_INTEGERS[bits.element_size()])
    whole = len(bits) // _LANES * _LANES
    return bits[:whole].reshape(-1, _LANES).sum(0, dtype=torch.int64), bits[whole:].to(torch.int64)
