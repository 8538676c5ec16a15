"""The gradients of one pass at the split points, one backward pass for each loss.

A gradient is handed on as it arrives, so that no two are held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from openood_sandi.engine.errors import BackwardError
from openood_sandi.engine.memory import is_out_of_memory
from openood_sandi.engine.recorded import Site

__all__ = ["GradientPass", "Loss", "Objective", "by_loss", "differentiate", "gradients_of"]

Loss = Callable[[Tensor, "Tensor | None"], Tensor]
"""From the logits (L, B, classes) and the feature map F (L, B, ...) of L copies of a batch to the sum over copies and
images of a loss, so that the gradient of each copy of each image is its own."""


@dataclass(frozen=True)
class Objective:
    """At one split: g_i = d attribution / dz, and sign(d ascent / dz) is the direction of the step."""

    attribution: Loss | None
    """None where g_i is not wanted."""
    ascent: Loss


Receive = Callable[[Site, Tensor], None]
"""Takes in one tensor of a split."""


@dataclass(frozen=True)
class GradientPass:
    """A forward pass with its autograd graph."""

    objectives: dict[Site, Objective]
    logits: Tensor
    z: dict[Site, Tensor]
    feature: Site | None
    roots: Sequence[Tensor] = ()
    """What a backward pass goes back to, where it is not the sites themselves."""


def by_loss(objectives: dict[Site, Objective], takes_step: bool) -> dict[Loss, tuple[list[Site], list[Site]]]:
    """For each loss, one backward pass: the sites that it attributes and those that ascend it."""
    losses: dict[Loss, tuple[list[Site], list[Site]]] = {}
    for site, objective in objectives.items():
        if objective.attribution is not None:
            losses.setdefault(objective.attribution, ([], []))[0].append(site)
        if takes_step:
            losses.setdefault(objective.ascent, ([], []))[1].append(site)
    return losses


def differentiate(run: GradientPass, on_attribution: Receive, on_ascent: Receive | None) -> set[Site]:
    """Hands on the gradients of a pass, each as it arrives; returns the sites that any loss depends on."""
    features = None if run.feature is None else run.z[run.feature].unsqueeze(0)
    alive: set[Site] = set()
    losses = by_loss(run.objectives, on_ascent is not None)
    for number, (loss, (attributed, stepped)) in enumerate(losses.items(), 1):
        receivers = [(set(attributed), on_attribution), (set(stepped), on_ascent)]
        value = loss(run.logits.unsqueeze(0), features)
        wanted = {site: run.z[site] for site in (*attributed, *stepped)}
        alive |= _backward(value, wanted, run.roots, partial(_hand_on, receivers), retain=number < len(losses))
    return alive


def _hand_on(receivers: list[tuple[set[Site], Receive | None]], site: Site, gradient: Tensor) -> None:
    for sites, receive in receivers:
        if site in sites and receive is not None:
            receive(site, gradient)


def _backward(
    value: Tensor, z: dict[Site, Tensor], roots: Sequence[Tensor], receive: Receive, retain: bool
) -> set[Site]:
    """Calls ``receive`` with d value / dz of every site: no two gradients are held at once."""
    arrived: set[Site] = set()

    def hook_for(site: Site) -> Callable[[Tensor], None]:
        def fire(gradient: Tensor) -> None:
            arrived.add(site)
            receive(site, gradient)

        return fire

    handles = [tensor.register_hook(hook_for(site)) for site, tensor in z.items()]  # type: ignore[no-untyped-call]
    try:
        if value.requires_grad:
            # A site need not depend on the roots. Without roots, the leaves are reached through all the other sites.
            ends = [*roots, *z.values()] if roots else [t for t in z.values() if t.is_leaf] or list(z.values())
            with _refused_by_autograd():
                torch.autograd.grad(value, ends, retain_graph=retain, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for site in z.keys() - arrived:
        receive(site, torch.zeros_like(z[site]))
    return arrived


def gradients_of(value: Tensor, tensors: Sequence[Tensor], retain: bool) -> Sequence[Tensor]:
    """d value / d tensor for each of ``tensors``, zero where there is no dependence."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    with _refused_by_autograd():
        return torch.autograd.grad(value, tensors, retain_graph=retain, allow_unused=True, materialize_grads=True)


@contextmanager
def _refused_by_autograd() -> Iterator[None]:
    """An error of a backward pass as one that passes of another kind may do without: checkpoints refuse gradients by
    chosen tensors, and what they or custom functions compute may not fit several copies.

    Raises:
        BackwardError: with the error that was raised.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BackwardError(f"autograd cannot go back through the recorded pass ({error})") from error
