"""Whether tensors hold what they held before, by reading them.

Counts of writes do not tell: writes through ``.data`` or ``.numpy()``, as pruning makes them, are not counted, nor are
those into inference tensors. Norms do not tell either: a weight of 1e-9 beside others of 0.1 may become zero, and rows
may change places, without a bit of the norm changing. So the bytes are read, once, and summed in lanes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
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
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


class Fingerprint:
    """What tells apart the states of ``tensors``, as often as it is asked for.

    Each lane is the sum of every 251st element's bits, without loss: any single change shows.

    Args:
        tensors: they keep their memory as long as this is used.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._arrays: dict[int, tuple[NDArray[np.uint64], NDArray[np.uint8]]] = {}
        """Of the CPU's memory, by address: tensors may share it."""
        self._elsewhere: dict[torch.device, list[Tensor]] = defaultdict(list)
        self._unread: list[Tensor] = []
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                if tensor.layout != torch.strided:
                    self._unread.append(tensor)
                elif tensor.device.type != "cpu":
                    self._elsewhere[tensor.device].append(tensor)
                else:
                    self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        whole = len(memory) // _ROW * _ROW
        self._arrays[storage.data_ptr()] = memory[:whole].view(np.uint64).reshape(-1, _LANES), memory[whole:]

    def __call__(self) -> tuple[bytes, list[Tensor]]:
        """What the host has read, and the sums that are on other devices, one tensor each, to be fetched from there."""
        digest = hashlib.blake2b(repr([version(tensor) for tensor in self._unread]).encode(), digest_size=16)
        for rows, rest in self._arrays.values():
            digest.update(np.add.reduce(rows, axis=0).data)
            digest.update(rest.data)
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            devices = self._elsewhere.values()
            sums = [torch.cat([part for tensor in device for part in _lanes(tensor.detach())]) for device in devices]
        return digest.digest(), sums


def _lanes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of lanes, and the elements that fill none, (N,) int64 each."""
    bits = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    bits = bits.view(_INTEGERS[bits.element_size()])
    whole = len(bits) // _LANES * _LANES
    return bits[:whole].reshape(-1, _LANES).sum(0, dtype=torch.int64), bits[whole:].to(torch.int64)
