"""The attribution paths z^0, z^1, ..., z^{T-1} of every split, and the gradients along them (Eq. 9).

Two drivers: :func:`walk_splits` attacks every split on its own from its clean activation, as S&I does;
:func:`walk_input` attacks the input alone (the paper's ablation without layer splitting). Both report to an
:class:`Observer` and keep no second-order graph; parameters are expected frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openood_sandi.engine import lanes
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.backward import GradientPass, Loss, Objective, by_loss, differentiate, gradients_of
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import MemoryBudget
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.tape import Tap, Tape

__all__ = ["Loss", "LossPlan", "Objective", "Observer", "Walk", "leaves_in", "walk_input", "walk_splits"]

LossPlan = Callable[[Tensor, "Tensor | None"], "dict[Site, Objective]"]
"""From clean logits (B, classes) and clean F to the objective of each split, F's own included where it has one."""


@dataclass(frozen=True)
class Walk:
    """Which paths are walked.

    Attributes:
        losses: what is attributed and what is ascended at each split.
        attack: the steps of Eq. 9.
        feature: the site of F, where a loss reads it.
        input_ascent: for the ablation without splitting: from the clean logits to the loss that the input ascends.
            None attacks every split.
    """

    losses: LossPlan
    attack: Attack = field(default_factory=lambda: Attack(steps=1))
    feature: Site | None = None
    input_ascent: Callable[[Tensor], Loss] | None = None


class Observer:
    """Takes in what happens on a walk over one batch. Subclasses define what they want to know of.

    Attributes:
        wants_motion: whether :meth:`motion` is to be called; then the last step of a path, which has no other use, is
            taken as well.
        only_listens: whether the clean pass may go by without its results being kept. That spares memory where no
            split has a second gradient to compute.
    """

    wants_motion = False
    only_listens = False

    def call(self, position: int, name: str, result: Any) -> None:
        """A torch call of the clean pass has been made: its place in the pass, its name and its result."""

    def replayed(self, position: int, lane_sites: Sequence[Site], result: Any) -> None:
        """A call of the pass has been made again for several splits: ``result[k]`` is that of ``lane_sites[k]``."""

    def gradient(self, site: Site, gradient: Tensor) -> None:
        """g_i at a split, of its shape (B, ...); those of one split come in the order i = 1..T."""

    def direction(self, site: Site, sign: Tensor) -> bool:
        """The sign of the first step at a split, of its shape (B, ...). Returns whether its path is to be gone on."""
        return True

    def motion(self, site: Site, offset: Tensor) -> None:
        """z^i - z^{i-1}, of the split's shape (B, ...), after the g_i of the same i."""


def walk_splits(tape: Tape, x: Tensor, walk: Walk, observer: Observer, budget: MemoryBudget) -> Tensor:
    """Walks the paths of all of the tape's sites on ``x`` (B, C, H, W) and returns the clean logits (B, classes).

    i = 1 of all splits is one recorded forward and one backward for each loss. Later iterates are replays of the
    suffixes of as many splits at a time as ``budget`` holds (at least one); the arithmetic of a split is the same
    however they are grouped. Where no gradient of a replay is wanted, it is a forward pass alone.
    """
    attack = walk.attack
    takes_step = attack.steps > 1 or observer.wants_motion
    clean: dict[Site, Tensor] = {}
    with torch.set_grad_enabled(bool(tape.sites)):
        logits = _clean_pass(tape, x, leaves_in(clean, tape.sites), observer, kept=takes_step and bool(tape.sites))
    _require_reached(tape.sites, clean)
    objectives = walk.losses(logits, clean.get(walk.feature) if walk.feature is not None else None)
    directions: dict[Site, Tensor] = {}

    def keep_direction(site: Site, gradient: Tensor) -> None:
        sign = gradient.sign()
        if observer.direction(site, sign):
            directions[site] = sign.to(torch.int8)

    pass_ = GradientPass(objectives, logits, clean, walk.feature)
    alive = differentiate(pass_, observer.gradient, keep_direction if takes_step else None)
    logits = logits.detach()
    clean = {site: z.detach() for site, z in clean.items() if site in directions}
    if not clean:
        return logits
    tape.release_graph()
    replay = _Replay(tape, x, walk.feature, objectives, observer, alive, attack, logits.argmax(1))
    for chunk in _chunks(tape, list(clean), budget):
        z = {site: attack.advance(clean[site], clean[site], directions.pop(site)) for site in chunk}
        _report_motion(observer, z, clean)
        for i in range(2, attack.steps + 1):
            last = i == attack.steps and not observer.wants_motion
            signs = replay.run(z, takes_step=not last)
            if not last:
                moved = {site: attack.advance(z[site], clean[site], signs.pop(site)) for site in chunk}
                _report_motion(observer, moved, z)
                z = moved
    budget.lanes_now = 0
    return logits


def _clean_pass(tape: Tape, x: Tensor, tap: Tap, observer: Observer, kept: bool) -> Tensor:
    """The logits of the clean pass, every call of which is shown to the observer."""
    if observer.only_listens and not kept:
        return tape.watch(x, tap, observer.call)
    logits = tape.record(x, tap)
    if tape.sites and not logits.requires_grad:
        raise ValueError(
            f"the network's logits have no gradient at the split points ({tape.sites[0].name!r} and others): its "
            "forward detaches them or runs under inference_mode; pass a network that returns logits with their gradient"
        )
    if type(observer).call is not Observer.call:
        for position, (name, call) in enumerate(zip(tape.call_names, tape.calls, strict=True)):
            observer.call(position, name, call.result)
    return logits


