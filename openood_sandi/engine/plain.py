"""The paths of Eq. 9 by plain autograd: one split, one iterate, one whole forward pass at a time.

Slow, and exact for whatever autograd itself can differentiate, since nothing looks into the network's calls: custom
autograd functions, checkpoints, scripted modules, gradients taken inside forward. A forward hook replaces what the
split's module returns by z^{i-1}; branches that left before the split keep their clean value, because all before the
split is computed on the clean images. What autograd gives is reported, under ``torch.no_grad()`` in forward too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi.engine.attack import Attack
from openood_sandi.engine.contents import Contents
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.single_image import RightGradients
from openood_sandi.engine.state import Snapshot
from openood_sandi.engine.threads import in_this_thread
from openood_sandi.engine.walk import Loss, Objective, Observer, Walk

__all__ = ["PlainWalk", "walk_plain"]


@dataclass(frozen=True)
class PlainWalk:
    """What a plain walk found.

    Attributes:
        logits: the clean ones (B, classes).
        cut_off: sites that autograd ties to none of their losses; the gradients reported there are zeros.
    """

    logits: Tensor
    cut_off: tuple[Site, ...]


def walk_plain(net: nn.Module, x: Tensor, sites: Sequence[Site], walk: Walk, observer: Observer) -> PlainWalk:
    """Walks the paths of all ``sites`` on images ``x`` (B, C, H, W), as ``walk_splits`` does.

    Args:
        net: a network in eval mode, best a twin. What its forward writes into buffers and attributes is undone before
            every pass and at the end, so each pass starts from the same state.
        x: images (B, C, H, W).
        sites: the splits, each the output of a module's call; F's site included where the losses have an objective for
            it. Every site needs one.
        walk: losses and steps; its input ascent is not for here.
        observer: takes in gradients, directions and motions. There are no calls to be told of.

    Raises:
        ReplayError: a site is no module's output, is not reached, or does not hold a floating-point tensor; or it lies
            in a checkpoint that calls its module again, more than once.
    """
    for site in (*sites, *([] if walk.feature is None else [walk.feature])):
        _require_module(site)
    walker = _Walker(net, x, walk.feature)
    with torch.inference_mode(False), torch.enable_grad(), walker.state_kept():
        logits, value = walker.clean()
        objectives = walk.losses(logits, value)
        cut_off = [site for site in sites if not _walk_one(walker, site, objectives[site], walk.attack, observer)]
    return PlainWalk(logits.detach(), tuple(cut_off))


def _walk_one(walker: _Walker, site: Site, objective: Objective, attack: Attack, observer: Observer) -> bool:
    """The path of one split; whether a loss depends on it at all."""
    origin: Tensor | None = None
    z: Tensor | None = None
    labels = torch.empty(0)
    depends = False
    for i in range(1, attack.steps + 1):
        steps = i < attack.steps or observer.wants_motion
        wanted = (objective.attribution, objective.ascent if steps else None)
        losses = list(dict.fromkeys(loss for loss in wanted if loss is not None))
        leaf, logits, found = walker.gradients(site, z, losses)
        labels = logits.argmax(1) if i == 1 else labels
        depends = depends or any(gradient is not None for gradient in found)
        gradients = {
            loss: torch.zeros_like(leaf) if gradient is None else gradient
            for loss, gradient in zip(losses, found, strict=True)
        }
        if objective.attribution is not None:
            observer.gradient(site, gradients[objective.attribution])
        if steps:
            origin = leaf if origin is None else origin
            sign = attack.direction(gradients[objective.ascent], labels, logits)
            if i == 1 and not observer.direction(site, sign):
                break
            z = attack.advance(leaf, origin, sign)
            if observer.wants_motion:
                observer.motion(site, z - leaf)
    return depends


class _Walker:
    """Whole forward passes over ``net`` on the same images, each from the same state."""

    def __init__(self, net: nn.Module, x: Tensor, feature: Site | None) -> None:
        self.net, self.x, self.feature = net, x.detach(), feature
        self._trains = any(parameter.requires_grad for parameter in net.parameters())
        self._state = Snapshot(net, Contents(net))

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """The network is left with the state that it was found in."""
        try:
            yield
        finally:
            self._state.restore()

    def clean(self) -> tuple[Tensor, Tensor | None]:
        """The clean logits, and F as a tensor that they can be differentiated by."""
        if self.feature is None:
            with torch.no_grad():
                return self.net(self.x.clone()), None
        split = _Replaced(self.feature, None)
        with split.hooked(self.net), RightGradients() if len(self.x) == 1 else nullcontext():
            logits: Tensor = self.net(self.x.clone())
        if not logits.requires_grad:
            raise ReplayError(
                f"the logits do not depend on F ({self.feature.name!r}) by autograd: it lies under torch.no_grad(), in "
                "checkpoint(..., use_reentrant=True) or before a detach(); name another module as feature"
            )
        return logits, split.leaf

    def gradients(
        self, site: Site, z: Tensor | None, losses: Sequence[Loss]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """z^{i-1} (what the site holds on the clean images, if ``z`` is None), the logits (B, classes) there, and the
        gradient of each loss by it, None where there is no path."""
        split = _Replaced(site, z)
        logits, found = self._differentiate(split, losses, self.x.clone())
        if split.under_no_grad and not self._trains:
            # checkpoint(use_reentrant=True) runs its layers under no_grad, and again in a backward pass through it,
            # which there is if its inputs require gradients. The clone can be written to, as a leaf cannot.
            split = _Replaced(site, z)
            logits, found = self._differentiate(split, losses, self.x.clone().requires_grad_(True).clone())
        return split.leaf.detach(), logits, found

    def _differentiate(self, split: _Replaced, losses: Sequence[Loss], x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The logits, and the gradient of each loss at the split."""
        self._state.restore()  # before there are hooks of ours, which are state, too
        kept = None if self.feature in (None, split.site) else _Kept(self.feature)
        with split.hooked(self.net), nullcontext() if kept is None else kept.hooked(self.net):
            with RightGradients() if len(x) == 1 else nullcontext():
                logits = self.net(x)
            value = None if self.feature is None else split.leaf if kept is None else kept.tensor
            features = None if value is None else value[None]
            return logits.detach(), [
                self._gradient(loss(logits[None], features), split.leaf, retain=number < len(losses))
                for number, loss in enumerate(losses, 1)
            ]

    def _gradient(self, value: Tensor, leaf: Tensor, retain: bool) -> Tensor | None:
        if not value.requires_grad:
            return None
        if self._trains:  # the parameters' .grad is the caller's
            return torch.autograd.grad(value, leaf, retain_graph=retain, allow_unused=True)[0]
        leaf.grad = None
        value.backward(retain_graph=retain)  # type: ignore[no-untyped-call]  # reentrant checkpoints refuse grad()
        return leaf.grad


