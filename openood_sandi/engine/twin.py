"""A private twin of a network, so that scoring never touches the caller's.

The twin is a copy of the module tree whose parameters are aliases of the caller's storage: updates of weights in place
show through, and nothing requires gradients. Buffers and tensors kept as attributes are copies, refreshed from the
caller's before each batch; hooks and attributes are its own. What its forward writes is undone after the batch.

The user's forward hooks are part of the function that the network computes, so the twin has them (:mod:`.hooks`): plain
functions are the same objects, callable objects and bound methods are copied with the network.

A network that has no twin (something in it cannot be copied, or a function in it holds on to the original) is run
itself, one batch at a time, and left as it was found.
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi.engine.contents import Contents, Mirror, version
from openood_sandi.engine.fingerprint import Fingerprint
from openood_sandi.engine.hooks import tame
from openood_sandi.engine.memory import is_out_of_memory
from openood_sandi.engine.state import Snapshot
from openood_sandi.engine.threads import in_this_thread
from openood_sandi.engine.wrappers import innermost

__all__ = ["Twin"]

_log = logging.getLogger(__name__)

_ATTEMPTS = 5
"""To copy a network while another thread's forward passes replace what it holds."""

_turns: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_taking_turns = threading.Lock()


class Twin:
    """The twin of ``net``, made on first use and kept up to date with it.

    Args:
        net: the caller's network. It is read, and written to only where it is ``shared``.
        logits: what the twin returns, of what ``net`` returns; None for the same.
    """

    def __init__(self, net: nn.Module, logits: Callable[[Any], Any] | None = None) -> None:
        self.net, self.logits = net, logits
        self._lock = threading.RLock()
        self._original: Contents | None = None
        self._copied: _Copied | None = None
        self._why = ""
        self._warned = False
        self._state: Snapshot | None = None
        self._fingerprint: Fingerprint | None = None

    def __reduce__(self) -> tuple[type[Twin], tuple[nn.Module, Callable[[Any], Any] | None]]:
        return Twin, (self.net, self.logits)  # locks do not travel, and the copy of a detector makes its own twin

    @property
    def turn(self) -> AbstractContextManager[bool]:
        """For work on several batches by one thread at a time."""
        return self._lock

    @property
    def shared(self) -> bool:
        """Whether the original has to be run, for want of a twin."""
        return bool(self.why_shared)

    @property
    def why_shared(self) -> str:
        """What keeps the network from having a twin; "" where it has one."""
        with self._lock:
            self._update()
            return self._why

    @property
    def fingerprint(self) -> Fingerprint:
        """Of every tensor that the original holds: parameters, buffers, and those kept as attributes."""
        with self._lock:
            self._update()
            if self._fingerprint is None:
                assert self._original is not None
                self._fingerprint = Fingerprint(self._original.tensors)
            return self._fingerprint

    def current(self) -> nn.Module:
        """The twin as the original is now, or the original where it is ``shared``.

        It is made anew where a parameter, buffer, hook, flag, submodule, attribute or class was replaced.

        Raises:
            ValueError: a layer of the network is lazy and has not been run yet.
        """
        with self._lock:
            self._update()
            if self._copied is None:
                return self.net
            self._copied.mirror.refresh()
            self._copied.state.take()
            return self._copied.net

    @property
    def state(self) -> Snapshot:
        """The state that every pass over the network in :meth:`use` is to start from."""
        assert self._state is not None, "there is one in use() alone"
        return self._state

    @contextmanager
    def use(self) -> Iterator[nn.Module]:
        """The network to run for a batch: the twin, or the original with its state put back afterwards.

        Threads that use one twin, or one network that is ``shared``, take turns. Where it is shared, parameters keep
        their flags (ask for gradients by ``torch.autograd.grad``, which leaves ``.grad`` alone), and hooks for a pass
        must be :func:`~.threads.in_this_thread`.

        Raises:
            ValueError: the network has no twin and cannot be run itself; the message says why and what to do.
        """
        with self._lock:
            module = self.current()
            if self._copied is None:
                with _turn(self.net, self._why, self.logits) as self._state:
                    yield module
                return
            self._state = self._copied.state
            parameters = self._copied.parameters
            before = _versions(parameters)
            try:
                yield module
            finally:
                self._clean_up(self._copied)
            if before != _versions(parameters) and not self._warned:
                self._warned = True
                _log.warning("the network's weights were updated while it scored a batch: the scores mix old and new")

    def _update(self) -> None:
        """Makes the twin anew if there is none, or the original is another than it was made from."""
        if self._original is not None and self._original.unchanged_inside():
            return
        for _ in range(_ATTEMPTS):
            self._original = self._copied = self._fingerprint = None
            original = Contents(self.net)
            if original.lazy is not None:
                raise ValueError(
                    f"layer {original.lazy!r} is lazy and its weights are not made yet; run the network on an image, "
                    "or load its weights, before it scores"
                )
            self._why = original.bound and f"{original.bound} holds on to the network itself"
            if not self._why:
                try:
                    self._copied = _Copied(self.net, original, self.logits)
                except Exception as error:  # whatever an object's own way of being copied raises
                    if is_out_of_memory(error):
                        raise
                    self._why = f"it cannot be copied ({type(error).__name__}: {error})"
            self._original = original
            if original.unchanged():
                break
        if self._why:
            _log.info("the network itself is run, one batch at a time, for want of a copy: %s", self._why)

    def _clean_up(self, copied: _Copied) -> None:
        """Undoes what the batch's passes left on the twin; tensors are refreshed before the next."""
        copied.state.restore(values=False)
        if not copied.contents.unchanged_inside():  # what cannot be put back
            self._original = self._copied = None


