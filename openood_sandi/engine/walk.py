"""The attribution paths z^0, z^1, ..., z^{T-1} of every split, and the gradients along them (Eq. 9).

Two drivers: :func:`walk_splits` attacks every split on its own from its clean activation, as S&I does;
:func:`walk_input` attacks the input alone (the paper's ablation without layer splitting). Both report to an
:class:`Observer` and keep no second-order graph; parameters are expected frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.losses import Loss, Objective, Plan
from openood_sandi.detectors.sandi.masks import Gates, Masks
from openood_sandi.engine import lanes
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import Room
from openood_sandi.engine.tape import Site, Tap, Tape

__all__ = ["Observer", "walk_input", "walk_splits"]

Receive = Callable[[Site, Tensor], None]
"""Takes in one tensor of a split."""


class Observer(Protocol):
    """Takes in what happens along the paths; gradients of one split come in the order i = 1..T."""

    @property
    def motion(self) -> Receive | None:
        """Called with z^i - z^{i-1}, of the split's shape (B, ...), after the g_i of the same i; None where it is not
        wanted, and the last step of a path, which has no other use, is not taken."""

    def gradient(self, site: Site, gradient: Tensor) -> None:
        """Called with g_i, of the split's shape (B, ...)."""


def walk_splits(
    tape: Tape, x: Tensor, feature: Site | None, plan: Plan, attack: Attack, observer: Observer, room: Room,
    gates: Gates,
) -> tuple[Tensor, dict[Site, Tensor]]:  # fmt: skip
    """Walks the paths of all of the tape's sites on ``x`` (B, C, H, W).

    i = 1 of all splits is one recorded forward and one backward for each loss. Later iterates are replays of the
    suffixes of as many splits at a time as ``room`` holds (at least one); the arithmetic of a split is the same
    however they are grouped. At splits with a gate there is no replay, and the observer is given masks in place
    of gradients; their only backward pass is that for the direction of the step, whose zeros should be those
    of the mask.

    Sites whose gate tells g_1 and no more is asked need not be the tape's: they are never tapped.

    Returns:
        The clean logits (B, classes), and at the sites with a gate where they are not, for which images (B,). Where
        the network made other calls than the gates were found in (the tape tells), nothing but the logits holds.
    """
    takes_step = attack.steps > 1 or observer.motion is not None
    without_gate = [site for site in tape.sites if site not in gates.at]
    masks = Masks(gates)
    clean: dict[Site, Tensor] = {}
    at_once = masks.can_be_read_at_once and not (takes_step and without_gate)
    with torch.set_grad_enabled(bool(tape.sites)):
        tap = _leaves(clean, tape.sites)
        logits = tape.watch(x, tap, masks.read) if at_once else tape.record(x, tap)
    if not at_once:
        for position, (name, call) in enumerate(zip(tape.call_names, tape.calls, strict=True)):
            masks.read(position, name, call.result, tape.calls)
    if masks.lost:
        return logits.detach(), {}
    blocked = masks.blocked()
    doubtful = dict.fromkeys(gates.at, blocked) if blocked is not None and blocked.any() else {}
    let_through = masks.let_through
    objectives = plan(logits, clean.get(feature) if feature is not None else None)
    for site in gates.at:
        if gates.steps > 1:
            objectives[site] = replace(objectives[site], attribution=None)
        else:
            del objectives[site]
    directions: dict[Site, Tensor] = {}

    def keep_direction(site: Site, gradient: Tensor) -> None:
        direction = gradient.sign()
        if site in gates.at:
            z = clean[site].detach()
            gates.pattern(site, gates.at[site].perturbed(attack.advance(z, z, direction), tape.calls))
            # What is cut off has gradient zero for certain, so equal numbers are equal places.
            let_through[site] = let_through[site] != direction.flatten(1).count_nonzero(1)
        else:
            directions[site] = direction.to(torch.int8)

    on_ascent = keep_direction if takes_step else None
    alive = _differentiate(objectives, logits, clean, feature, observer.gradient, on_ascent)
    logits = logits.detach()
    differs = torch.stack(list(let_through.values())).any(1).tolist() if let_through else []
    doubtful |= {site: let_through[site] for site, differ in zip(let_through, differs, strict=True) if differ}
    clean = {site: z.detach() for site, z in clean.items() if site not in gates.at}
    if not takes_step or not clean:
        return logits, doubtful
    tape.release_graph()
    for chunk in _chunks(tape, list(clean), room):
        z = {site: attack.advance(clean[site], clean[site], directions.pop(site)) for site in chunk}
        _report_motion(observer, z, clean)
        for i in range(2, attack.steps + 1):
            last = i == attack.steps and observer.motion is None
            signs = _replay(tape, x, z, objectives, feature, observer, takes_step=not last, alive=alive)
            if not last:
                moved = {site: attack.advance(z[site], clean[site], signs.pop(site)) for site in chunk}
                _report_motion(observer, moved, z)
                z = moved
    return logits, doubtful