class _Hook:
    """Acts on what the module of ``site`` returns at the call of that site, and when a checkpoint repeats that call."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def act(self, output: Tensor, again: bool) -> Tensor | None:
        """What flows on in place of ``output``, if not None."""
        raise NotImplementedError

    @contextmanager
    def hooked(self, net: nn.Module) -> Iterator[None]:
        """Acts while this lasts, in this thread's passes alone.

        Raises:
            ReplayError: the passes made did not get to the site.
        """
        calls = 0

        @in_this_thread
        def reach(output: Any) -> Tensor | None:
            nonlocal calls
            calls += 1
            return self.act(self._checked(output), again=False) if calls == self.site.index else None

        def fire(module: nn.Module, args: Any, output: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:
                return reach(output)
            # in a backward pass, on a thread of autograd's
            return self.act(output, again=True) if self._repeats(calls) else None

        handle = net.get_submodule(self.site.module or "").register_forward_hook(fire)
        try:
            yield
        finally:
            handle.remove()

    def _repeats(self, calls: int) -> bool:
        """Whether a call in a backward pass is that of the site, after ``calls`` in the forward pass."""
        if calls > 1:
            raise ReplayError(
                f"split point {self.site.name!r} is called {calls} times, and checkpoint() calls it again in the "
                "backward pass, where its calls cannot be told apart; switch checkpointing off for scoring"
            )
        return calls == self.site.index

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise ReplayError(
                f"split point {self.site.name!r} returns {kind}, expected one floating-point tensor; name a submodule "
                "that returns one"
            )
        return output


class _Replaced(_Hook):
    """Puts z in place of what the site holds; a copy of that if ``z`` is None."""

    def __init__(self, site: Site, z: Tensor | None) -> None:
        super().__init__(site)
        self._z, self._leaf = z, z
        self.under_no_grad = False

    @property
    def leaf(self) -> Tensor:
        """z as a leaf of autograd's graph."""
        if self._leaf is None or not self._leaf.requires_grad:
            raise ReplayError(
                f"the forward pass does not reach split point {self.site.name!r}, or not as often as named; choose "
                "another with the argument splits"
            )
        return self._leaf

    def act(self, output: Tensor, again: bool) -> Tensor | None:
        if not again:
            self.under_no_grad = not torch.is_grad_enabled()
            with torch.inference_mode(False):
                self._leaf = (output if self._z is None else self._z).detach().clone().requires_grad_(True)
        return self.leaf.clone()  # the network may write into what it gets


class _Kept(_Hook):
    """Keeps what the site holds, as it is before the network writes into it."""

    tensor: Tensor | None = None

    def act(self, output: Tensor, again: bool) -> Tensor | None:
        if not again:
            self.tensor = output.clone()
        return None


def _require_module(site: Site) -> None:
    if site.module is None:
        raise ReplayError(
            f"split point {site.name!r} is the result of a function call, which cannot be told apart where the network "
            "has calls that torch's function mode does not see; name modules in splits"
        )
