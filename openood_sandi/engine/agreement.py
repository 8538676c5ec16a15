"""Whether recorded and replayed passes give what plain autograd gives, looked at on the first batch.

The record sees a network's torch calls. What it cannot see into (custom autograd functions whose backward reduces over
dimensions, checkpoints, scripted modules, gradients taken in forward) may go wrong on several copies at once without
an error. So a few gradients of a few images are computed both ways before anything is scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openood_sandi.engine.attack import Attack
from openood_sandi.engine.devices import is_autocast
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import MemoryBudget, is_out_of_memory
from openood_sandi.engine.plain import walk_plain
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.state import Snapshot
from openood_sandi.engine.tape import Tape
from openood_sandi.engine.walk import Objective, Observer, Walk, walk_splits

__all__ = ["disagreement"]

_SITES = 4
_ATTACK = Attack(steps=2)
#: Of the length of a gradient: more than rounding makes of it, in the precision of its dtype, and less than any fault.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}


class _Gradients(Observer):
    def __init__(self) -> None:
        self.found: dict[Site, list[Tensor]] = {}

    def gradient(self, site: Site, gradient: Tensor) -> None:
        self.found.setdefault(site, []).append(gradient.detach().cpu().double())


def _largest(logits: Tensor, feature: Tensor | None) -> Tensor:
    return logits.max(-1).values.sum()


def disagreement(
    net: nn.Module, x: Tensor, sites: Sequence[Site], budget: MemoryBudget, state: Snapshot | None = None
) -> str:
    """In what replayed passes differ from plain ones on images ``x`` (b, C, H, W), in words; "" where they agree.

    Compared are the logits, and the first two gradients at a few of the ``sites``; those that are no module's output
    are left out. In half precision nothing is compared: rounding differs by more than a fault might.
    """
    chosen = [site for site in sites if site.module is not None]
    chosen = chosen[:: max(1, -(-len(chosen) // _SITES))]
    if not chosen or x.dtype not in _TOLERANCE or is_autocast(x.device):
        return ""
    objective = Objective(_largest, _largest)
    walk = Walk(lambda logits, feature: dict.fromkeys(chosen, objective), _ATTACK)
    replayed, plain = _Gradients(), _Gradients()
    try:
        if state is not None:
            state.restore()
        expected = walk_plain(net, x, chosen, walk, plain)
    except (RuntimeError, ValueError) as error:  # autograd refuses what a record can do without, as out=
        if is_out_of_memory(error):
            raise
        return ""
    try:
        logits = walk_splits(Tape(net, chosen, state), x, walk, replayed, budget)
    except ReplayError as error:
        return str(error)
    tolerance = _TOLERANCE.get(logits.dtype, 0.1)
    if not _close(logits.cpu().double(), expected.logits.cpu().double(), tolerance):
        return "its logits differ when they are recorded"
    for site in chosen:
        if site in expected.cut_off:  # a stem under no_grad: the record knows better, see `no_grad`
            continue
        for i, (found, right) in enumerate(zip(replayed.found[site], plain.found[site], strict=True), 1):
            if not _close(found, right, tolerance):
                return f"gradient {i} at {site.name!r} is another one when several copies are computed at once"
    return ""


def _close(found: Tensor, right: Tensor, tolerance: float) -> bool:
    difference = (found - right).nan_to_num(0.0, 0.0, 0.0)
    return found.shape == right.shape and float(difference.norm()) <= tolerance * float(right.nan_to_num().norm())
