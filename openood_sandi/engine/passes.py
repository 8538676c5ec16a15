"""One recorded pass of a network: its torch calls, its module calls, and what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi.engine import lanes
from openood_sandi.engine.checks import called_modules
from openood_sandi.engine.recorded import Call, Site
from openood_sandi.engine.tape import Tape
from openood_sandi.engine.threads import in_this_thread

__all__ = ["Layer", "Pass", "first_tensor", "record_pass"]


@dataclass(frozen=True)
class Layer:
    """One call of one module in a recorded pass."""

    name: str
    index: int
    module: nn.Module
    given: object
    """Its first argument, None where it had none."""
    output: object
    start: int
    stop: int
    """The torch calls ``start`` to ``stop - 1`` of the tape happened inside."""

    @property
    def site(self) -> Site:
        return Site(self.name if self.index == 1 else f"{self.name}#{self.index}", self.name, self.index)


@dataclass(frozen=True)
class Pass:
    """A recorded pass over ``x`` (B, C, H, W)."""

    x: Tensor
    calls: Sequence[Call]
    call_names: tuple[str, ...]
    layers: Sequence[Layer]
    output: Tensor

    @cached_property
    def made_by(self) -> dict[int, int]:
        """{id of a tensor: position of the first call whose result it is, or is part of}."""
        made: dict[int, int] = {}
        for position, call in enumerate(self.calls):
            for tensor in lanes.tensors_in(call.result):
                made.setdefault(id(tensor), position)
        return made

    def at(self, site: Site) -> tuple[object, object]:
        """What the module at ``site`` was given and what it returned; without one, None and the call's result."""
        if site.module is None:
            return None, self.calls[site.index].result
        return next((layer.given, layer.output) for layer in self.layers if layer.site == site)

    def calls_of(self, module: str) -> int:
        """How often the module of that name was called."""
        return sum(layer.name == module for layer in self.layers)

    def depends_on_images(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` was computed from the images; taken for granted where torch's calls do not show it."""
        position = self.made_by.get(id(tensor))
        return position is None or bool(self.calls[position].producers)


def first_tensor(result: Any) -> Tensor | None:
    """The tensor that a call returned, or the first of several."""
    return next(iter(lanes.tensors_in(result)), None)


def record_pass(net: nn.Module, x: Tensor) -> Pass:
    """Runs ``net`` once on ``x`` (B, C, H, W) and returns what it did."""
    tape = Tape(net)
    layers: list[Layer] = []
    visits: Counter[str] = Counter()
    starts: list[tuple[int, object]] = []

    def enter(module: nn.Module, given: tuple[object, ...], named: dict[str, object]) -> None:
        first = next(iter((*given, *named.values())), None)
        starts.append((len(tape.calls), tape.current(first) if isinstance(first, Tensor) else first))

    def leave_as(name: str) -> Callable[[nn.Module, object, object], None]:
        def leave(module: nn.Module, given: object, output: object) -> None:
            visits[name] += 1
            start, first = starts.pop()
            output = tape.current(output) if isinstance(output, Tensor) else output
            layers.append(Layer(name, visits[name], module, first, output, start, len(tape.calls)))

        return leave

    handles = []
    try:
        for name, module in called_modules(net):
            handles.append(module.register_forward_pre_hook(in_this_thread(enter), with_kwargs=True))
            handles.append(module.register_forward_hook(in_this_thread(leave_as(name))))
        with torch.no_grad():
            output = tape.record(x)
    finally:
        for handle in handles:
            handle.remove()
    return Pass(x, tape.calls, tape.call_names, layers, output)