class _Copied:
    """A copy of ``net`` that returns ``logits``, made from what it holds."""

    def __init__(self, net: nn.Module, original: Contents, logits: Callable[[Any], Any] | None) -> None:
        self.parameters = [tensor for tensor in original.tensors if isinstance(tensor, nn.Parameter)]
        others = [tensor for tensor in original.tensors if not isinstance(tensor, nn.Parameter)]
        memo: dict[int, Any] = {id(thing): thing for thing in original.shareable}
        with torch.inference_mode(False), torch.no_grad():
            memo |= {id(parameter): _alias(parameter) for parameter in self.parameters}
            pairs = [(tensor, tensor.detach().clone()) for tensor in others]
            memo |= {id(tensor): copied for tensor, copied in pairs}
            for wrapper in original.wrappers:
                memo[id(wrapper)] = copy.deepcopy(innermost(wrapper), memo)
            self.net: nn.Module = copy.deepcopy(net, memo)
        for scripted in original.scripted:
            pairs += _scripted_pairs(scripted, memo[id(scripted)])
        for module in self.net.modules():
            vars(module).pop("_compiled_call_impl", None)  # net.compile(): the eager forward is what can be split
        tame(self.net)
        if logits is not None:
            self.net.register_forward_hook(lambda module, args, output: logits(output))
        self.contents, self.mirror = Contents(self.net), Mirror(pairs)
        self.state = Snapshot(self.net, self.contents, private=True)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter with the same storage and a count of writes of its own: an optimiser that steps meanwhile does
    not make backward passes of the twin fail."""
    data = parameter.data
    if data.is_inference():  # autograd does not save it; the memory itself is like any other
        memory = torch.empty(0, dtype=data.dtype, device=data.device)
        data = memory.set_(data.untyped_storage(), data.storage_offset(), data.shape, data.stride())
    alias = nn.Parameter(data, requires_grad=False)
    vars(alias).update(vars(parameter))
    return alias


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    with torch._C.DisableTorchFunction():
        return list(map(version, tensors))


def _scripted_pairs(source: nn.Module, target: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The tensors of a TorchScript module, which copies itself, with their copies."""
    parameters = list(zip(source.parameters(), target.parameters(), strict=True))
    for _, copied in parameters:
        copied.requires_grad_(False)
    return [*parameters, *zip(source.buffers(), target.buffers(), strict=True)]


@contextmanager
def _turn(net: nn.Module, why: str, logits: Callable[[Any], Any] | None) -> Iterator[Snapshot]:
    """The only passes over ``net`` for now, which returns ``logits`` in them; it is left as found.

    Raises:
        ValueError: it cannot be run itself either.
    """
    problem = ""
    if any(parameter.is_inference() for parameter in net.parameters()):
        problem = "its weights were made under torch.inference_mode(), which keeps them from gradients"
    elif any(vars(module).get("_compiled_call_impl") for module in net.modules()):
        problem = "net.compile() has replaced its forward, whose layers cannot be split"
    if problem:
        raise ValueError(
            f"the network has no private copy to score with, as {why}, and cannot be used itself, as {problem}; "
            "make it one that copy.deepcopy can copy, or undo the latter"
        )
    with _taking_turns:
        lock = _turns.setdefault(net, threading.RLock())
    with lock, _returning(net, logits):
        state = Snapshot(net, Contents(net))
        try:
            yield state
        finally:
            state.restore()


@contextmanager
def _returning(net: nn.Module, logits: Callable[[Any], Any] | None) -> Iterator[None]:
    """Within it ``net`` returns its logits, in this thread."""
    if logits is None:
        yield
        return
    handle = net.register_forward_hook(in_this_thread(lambda module, args, output: logits(output)))
    try:
        yield
    finally:
        handle.remove()
