"""Whether tensors hold what they held before, by reading them.

Counts of writes do not tell: writes through ``.data`` or ``.numpy()``, as pruning makes them, are not counted, nor are
those into inference tensors. Norms do not tell either: a weight of 1e-9 beside others of 0.1 may become zero, and rows
may change places, without a bit of the norm changing. So the bytes are read, once, and summed in lanes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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
    """A digest of what ``tensors`` hold, as often as it is asked for.

    Each lane is the sum of every 251st eight bytes, without loss: any single change shows.

    Args:
        tensors: they keep their memory as long as this is used.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._arrays: list[tuple[NDArray[np.uint64], NDArray[np.uint8]]] = []
        self._elsewhere: list[tuple[Tensor, Tensor]] = []
        self._unread: list[Tensor] = []
        seen: set[int] = set()
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                if tensor.layout != torch.strided or tensor.device.type == "meta":
                    self._unread.append(tensor)
                elif (address := tensor.untyped_storage().data_ptr()) not in seen:  # tensors may share their memory
                    seen.add(address)
                    self._add(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()))

    def _add(self, memory: Tensor) -> None:
        whole = len(memory) // _ROW * _ROW
        if memory.device.type == "cpu":
            array = memory.numpy()
            self._arrays.append((array[:whole].view(np.uint64).reshape(-1, _LANES), array[whole:]))
        else:
            self._elsewhere.append((memory[:whole].view(torch.int64).reshape(-1, _LANES), memory[whole:]))

    def __call__(self) -> tuple[bytes, list[Tensor]]:
        """What the host has read, and the sums that are on other devices, to be fetched from there."""
        digest = hashlib.blake2b(repr([version(tensor) for tensor in self._unread]).encode(), digest_size=16)
        for rows, rest in self._arrays:
            digest.update(np.add.reduce(rows, axis=0).data)
            digest.update(rest.data)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            sums = [part for rows, rest in self._elsewhere for part in (rows.sum(0), rest.clone())]
        return digest.digest(), sums