def _replay(
    tape: Tape, x: Tensor, z: dict[Site, Tensor], objectives: dict[Site, Objective], feature: Site | None,
    observer: Observer, *, takes_step: bool, alive: set[Site],
) -> dict[Site, Tensor]:  # fmt: skip
    """One replay with each split of ``z`` at its perturbed value in a lane of its own; returns the next signs."""
    lane = {site: number for number, site in enumerate(z)}
    ids = tuple(lane.values())
    leaves = {site: value.detach().requires_grad_(True) for site, value in z.items()}
    maps: list[Tensor] = []

    def tap(site: Site, tensor: Tensor) -> Tensor:
        if site in leaves:
            tensor = lanes.join(tensor, lane[site], leaves[site])
        if site == feature:
            maps.append(tensor)
        return tensor

    logits = tape.replay(x, tap)
    arrived = {number for tensor in (logits, *maps) for number in (lanes.lanes_of(tensor) or ((),))[0]}
    lost = [site.name for site in z if site in alive and lane[site] not in arrived]
    if lost:
        raise ReplayError(
            f"the perturbation of split point {lost[0]!r} was lost on its way to the logits, in something torch cannot "
            "see into (a scripted module, checkpoint(), a custom autograd function); choose split points behind it"
        )
    logits = lanes.widen(logits, ids)
    features = lanes.widen(maps[-1], ids) if maps else None
    signs: dict[Site, Tensor] = {}
    losses = _by_loss({site: objectives[site] for site in z}, takes_step)
    for number, (loss, (attributed, stepped)) in enumerate(losses.items(), 1):
        sites = list(dict.fromkeys([*attributed, *stepped]))
        rows = slice(None) if len(sites) == len(ids) else [lane[site] for site in sites]
        value = loss(logits[rows], None if features is None else features[rows])
        gradients = _gradients(value, [leaves[site] for site in sites], retain=number < len(losses))
        for site, gradient in zip(sites, gradients, strict=True):
            if site in attributed:
                observer.gradient(site, gradient)
            if site in stepped:
                signs[site] = gradient.sign()
    return signs


def walk_input(
    tape: Tape, x: Tensor, feature: Site | None, plan: Plan, ascent: Callable[[Tensor], Loss], attack: Attack,
    observer: Observer,
) -> Tensor:  # fmt: skip
    """Walks one path, that of the input ``x`` (B, C, H, W), and returns the clean logits (B, classes).

    x^i = x^{i-1} + eta sign(d ascent / dx); g_i of every split is its gradient in the pass over x^{i-1}. ``ascent``
    makes the loss from the clean logits.
    """
    attacked = x.detach()
    before: dict[Site, Tensor] = {}
    for i in range(1, attack.steps + (1 if observer.motion is None else 2)):
        attacked.requires_grad_(True)
        z: dict[Site, Tensor] = {}
        logits = tape.record(attacked, _leaves(z, tape.sites))
        now = {site: value.detach() for site, value in z.items()}
        if before:
            _report_motion(observer, now, before)
        if i > attack.steps:
            break
        if i == 1:
            clean_logits = logits.detach()
            objectives = plan(logits, z.get(feature) if feature is not None else None)
            step_loss = ascent(clean_logits)
        (gradient,) = _gradients(step_loss(logits[None], None), [attacked], retain=True)
        _differentiate(objectives, logits, z, feature, observer.gradient, None, roots=[attacked])
        attacked = attack.advance(attacked.detach(), x, gradient.sign())
        before = now
    return clean_logits


