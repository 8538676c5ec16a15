"""Whether recorded and replayed passes give what plain autograd gives, looked at on the first batch.

The record sees a network's torch calls. What it cannot see into (custom autograd functions whose backward reduces over
dimensions, checkpoints, scripted modules, gradients taken in forward) may go wrong on several copies at once without
an error. So gradients of a few images are computed both ways before anything is scored: at a few split points; at all
of them where something of that kind is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from openood_sandi.engine.attack import Attack
from openood_sandi.engine.devices import is_autocast
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import MemoryBudget, is_out_of_memory
from openood_sandi.engine.plain import walk_plain
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.state import Snapshot
from openood_sandi.engine.tape import Tape
from openood_sandi.engine.walk import Objective, Observer, Walk, leaves_in, walk_splits

__all__ = ["Comparison", "compared"]

_FEW_SITES = 4
_ATTACK = Attack(steps=2)
#: Of the length of a gradient: more than rounding makes of it, in the precision of its dtype, and less than any fault.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
#: The share of a gradient's positions where sums may cancel in one order and not in another.
_COINCIDENCES = 1e-3


class Comparison(NamedTuple):
    """What a look at both kinds of passes found."""

    difference: str
    """In what they differ, in words; "" where they agree."""
    hides: str
    """What decides gradients and is none of the recorded calls, in words; "" for nothing."""
    call_names: tuple[str, ...]
    """The calls of the recorded pass."""


class _Gradients(Observer):
    def __init__(self) -> None:
        self.found: dict[Site, list[Tensor]] = {}

    def gradient(self, site: Site, gradient: Tensor) -> None:
        self.found.setdefault(site, []).append(gradient.detach().cpu().double())


def _largest(logits: Tensor, feature: Tensor | None) -> Tensor:
    return logits.max(-1).values.sum()


def compared(
    net: nn.Module, x: Tensor, sites: Sequence[Site], budget: MemoryBudget, state: Snapshot | None = None
) -> Comparison:
    """Compares replayed passes with plain ones on images ``x`` (b, C, H, W): logits, and two gradients at ``sites``.

    In half precision rounding differs by more than a fault might; and what is no module's output has no plain passes.
    There nothing is compared, and what hides is itself the difference.
    """
    tape = Tape(net, sites, state)
    try:
        hides = _hidden(tape, x)
    except ReplayError as error:
        return Comparison(str(error), "", tape.call_names)
    by_function = next((site.name for site in sites if site.module is None), "")
    if hides and by_function:
        difference = f"{hides}, and what replays make of that cannot be checked at {by_function!r}"
    elif x.dtype in _TOLERANCE and not is_autocast(x.device):
        chosen = [site for site in sites if site.module is not None]
        every = 1 if hides else max(1, -(-len(chosen) // _FEW_SITES))
        difference = _difference(net, x, chosen[::every], budget, state, bool(hides))
    else:
        difference = hides and f"{hides}, and what replays make of that cannot be checked in low precision"
    return Comparison(difference, hides, tape.call_names)


def _hidden(tape: Tape, x: Tensor) -> str:
    """What of a pass over ``x`` the record does not see, and gradients depend on."""
    with torch.enable_grad():
        logits = tape.record(x, leaves_in({}, tape.sites))
    node = _written_in_python(logits)
    if node:
        return f"its gradients go through code of its own ({node})"
    return "" if tape.saw_all else "it computes something by code that torch's function mode does not see"


def _written_in_python(logits: Tensor) -> str:
    """A custom autograd function behind the splits, backward hooks of modules included; "" where there is none."""
    waiting: list[Any] = [logits.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            return type(node).__name__
        waiting.extend(before for before, _ in node.next_functions)
    return ""


def _difference(
    net: nn.Module, x: Tensor, sites: Sequence[Site], budget: MemoryBudget, state: Snapshot | None, hides: bool
) -> str:
    """In what they differ at the sites; what hides may also make zeros that the length of a gradient does not show."""
    if not sites:
        return ""
    objective = Objective(_largest, _largest)
    walk = Walk(lambda logits, feature: dict.fromkeys(sites, objective), _ATTACK)
    replayed, plain = _Gradients(), _Gradients()
    try:
        if state is not None:
            state.restore()
        expected = walk_plain(net, x, sites, walk, plain)
    except (RuntimeError, ValueError) as error:  # autograd refuses what a record can do without, as out=
        if is_out_of_memory(error):
            raise
        return str(error) if hides else ""
    try:
        logits = walk_splits(Tape(net, sites, state), x, walk, replayed, budget)
    except ReplayError as error:
        return str(error)
    tolerance = _TOLERANCE.get(logits.dtype, 0.1)
    if not _close(logits.cpu().double(), expected.logits.cpu().double(), tolerance):
        return "its logits differ when they are recorded"
    for site in sites:
        if site in expected.cut_off:  # a stem under no_grad: the record knows better, see `no_grad`
            continue
        for i, (found, right) in enumerate(zip(replayed.found[site], plain.found[site], strict=True), 1):
            if not _close(found, right, tolerance) or (hides and not _zero_alike(found, right)):
                return f"gradient {i} at {site.name!r} is another one when several copies are computed at once"
    return ""


def _close(found: Tensor, right: Tensor, tolerance: float) -> bool:
    difference = (found - right).nan_to_num(0.0, 0.0, 0.0)
    return found.shape == right.shape and float(difference.norm()) <= tolerance * float(right.nan_to_num().norm())


def _zero_alike(found: Tensor, right: Tensor) -> bool:
    """Whether both are zero at the same places, but for coincidences."""
    return float(((found == 0) != (right == 0)).double().mean()) <= _COINCIDENCES
