"""Record a network's forward pass once, then replay what lies behind many splits at once.

``record`` runs the network under a :class:`torch.overrides.TorchFunctionMode` that keeps every call's result on a tape.
``replay`` runs the same Python again: a call that sees no perturbed tensor returns its recorded result, so the
prefix of a split and the residual branches that left before it cost nothing and keep their clean value; a call that
sees perturbed tensors runs for all their copies at once (:mod:`.lanes`). Nothing is traced or compiled:
control flow, reused modules and functional calls are whatever the network's own code does.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openood_sandi.engine import calls, inplace, lanes, values, writes
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import is_out_of_memory
from openood_sandi.engine.no_grad import Regions
from openood_sandi.engine.recorded import Call, Produced, Site, name_of
from openood_sandi.engine.single_image import with_right_gradient
from openood_sandi.engine.state import Snapshot
from openood_sandi.engine.threads import in_this_thread

__all__ = ["Tap", "Tape", "keep", "running"]


Tap = Callable[[Site, Tensor], Tensor]
"""Called with each site and its tensor as the pass gets there; what it returns flows on instead."""

Listener = Callable[[int, str, Any], None]
"""Called with the position, the name and the result of each call as it is made."""


def keep(site: Site, tensor: Tensor) -> Tensor:
    """A tap that changes nothing."""
    return tensor


_now = threading.local()


def running() -> Tape | None:
    """The tape whose pass is on in this thread."""
    return getattr(_now, "tape", None)


class Tape(TorchFunctionMode):
    """The recorded forward pass of ``net``, with ``sites`` to tap.

    Args:
        net: a network in eval mode. It is only ever called; hooks are set for the length of a pass.
        sites: the places where the ``tap`` of a pass is called.
        state: the state of ``net`` that every pass is to start from; None where it is of no account.
    """

    def __init__(self, net: nn.Module, sites: Iterable[Site] = (), state: Snapshot | None = None) -> None:
        super().__init__()
        self.net = net
        self._state = state
        self.calls: list[Call] = []
        self.saw_all = True
        """Whether every tensor with a gradient that the last recording used came from a call that it saw."""
        self.reached: dict[Site, int] = {}
        """Tape position at which each site was reached in the last recording: calls from there on are its suffix."""
        self.sites = tuple(sites)
        self._at_module = {(site.module, site.index): site for site in self.sites if site.module is not None}
        self._at_call = {site.index: site for site in self.sites if site.module is None}
        self._hooked = {name: net.get_submodule(name) for name, _ in self._at_module}
        self._tap: Tap = keep
        self._listen: Listener | None = None
        self._heard: Listener | None = None
        self._changed = False
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._recording = False
        self._position = 0
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self._origin: dict[int, tuple[Tensor, int]] = {}
        """Tensors computed from the input and where; the tensor itself keeps its id from being reused."""
        self._overwritten = inplace.Overwritten()
        self._regions = Regions()

    def record(self, x: Tensor, tap: Tap = keep) -> Tensor:
        """Runs the network on ``x`` (B, C, H, W), keeps every result, and returns the network's output."""
        self.calls, self.reached, self._sizes, self._recording, self.saw_all = [], {}, [], True, True
        self._overwritten = inplace.Overwritten()
        self._origin[id(x)] = (x, -1)
        if self._state is not None:
            self._state.restore()
        try:
            output = self._run(x, tap)
            self._look_at(output)
            return output
        finally:
            self._recording = False
            self._origin.clear()
            self._overwritten = inplace.Overwritten()

    def watch(self, x: Tensor, tap: Tap, listen: Listener) -> Tensor:
        """Runs the network on ``x`` as it is, shows every result to ``listen`` and keeps none: there is no replay.

        Calls in place are left to happen, except to what has a gradient from ``tap``.
        """
        self._listen = listen
        if self._state is not None:
            self._state.restore()
        try:
            return self._run(x.clone(), tap)
        finally:
            self._listen = None

    def release_graph(self) -> None:
        """Detaches the recorded results, so that the autograd graph of the recording can be freed."""
        detached: dict[int, tuple[Tensor, Tensor]] = {}  # one object stays one object: in-place aliasing relies on it

        def detach(tensor: Tensor) -> Tensor:
            # results inside torch.func.vmap or grad are no tensors outside; a network of these has whole passes
            if not tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return tensor
            return detached.setdefault(id(tensor), (tensor, tensor.detach()))[1]

        self.calls = [replace(call, result=lanes.map_tensors(call.result, detach)) for call in self.calls]

    def replay(self, x: Tensor, tap: Tap, heard: Listener | None = None) -> Tensor:
        """Runs the recorded pass on the same ``x`` again, with the lanes that ``tap`` joins to the sites it chooses.

        Every result is shown to ``heard``.

        Raises:
            ReplayError: the pass cannot be repeated; or the recorded one wrote into tensors that the network holds, and
                that its record shows.
        """
        if self._state is not None:
            # values stay as the recorded pass left them: a call in place that is not made again gave them
            if written := self._state.written():
                raise ReplayError(written)
            self._state.restore(values=False)
        self._heard = heard
        try:
            return self._run(x, tap)
        except Exception as error:  # of code that torch's function mode does not see, as TorchScript's
            if isinstance(error, ReplayError) or is_out_of_memory(error):
                raise
            last = str(error).strip().rpartition("\n")[2]
            raise ReplayError(f"it cannot run on several perturbed copies at once ({last})") from error
        finally:
            self._heard = None

    @property
    def is_replay(self) -> bool:
        """Whether the pass that is on repeats a recorded one."""
        return not self._recording and self._listen is None

    @property
    def call_names(self) -> tuple[str, ...]:
        """The calls of the last pass by name: equal for two passes that took the same way through the network."""
        return tuple(self._names)

    def suffix_bytes(self, site: Site) -> int:
        """Size of all results that lie behind ``site``: what one more lane of it adds to a replay's forward pass."""
        if not self._sizes:
            self._sizes = list(itertools.accumulate(call.size() for call in reversed(self.calls)))
        return self._sizes[len(self.calls) - 1 - min(self.reached[site], len(self.calls) - 1)]

    def _run(self, x: Tensor, tap: Tap) -> Tensor:
        self._tap = tap
        self._names, self._position, self._changed = [], 0, False
        self._regions = Regions()
        visits: Counter[str] = Counter()

        def hook_for(name: str) -> Callable[[nn.Module, Any, Any], Any]:
            def fire(module: nn.Module, args: Any, output: Any) -> Any:
                visits[name] += 1
                site = self._at_module.get((name, visits[name]))
                if site is None:
                    return None
                with torch._C.DisableTorchFunction():  # what the tap computes is not the network's
                    return self._visit(site, output)

            return in_this_thread(fire)  # a network without a twin may be somebody else's as well

        handles = []
        try:
            for name, module in self._hooked.items():
                handles.append(module.register_forward_hook(hook_for(name)))
            _now.tape = self
            with torch.set_grad_enabled(torch.is_grad_enabled()), self:  # the network may leave it otherwise
                output = self.net(x)
            if not isinstance(output, Tensor):
                return output  # type: ignore[no-any-return]
            output = self.current(output)
            return lanes.as_batch(output) if len(x) == 1 else output
        finally:
            _now.tape = None
            for handle in handles:
                handle.remove()
            self._replaced.clear()
            self._regions = Regions()
            self._tap = keep

    def _visit(self, site: Site, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ReplayError(
                f"split point {site.name!r} returns {type(output).__name__}, not a tensor; "
                f"name a submodule of it that returns one tensor"
            )
        tensor = self.current(output)
        with torch.set_grad_enabled(self._regions.inside or torch.is_grad_enabled()):
            tapped = self._tap(site, tensor)
        self._regions.visit(site.name, tensor, tapped)
        self._changed = self._changed or tapped is not tensor
        if self._recording:
            self._look_at(tensor)
            self.reached[site] = self._position
            self._origin[id(tapped)] = (tapped, self._origin.get(id(tensor), (tensor, -1))[1])
        return tapped

    def current(self, tensor: Tensor) -> Tensor:
        """What ``tensor`` holds now: in-place calls leave it alone and are remembered here instead."""
        while id(tensor) in self._replaced:
            tensor = self._replaced[id(tensor)][1]
        return tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return self._regions.switch(*args)
        if torch.is_inference_mode_enabled():
            raise ReplayError(
                f"the network computes under torch.inference_mode() ({name_of(func)!r}), where there are no gradients; "
                "remove it from the network's forward, or use torch.no_grad() where only parameters are to be frozen"
            )
        if not self._regions.inside:
            return self._call(func, args, kwargs or {})
        with torch.enable_grad():
            return self._call(func, args, kwargs or {})

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._replaced:
            args, kwargs = lanes.map_tensors((args, kwargs), self.current)
        self._names.append(_name_out_of_place(func))
        followed = self._recording or self._changed or self._regions.matter
        operands = lanes.tensors_in((args, kwargs)) if followed else []
        target = None
        if self._is_derived(operands):
            func, args, kwargs, target = inplace.out_of_place(func, args, kwargs)
        if self._regions.inside:
            args, kwargs = self._regions.entering(name_of(func), target, (args, kwargs))
        if self._listen is not None:
            result = func(*args, **kwargs)
            self._listen(self._position, self._names[-1], result)
        elif self._recording:
            result = self._record_call(func, args, kwargs, operands)
        else:
            result = self._replay_call(func, args, kwargs)
            if self._heard is not None:
                self._heard(self._position, self._names[-1], result)
        if self._regions.matter:
            self._regions.follow(name_of(func), operands, result)
        site = self._at_call.get(self._position)
        self._position += 1
        if site is not None:
            result = self._visit(site, result)
        if target is not None and isinstance(result, Tensor) and result is not target:
            self._replaced[id(target)] = (target, result)
            if self._recording:
                self._overwritten.note(target, result)
        return result

    def _look_at(self, *tensors: Any) -> None:
        """Takes note of a tensor that hidden code computed from a split. Leaves are parameters."""
        with torch._C.DisableTorchFunction():
            unknown = (t for t in tensors if isinstance(t, Tensor) and id(t) not in self._origin)
            self.saw_all = self.saw_all and all(tensor.grad_fn is None for tensor in unknown)

    def _is_derived(self, operands: list[Tensor]) -> bool:
        """Whether a call depends on the input, or, in a pass that is watched, on what a tap put into it."""
        if self._listen is not None:
            return self._changed and any(tensor.requires_grad for tensor in operands)
        if self._recording:
            return any(id(tensor) in self._origin for tensor in operands)
        return self._position >= len(self.calls) or bool(self.calls[self._position].producers)

    def _record_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        self._overwritten.require_unread(func, args, tensors)
        self._look_at(*tensors)
        producers: list[int] = []

        def taken(tensor: Tensor) -> Tensor | Produced:
            if id(tensor) not in self._origin:
                return tensor
            producers.append(self._origin[id(tensor)][1])
            return Produced(producers[-1])

        symbolic_args, symbolic_kwargs = lanes.map_tensors((args, kwargs), taken)
        result = func(*args, **kwargs)
        if name_of(func) == "batch_norm":
            with_right_gradient(result)
        position = len(self.calls)
        if producers:
            lanes.map_tensors(result, lambda t: self._origin.setdefault(id(t), (t, position)))
        self.calls.append(Call(func, symbolic_args, symbolic_kwargs, result, tuple(producers)))
        return result

    def _replay_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorded = self.calls[self._position] if self._position < len(self.calls) else None
        if recorded is None or (recorded.func is not func and recorded.name != name_of(func)):
            expected = "the end" if recorded is None else repr(recorded.name)
            raise ReplayError(
                f"call {self._position} of the forward pass was {name_of(func)!r} but {expected} when recorded: the "
                f"network's control flow changes from one pass to the next, so its layers cannot be split"
            )
        perturbed = lanes.find((args, kwargs))
        if not perturbed:
            return recorded.result
        if lanes.tensors_in(recorded.result):
            if func is writes.set_item:
                args = (lanes.spread(args[0], perturbed), *args[1:])
            return self._call_lanes(func, args, kwargs, recorded.result)
        if not values.tells_of_form(name_of(func)):
            values.require_recorded(name_of(func), func, args, kwargs, recorded.result)
        return recorded.result

    def _call_lanes(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], clean: Any) -> Any:
        try:
            return calls.call(func, args, kwargs, clean)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ReplayError(
                f"call {self._position} of the forward pass, {name_of(func)!r}, cannot run on several perturbed copies "
                f"at once ({error}); choose split points behind it, or write it with a result of one shape for them all"
            ) from error


@functools.lru_cache(maxsize=4096)
def _name_out_of_place(func: Callable[..., Any]) -> str:
    return inplace.name_out_of_place(name_of(func))
