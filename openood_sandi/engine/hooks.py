"""The user's hooks on the twin of a network: they see the tensors of an ordinary forward pass, or none.

A hook that returns nothing and writes into nothing only looks. It is called once a clean pass, outside of the record,
with detached tensors of the network's own shapes, and not at all in replays, whose tensors have lanes. A hook that
changes what flows on is part of the function and runs like the rest of it. Which kind a hook is shows in the first
plain pass, before anything is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from openood_sandi.engine import lanes, tape

__all__ = ["tame"]


def tame(net: nn.Module) -> None:
    """Has the forward hooks of ``net``, a twin, act as said above."""
    for module in net.modules():
        hooks: dict[int, Any]
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                hooks[key] = _TamedHook(hook)


class _TamedHook:
    """A user's hook."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook
        self._changes = False

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        running = tape.running()
        if running is None:
            before = list(_versions(given))
            result = self._hook(module, *given)
            self._changes = self._changes or result is not None or before != list(_versions(given))
            return result
        if self._changes:
            return self._hook(module, *given)
        if not running.is_replay:
            with torch._C.DisableTorchFunction():
                self._hook(module, *lanes.map_tensors(given, lambda tensor: running.current(tensor).detach()))
        return None


def _versions(given: Any) -> Iterator[int]:
    for tensor in lanes.tensors_in(given):
        yield 0 if tensor.is_inference() else tensor._version
