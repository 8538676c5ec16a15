"""A device that is not the CPU, made of the CPU: what a GPU refuses is refused, and where the host waits is noted.

A tensor "on the device" wraps one of the CPU and says that it is on ``meta``, the one kind of device besides the CPU
that torch can differentiate without a driver for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from openood_sandi.engine import devices

DEVICE = torch.device("meta")
aten = torch.ops.aten

#: Operators whose result has a shape that depends on values. Those that give the host a value show in the result.
_TOLD = {
    *(aten.nonzero, aten.argwhere, aten.masked_select, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
}
_OF_FORM = {aten.is_same_size, aten.sym_numel, aten.sym_storage_offset}
#: Operators with places that may be a mask.
_PLACES = {aten.index: 1, aten.index_put: 1, aten.index_put_: 1, aten._index_put_impl_: 1}
_TRANSFERS = {aten._to_copy, aten.to, aten.copy_, aten._foreach_copy_}


class OnDevice(Tensor):
    """A tensor on the device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        form = {"dtype": inner.dtype, "layout": inner.layout, "device": DEVICE}
        strides = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **strides, **form)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return ForeignDevice().__torch_dispatch__(func, types, args, kwargs)  # nobody counts here

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu() first")


class ForeignDevice(TorchDispatchMode):
    """Runs operators on tensors of the device.

    Args:
        float64: whether it has that.

    Attributes:
        waits: the operators at which the host waited for the device, in order.

    Raises:
        RuntimeError: operands lie on both devices, other than numbers; places are a list.
        TypeError: float64 is asked for where there is none.
    """

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self.float64, self.waits = float64, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [isinstance(operand, OnDevice) for operand in operands]
        if any(operand.device == DEVICE and not isinstance(operand, OnDevice) for operand in operands):
            raise RuntimeError(f"{func} is given places as a list, which has to be taken to the device first")
        target = _kind(kwargs, args if packet is not aten.copy_ else ()) or ("meta" if any(there) else "cpu")
        if not any(there) and target == "cpu":
            return func(*args, **kwargs)
        self._note(func, args, kwargs, operands, target)
        bare_args, bare_kwargs = tree_map(_bare, (args, kwargs))
        result = func(*bare_args, **bare_kwargs)
        if isinstance(result, (bool, int, float)) and packet not in _OF_FORM:
            self.waits.append(str(func))
        if packet is aten.copy_ and not isinstance(args[0], OnDevice):
            return args[0]
        if target == "cpu":
            return result
        result = tree_map(self._wrapped, result)
        if packet is aten.to:  # whole, as under inference mode: it may be a view, or none
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _note(self, func: Any, args: Any, kwargs: Any, operands: list[Tensor], target: str) -> None:
        """Refuses mixed operands, and notes a wait."""
        packet = func.overloadpacket
        places = _PLACES.get(packet)
        if packet in _TRANSFERS:
            crosses = len({isinstance(operand, OnDevice) for operand in operands} | {target == "meta"}) > 1
            to_device = target == "meta" if packet is not aten.copy_ else isinstance(args[0], OnDevice)
            sent_ahead = to_device and (kwargs.get("non_blocking") or args[2:3] == (True,))
            if crosses and not sent_ahead:
                self.waits.append(str(func))
            return
        checked = operands
        if places is not None:
            indices = [index for index in args[places] if index is not None]
            # the value of a write may be a number of the CPU; places are taken to the device, and masks counted there
            if any(not isinstance(index, OnDevice) or index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.waits.append(f"{func} at {'a mask' if isinstance(indices[0], OnDevice) else 'places of the host'}")
            checked = [operand for operand in operands if all(operand is not index for index in indices)]
        if any(not isinstance(operand, OnDevice) and operand.dim() > 0 for operand in checked):
            where = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in checked)
            raise RuntimeError(f"expected all tensors to be on the same device, but {func} was given {where}")
        if packet in _TOLD or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
            self.waits.append(str(func))

    def _wrapped(self, result: Any) -> Any:
        if not isinstance(result, Tensor) or isinstance(result, OnDevice):
            return result
        if result.dtype == torch.float64 and not self.float64:
            raise TypeError("cannot convert a tensor to float64, which this device does not support")
        return OnDevice(result)


def _bare(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _kind(kwargs: dict[str, Any], args: Any) -> str | None:
    """The kind of device that an operator is asked to give its result on, if it is."""
    asked = [kwargs.get("device"), *(arg for arg in args if isinstance(arg, torch.device))]
    return next((torch.device(device).type for device in asked if device is not None), None)


def moved(net: nn.Module) -> nn.Module:
    """A copy of ``net`` on the device."""
    net = copy.deepcopy(net)
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = nn.Parameter(OnDevice(parameter.detach()), requires_grad=parameter.requires_grad)
                module._parameters[name] = there
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return net


@contextmanager
def foreign_device(float64: bool = True) -> Iterator[ForeignDevice]:
    """The device, for a while; ``openood_sandi`` has not met it before."""
    devices.has_float64.cache_clear()
    try:
        with ForeignDevice(float64) as device:
            yield device
    finally:
        devices.has_float64.cache_clear()