def _leaves(store: dict[Site, Tensor], sites: Iterable[Site]) -> Tap:
    """A tap that puts the activation of each of ``sites`` into ``store``, as a tensor to differentiate with respect to.

    Always a new tensor object: what else the network does with the old one happened before the split.
    """
    wanted = frozenset(sites)

    def tap(site: Site, tensor: Tensor) -> Tensor:
        if site not in wanted:
            return tensor
        if not tensor.is_floating_point():
            raise ReplayError(f"split point {site.name!r} holds {tensor.dtype}, which has no gradient")
        store[site] = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_(True)
        return store[site]

    return tap


def _by_loss(objectives: dict[Site, Objective], takes_step: bool) -> dict[Loss, tuple[list[Site], list[Site]]]:
    """For each loss, one backward pass: the sites that it attributes and those that ascend it."""
    losses: dict[Loss, tuple[list[Site], list[Site]]] = {}
    for site, objective in objectives.items():
        if objective.attribution is not None:
            losses.setdefault(objective.attribution, ([], []))[0].append(site)
        if takes_step:
            losses.setdefault(objective.ascent, ([], []))[1].append(site)
    return losses


def _differentiate(
    objectives: dict[Site, Objective], logits: Tensor, z: dict[Site, Tensor], feature: Site | None,
    on_attribution: Receive, on_ascent: Receive | None, roots: Sequence[Tensor] = (),
) -> set[Site]:  # fmt: skip
    """Hands on the gradients of the recorded pass, each as it arrives; returns the sites that any loss depends on."""
    features = None if feature is None else z[feature].unsqueeze(0)
    alive: set[Site] = set()
    losses = _by_loss(objectives, on_ascent is not None)
    for number, (loss, (attributed, stepped)) in enumerate(losses.items(), 1):
        receivers = [(set(attributed), on_attribution), (set(stepped), on_ascent)]
        value = loss(logits.unsqueeze(0), features)
        wanted = {site: z[site] for site in (*attributed, *stepped)}
        alive |= _backward(value, wanted, roots, partial(_hand_on, receivers), retain=number < len(losses))
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
            # To reach the roots, the backward pass goes through every other site on its way.
            ends = list(roots) or [t for t in z.values() if t.is_leaf] or list(z.values())
            torch.autograd.grad(value, ends, retain_graph=retain, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for site in z.keys() - arrived:
        receive(site, torch.zeros_like(z[site]))
    return arrived


def _gradients(value: Tensor, tensors: Sequence[Tensor], retain: bool) -> Sequence[Tensor]:
    """d value / d tensor for each of ``tensors``, zero where there is no dependence."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return torch.autograd.grad(value, tensors, retain_graph=retain, allow_unused=True, materialize_grads=True)


def _report_motion(observer: Observer, after: dict[Site, Tensor], before: dict[Site, Tensor]) -> None:
    if observer.motion is not None:
        for site, z in after.items():
            observer.motion(site, z - before[site])


def _chunks(tape: Tape, sites: Iterable[Site], room: Room) -> Iterator[list[Site]]:
    """Consecutive sites whose suffixes fit into the ``room`` together, one at least; it is told how many."""
    chunk: list[Site] = []
    total = 0
    for site in sites:
        cost = 2 * tape.suffix_bytes(site)  # activations kept for the backward pass, and their gradients
        if chunk and (total + cost > room.bytes or len(chunk) >= room.lanes):
            room.lanes_now = len(chunk)
            yield chunk
            chunk, total = [], 0
        chunk.append(site)
        total += cost
    if chunk:
        room.lanes_now = len(chunk)
        yield chunk
