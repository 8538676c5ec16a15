"""The user's hooks on the twin of a network: they see the tensors of an ordinary forward pass, or none.

A hook that returns nothing and writes into nothing only looks. It is called once a clean pass, outside of the record,
with detached tensors of the network's own shapes, and not at all in replays, whose tensors have lanes. A hook that
changes what flows on is part of the function and runs like the rest of it. Which kind a hook is shows in the first
plain pass, before anything is recorded; one that changes something in a later batch alone is an error of that record.

A backward hook is part of the gradient. One of a module whose inputs need no gradient is not called: the twin's
parameters are frozen, so there is none to change, and the hook of a network in training has never met None instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from openood_sandi.engine import lanes, tape
from openood_sandi.engine.errors import ReplayError

__all__ = ["tame"]


def tame(net: nn.Module) -> None:
    """Has the hooks of ``net``, a twin, act as said above."""
    for module in net.modules():
        hooks: dict[int, Any]
        if module._is_full_backward_hook:
            for key, hook in list(module._backward_hooks.items()):
                module._backward_hooks[key] = _BackwardHook(hook)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                hooks[key] = _TamedHook(hook)


class _TamedHook:
    """A user's hook."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook
        self._seen = _Seen()

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        running = tape.running()
        if running is None:
            return self._observed(module, given)
        if self._seen.to_change:
            return self._hook(module, *given)
        if not running.is_replay:
            with torch._C.DisableTorchFunction():
                self._observed(module, lanes.map_tensors(given, lambda tensor: running.current(tensor).detach()))
            if self._seen.to_change:
                raise ReplayError(
                    f"a hook on a {type(module).__name__} changes what flows on in this batch, and did not in the first"
                )
        return None

    def _observed(self, module: nn.Module, given: Any) -> Any:
        """What the hook returns, after a look at whether it changes anything."""
        before = list(_versions(given))
        result = self._hook(module, *given)
        if result is not None or before != list(_versions(given)):
            self._seen.to_change = True
        return result


class _BackwardHook:
    """A user's full backward hook."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return None if all(gradient is None for gradient in inputs) else self._hook(module, inputs, outputs)


class _Seen:
    """What a hook was seen to do. In a slot, for attributes are put back after each batch."""

    __slots__ = ("to_change",)

    def __init__(self) -> None:
        self.to_change = False

    def __reduce__(self) -> tuple[type[_Seen], tuple[()]]:
        return _Seen, ()  # what was seen is no change of the network


def _versions(given: Any) -> Iterator[int]:
    for tensor in lanes.tensors_in(given):
        yield 0 if tensor.is_inference() else tensor._version