@dataclass(frozen=True)
class _Replay:
    """Replays of one recorded pass, with each split of a chunk at its perturbed value in a lane of its own."""

    tape: Tape
    x: Tensor
    feature: Site | None
    objectives: dict[Site, Objective]
    observer: Observer
    alive: set[Site]
    attack: Attack
    labels: Tensor

    def run(self, z: dict[Site, Tensor], *, takes_step: bool) -> dict[Site, Tensor]:
        """One replay with the splits at ``z``; the directions of the next step."""
        losses = by_loss({site: self.objectives[site] for site in z}, takes_step)
        with torch.set_grad_enabled(bool(losses)):
            leaves = {site: value.detach().requires_grad_(bool(losses)) for site, value in z.items()}
            logits, features = self._forward(leaves)
        signs: dict[Site, Tensor] = {}
        lane = {site: number for number, site in enumerate(z)}
        for number, (loss, (attributed, stepped)) in enumerate(losses.items(), 1):
            sites = list(dict.fromkeys([*attributed, *stepped]))
            rows = [lane[site] for site in sites]
            value = loss(_rows(logits, rows), None if features is None else _rows(features, rows))
            gradients = gradients_of(value, [leaves[site] for site in sites], retain=number < len(losses))
            for site, gradient in zip(sites, gradients, strict=True):
                if site in attributed:
                    self.observer.gradient(site, gradient)
                if site in stepped:
                    signs[site] = self.attack.direction(gradient, self.labels, logits[lane[site]])
        return signs

    def _forward(self, leaves: dict[Site, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits and F of every lane."""
        sites = list(leaves)
        lane = {site: number for number, site in enumerate(sites)}
        maps: list[Tensor] = []

        def tap(site: Site, tensor: Tensor) -> Tensor:
            if site in leaves:
                tensor = lanes.join(tensor, lane[site], leaves[site])
            if site == self.feature:
                maps.append(tensor)
            return tensor

        def listen(position: int, name: str, result: Any) -> None:
            found = lanes.lanes_of(result) if isinstance(result, Tensor) else None
            if found is not None:
                self.observer.replayed(position, [sites[number] for number in found.ids], result)

        listens = type(self.observer).replayed is not Observer.replayed
        logits = self.tape.replay(self.x, tap, listen if listens else None)
        ids = tuple(lane.values())
        arrived = {number for tensor in (logits, *maps) for number in (lanes.lanes_of(tensor) or ((),))[0]}
        lost = [site.name for site in sites if site in self.alive and lane[site] not in arrived]
        if lost:
            raise ReplayError(
                f"the perturbation of split point {lost[0]!r} was lost on its way to the logits, in something torch "
                "cannot see into (a scripted module, checkpoint(), a custom autograd function); choose split points "
                "behind it"
            )
        return lanes.widen(logits, ids), lanes.widen(maps[-1], ids) if maps else None


def walk_input(tape: Tape, x: Tensor, walk: Walk, observer: Observer) -> Tensor:
    """Walks one path, that of the input ``x`` (B, C, H, W), and returns the clean logits (B, classes).

    x^i = x^{i-1} + eta sign(d ascent / dx); g_i of every split is its gradient in the pass over x^{i-1}.
    """
    assert walk.input_ascent is not None
    attacked = x.detach()
    before: dict[Site, Tensor] = {}
    for i in range(1, walk.attack.steps + (2 if observer.wants_motion else 1)):
        attacked.requires_grad_(True)
        z: dict[Site, Tensor] = {}
        logits = tape.record(attacked, leaves_in(z, tape.sites))
        _require_reached(tape.sites, z)
        now = {site: value.detach() for site, value in z.items()}
        if before:
            _report_motion(observer, now, before)
        if i > walk.attack.steps:
            break
        if i == 1:
            clean_logits = logits.detach()
            objectives = walk.losses(logits, z.get(walk.feature) if walk.feature is not None else None)
            step_loss = walk.input_ascent(clean_logits)
        (gradient,) = gradients_of(step_loss(logits[None], None), [attacked], retain=True)
        differentiate(GradientPass(objectives, logits, z, walk.feature, [attacked]), observer.gradient, None)
        step = walk.attack.direction(gradient, clean_logits.argmax(1), logits)
        attacked = walk.attack.advance(attacked.detach(), x, step)
        before = now
    return clean_logits


def _require_reached(sites: Sequence[Site], z: dict[Site, Tensor]) -> None:
    missed = [site.name for site in sites if site not in z]
    if missed:
        raise ValueError(
            f"these images take the network past split point {missed[0]!r}, which others went through: its forward "
            "chooses its layers by what it is given; name split points that every image goes through"
        )


def _rows(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    """``tensor[numbers]``, which for a list would have to go to the tensor's device first."""
    if numbers == list(range(len(tensor))):
        return tensor
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return tensor[numbers[0] : numbers[-1] + 1]
    return torch.stack([tensor[number] for number in numbers])


def leaves_in(store: dict[Site, Tensor], sites: Iterable[Site]) -> Tap:
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


def _report_motion(observer: Observer, after: dict[Site, Tensor], before: dict[Site, Tensor]) -> None:
    if observer.wants_motion:
        for site, z in after.items():
            observer.motion(site, z - before[site])


def _chunks(tape: Tape, sites: Iterable[Site], budget: MemoryBudget) -> Iterator[list[Site]]:
    """Consecutive sites whose suffixes fit into the ``budget`` together, one at least; it is told how many."""
    chunk: list[Site] = []
    total = 0
    for site in sites:
        cost = 2 * tape.suffix_bytes(site)  # activations kept for the backward pass, and their gradients
        if chunk and (total + cost > budget.bytes or len(chunk) >= budget.lanes):
            budget.lanes_now = len(chunk)
            yield chunk
            chunk, total = [], 0
        chunk.append(site)
        total += cost
    if chunk:
        budget.lanes_now = len(chunk)
        yield chunk
