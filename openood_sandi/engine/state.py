"""The state of a network that each of its passes starts from.

A forward may leave things behind: running averages, caches, counts, tensors of its graph. Scores are those of the
network as it was found, so what a pass left is put back before the next one, whatever that was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openood_sandi.engine.contents import Contents, version
from openood_sandi.engine.devices import fetch

__all__ = ["Snapshot"]


class Snapshot:
    """What a network holds now, the values of its parameters apart, to be put back.

    Args:
        net: the network.
        contents: what it holds.
        private: whether nobody else uses the network. On others only what differs is written to.
    """

    def __init__(self, net: nn.Module, contents: Contents, private: bool = False) -> None:
        self._net, self._contents, self._private = net, contents, private
        buffers = (tensor for scripted in contents.scripted for tensor in scripted.buffers())
        kept = (tensor for tensor in contents.tensors if not isinstance(tensor, nn.Parameter))
        self._tensors = [tensor for tensor in (*kept, *buffers) if not tensor.is_inference()]
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            self._values = [tensor.detach().clone() for tensor in self._tensors]
            self._memory = [(tensor, tensor.data) for tensor in contents.tensors if not nn.parameter.is_lazy(tensor)]
            self._attached = {id(tensor) for tensor in self._tensors if tensor.requires_grad}
        self._versions = self._counted()

    def take(self) -> None:
        """Has passes start from what the tensors hold now."""
        self._copy(self._values, self._tensors)
        self._versions = self._counted()

    def restore(self, values: bool = True) -> None:
        """Puts back what was replaced, and with ``values`` what was written into tensors."""
        if not self._contents.unchanged():
            self._contents.restore()
        if not self._contents.unchanged():  # tensor.data = ... moves a tensor to other memory
            with torch._C.DisableTorchFunction():
                for tensor, data in self._memory:
                    tensor.data = data
        with torch._C.DisableTorchFunction():
            for tensor in self._tensors:
                if tensor.requires_grad and id(tensor) not in self._attached:  # tied to a pass's graph, in place
                    tensor.detach_()
        if values:
            self._copy(self._tensors, self._values)
            self._versions = self._counted()

    def written(self, uncounted: bool = False) -> str:
        """What was written into a tensor since values were last taken or restored, in words; "" for nothing.

        A record of a pass cannot be replayed then: what it shows of that tensor is no longer what it was.

        Args:
            uncounted: whether to look at the values as well. torch counts writes, but those through ``.data`` and
                ``.numpy()``.
        """
        changed = [old != new for old, new in zip(self._versions, self._counted(), strict=True)]
        if uncounted:
            changed = [a or b for a, b in zip(changed, _differ(self._tensors, self._values), strict=True)]
        for tensor, is_changed in zip(self._tensors, changed, strict=True):
            if is_changed:
                return f"its forward writes into {self._name(tensor)} in place"
        return ""

    def _name(self, tensor: Tensor) -> str:
        for name, module in self._net.named_modules():
            for key, held in (*module._buffers.items(), *vars(module).items()):
                if held is tensor:
                    return repr(f"{name}.{key}".lstrip("."))
        return f"a tensor of shape {tuple(tensor.shape)} that it keeps"

    def _counted(self) -> list[int | None]:
        with torch._C.DisableTorchFunction():
            return list(map(version, self._tensors))

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if not self._private:
                differing = [n for n, differs in enumerate(_differ(targets, sources)) if differs]
                targets, sources = [targets[n] for n in differing], [sources[n] for n in differing]
            if targets:
                torch._foreach_copy_(targets, sources)


def _differ(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    """For each tensor whether the other one holds something else; NaN is the same as NaN."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        pairs = zip(map(_numbers, first), map(_numbers, second), strict=True)
        return [bool(flag) for flag in fetch(*(((a != b) & ((a == a) | (b == b))).any() for a, b in pairs))]


def _numbers(tensor: Tensor) -> Tensor:
    """The elements of a tensor, of a sparse one those that it holds."""
    return tensor if tensor.layout == torch.strided else tensor._values() if tensor.is_sparse else tensor.values()
