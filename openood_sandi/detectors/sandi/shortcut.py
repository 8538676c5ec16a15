"""Densities of S&I-Z with as few gradients as tell them: none, that of the step, or all along every path.

Where splits feed rectifiers (:mod:`.rectifiers`), their patterns of gradients are read off these. That is
checked against true gradients, on some images, before it is relied on and as it goes; what is in doubt is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openood_sandi.detectors.sandi.densities import NonZeroDensity
from openood_sandi.detectors.sandi.masks import Gates
from openood_sandi.detectors.sandi.rectifiers import Certificate, Gate, find_certificate, find_gates
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.splits import RecordedNetwork, Split
from openood_sandi.engine.tape import Site

__all__ = ["ZScorer"]

_log = logging.getLogger(__name__)

# Gates are compared with true gradients on images of the first batch (on all, where that takes one backward pass) and
# on some more every so many. Between these, the zeros of each batch's step gradient are looked at (`walk_splits`).
_FIRST_CHECK = 4
_LATER_CHECK = 1
_CHECK_EVERY = 1024
# A sum of products is exactly zero by accident now and then: seen once in 5e8 positions in float32.
_COINCIDENCE = 1e-6

Walk = Callable[[Tensor, Sequence[Split], Attack, NonZeroDensity, Gates], tuple[Tensor, dict[Site, Tensor], bool]]
"""Walks the paths of the splits on images (B, C, H, W) and returns the logits, the images (B,) in doubt at each gate,
and whether the network made the recorded calls."""


class ZScorer:
    """Scores batches, and remembers between them which gates have turned out to tell the truth.

    Args:
        splits: the split points.
        attack: the paths.
        combine: how Eq. 11 goes over the gradients.
        walk: what does the work.
        shortcut: the recorded pass to look for gates in; None computes every gradient.
    """

    def __init__(
        self, splits: Sequence[Split], attack: Attack, combine: str, walk: Walk, shortcut: RecordedNetwork | None
    ) -> None:
        self._splits, self._attack, self._combine, self._walk = splits, attack, combine, walk
        self._calls: tuple[str, ...] = ()
        self._certificate: Certificate | None = None
        self._candidates: dict[Site, Gate] = {}
        self.gates: dict[Site, Gate] | None = None
        """Those relied on; None before the first check."""
        self.forward_suffices = False
        """Whether the gates tell all there is to know about their splits from a forward pass."""
        self._mostly_untold = False
        self._unchecked = -1
        # Only g_1 and g_2 need no pass through the suffixes.
        if shortcut is not None and (attack.steps <= 2 or combine == "union"):
            self._find_gates(shortcut)

    def densities(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, classes) and E (B, K) by split name, from a forward pass alone for the images where that tells."""
        if not (self.gates and self.forward_suffices) or self._mostly_untold:
            return self._with_gradients(x)
        read = self._read(x, self._splits, self.gates, steps=1)
        if read is None:
            return self._with_gradients(x)
        logits, found, doubtful = read
        untold = list(doubtful.values())[:1]  # no certificate, which is the same at every gate
        if self._attack.steps > 1:  # without a gate, g_1 tells the union where it is nowhere zero
            untold += [(found[split.name] < 1).any(1) for split in self._splits if split.site not in self.gates]
        if untold:
            images = torch.stack(untold).any(0)
            self._mostly_untold = 2 * int(images.sum()) > len(x)
            rows = (images & logits.isfinite().all(1)).nonzero()[:, 0]
            if len(rows):
                _, computed = self._with_gradients(x[rows])
                for name, density in computed.items():
                    found[name][rows] = density
        return logits, found

    def check(self, x: Tensor, parts: Callable[[Tensor], Iterable[Tensor]]) -> None:
        """Compares the patterns that gates tell with those of gradients: on the first batch, and now and then.

        Args:
            x: the batch (B, C, H, W) that comes next.
            parts: cuts images to what fits in memory.
        """
        if 0 <= self._unchecked < _CHECK_EVERY:
            self._unchecked += len(x)
            return
        first = self.gates is None
        gates = dict(self._candidates if self.gates is None else self.gates)
        splits = [split for split in self._splits if split.site in gates]
        few = (_FIRST_CHECK if self._attack.steps > 1 else len(x)) if first else _LATER_CHECK
        differing, compared = dict.fromkeys(gates, 0.0), 0
        for part in parts(x[:few]) if splits else ():
            read = self._read(part, splits, gates, 1 if self.forward_suffices else 2)
            if read is None:
                continue
            logits, found, doubtful = read
            _, exact = self._exact(part, splits)
            rows = logits.isfinite().all(1)
            if self.forward_suffices:
                for mask in doubtful.values():
                    rows &= ~mask
            compared += int(rows.sum())
            for split in splits:
                difference = (found[split.name] - exact[split.name])[rows].abs()
                differing[split.site] += float(difference.sum()) / found[split.name].shape[1]
        self._unchecked, self._mostly_untold = len(x), False
        if splits and first and not compared:
            return  # these images cannot tell; later ones may
        for split in splits:
            share = differing[split.site] / max(compared, 1)
            if share > _COINCIDENCE:
                _give_up(gates, split, share, relied=not first)
        self.gates = gates

    def _find_gates(self, found: RecordedNetwork) -> None:
        """The gates worth having: where one forward pass tells g_1, or one backward pass more g_2."""
        gates = find_gates(found.calls, found.positions(self._splits))
        self._calls, self._certificate = found.call_names, find_certificate(found.calls)
        # The union of a rectifier's patterns is the first one; that of a max-pool's is not.
        union = self._combine == "union" and all(gate.rectifier.pool is None for gate in gates.values())
        self.forward_suffices = self._certificate is not None and (self._attack.steps == 1 or union)
        if self.forward_suffices or self._attack.steps == 2:
            self._candidates = gates

    def _with_gradients(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with gradients: for two steps with that of the step alone, where its zeros are those of the gate."""
        read = self._read(x, self._splits, self.gates, steps=2) if self.gates and self._attack.steps == 2 else None
        if read is None:
            return self._exact(x, self._splits)
        logits, found, doubtful = read
        if doubtful:
            splits = [split for split in self._splits if split.site in doubtful]
            rows = (torch.stack(list(doubtful.values())).any(0) & logits.isfinite().all(1)).nonzero()[:, 0]
            if len(rows):
                _, exact = self._exact(x[rows], splits)
                for split in splits:
                    share = float((found[split.name][rows] - exact[split.name]).abs().sum()) / found[split.name].numel()
                    found[split.name][rows] = exact[split.name]
                    if share > _COINCIDENCE and self.gates:
                        _give_up(self.gates, split, share)
        return logits, found

    def _exact(self, x: Tensor, splits: Sequence[Split]) -> tuple[Tensor, dict[str, Tensor]]:
        """Every gradient computed."""
        read = self._read(x, splits, {}, self._attack.steps)
        assert read is not None
        return read[:2]

    def _read(
        self, x: Tensor, splits: Sequence[Split], gates: Mapping[Site, Gate], steps: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[Site, Tensor]] | None:
        """Logits, densities with the patterns at ``gates`` read off, and images (B,) where these do not tell.

        With ``steps`` = 1 they are those of g_1, which at a gate is all of the union; with 2, the gates tell g_2 too.
        None if the network made other calls than recorded: gates are places on that tape.
        """
        at = {split.site: gates[split.site] for split in splits if split.site in gates}
        attack = replace(self._attack, steps=1) if at and steps == 1 else self._attack
        density = NonZeroDensity(splits, attack.steps, self._combine)
        given = Gates(at, steps, self._certificate, self._calls, density.pattern)
        logits, doubtful, same_calls = self._walk(x, splits, attack, density, given)
        return None if at and not same_calls else (logits, density.densities(), doubtful)


def _give_up(gates: dict[Site, Gate], split: Split, share: float, relied: bool = False) -> None:
    """``relied``: scores of earlier images were read off the gate."""
    if gates.pop(split.site, None) is not None:
        _log.log(
            logging.WARNING if relied else logging.INFO,
            "the gradient at %s has zeros that its rectifier does not explain (%.2g of all positions); "
            "computing it from now on%s",
            split.name,
            share,
            "; earlier scores may be off by as much: rectifier_shortcut=False computes all" if relied else "",
        )
