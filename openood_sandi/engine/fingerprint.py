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


class Fingerprint:
    """What tells apart the states of ``tensors``, as often as it is asked for.

    Each lane is the sum of every 251st eight bytes, without loss: any single change shows.

    Args:
        tensors: they keep their memory as long as this is used.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._arrays: list[tuple[NDArray[np.uint64], NDArray[np.uint8]]] = []
        self._elsewhere: dict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        seen: set[int] = set()
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                if tensor.layout != torch.strided or tensor.device.type == "meta":  # counts alone tell of these
                    continue
                address = tensor.untyped_storage().data_ptr()
                if address not in seen:  # tensors may share their memory
                    seen.add(address)
                    self._add(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()))

    def _add(self, memory: Tensor) -> None:
        whole = len(memory) // _ROW * _ROW
        if memory.device.type == "cpu":
            array = memory.numpy()  # whose sums are four times as fast as torch's
            self._arrays.append((array[:whole].view(np.uint64).reshape(-1, _LANES), array[whole:]))
        else:
            rows = memory[:whole].view(torch.int64).reshape(-1, _LANES)
            self._elsewhere[memory.device].append((rows, memory[whole:]))

    def counts(self) -> list[int | None]:
        """How often each of the tensors was written to, as far as torch counts it."""
        with torch._C.DisableTorchFunction():
            return list(map(version, self._tensors))

    def sums(self) -> list[Tensor]:
        """The sums of lanes, and the bytes that fill none, as bytes (N,) on each device that has any of the tensors."""
        found = []
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            if self._arrays:
                parts = [part for rows, rest in self._arrays for part in (np.add.reduce(rows, 0).view(np.uint8), rest)]
                found.append(torch.from_numpy(np.concatenate(parts)))
            for device in self._elsewhere.values():
                found.append(
                    torch.cat([part for rows, rest in device for part in (rows.sum(0).view(torch.uint8), rest)])
                )
        return found
