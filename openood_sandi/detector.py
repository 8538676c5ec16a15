"""S&I as a detector: a network and options in, predictions and out-of-distribution scores out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from openood_sandi import checks
from openood_sandi.attack import Attack
from openood_sandi.errors import ReplayError
from openood_sandi.memory import free_memory
from openood_sandi.objectives import Plan, ascended, channel_average_plan, logits_plan
from openood_sandi.paths import Gates, Observer, walk_input, walk_splits
from openood_sandi.rectifiers import Certificate, Gate, find_certificate, find_gates
from openood_sandi.replay import Site, Tape
from openood_sandi.splitting import Split, Survey, survey
from openood_sandi.statistics import AttributionMaps, ChannelAverage, NonZeroDensity, score

__all__ = ["SandI"]

_log = logging.getLogger(__name__)

# Gates are compared with true gradients on images of the first batch (on all, where that takes one backward pass) and
# on some more every so many. Between these, the zeros of each batch's step gradient are looked at (`walk_splits`).
_FIRST_CHECK = 4
_LATER_CHECK = 1
_CHECK_EVERY = 1024
# A sum of products is exactly zero by accident now and then: seen once in 5e8 positions in float32.
_COINCIDENCE = 1e-6


class SandI:
    """The S&I out-of-distribution detector (Zhang et al., "Splitting & Integrating", ICML 2025) for one network.

    ``pred, tau = SandI(net)(x)``: the predicted class and the score of Eq. 14, larger for out-of-distribution inputs.
    The network is used as it is: nothing is trained, and its mode, flags, hooks and buffers are left as found.

    Args:
        net: a classifier in eval mode that maps images (B, C, H, W) to logits (B, classes). ``DataParallel``,
            ``DistributedDataParallel`` and ``torch.compile`` wrappers are looked through.
        variant: "Z", the density of non-zero gradients (Eq. 11), "A", channel averages (Eq. 12-13), or "auto": Z up to
            100 classes, A above, as the paper does.
        splits: the split points: "all" (every normalisation layer), "last_stage" (those of the last stage), module
            names and globs such as "layer4.*", as a list or separated by commas. "name#2" is the second call of
            a module. "auto" is "all" for Z and "last_stage" for A. Networks without normalisation layers are
            split at the inputs of their activations.
        feature: A's feature map F: a module's name, or "auto" for the last spatial one.
        steps: T, the number of gradients taken along each path; 1 is GAIA (Chen et al., NeurIPS 2023).
        step_size: eta of Eq. 9.
        epsilon: the radius of Eq. 4's L2 ball; infinite, the default, for none.
        combine: Z over the T gradients: "count" the non-zero ones, or the "union" or "intersection" of positions.
        attribution: L_attr, whose gradient is attributed by Z and :meth:`explain`: "max_logit" or "cross_entropy".
        ascent: L_step, which the path ascends: "cross_entropy" of the class predicted on the clean input, or
            "max_logit"; with the latter A ascends the function that it attributes, as the released code does.
        top_fraction: the "top 90 %" of Eq. 12, at least one.
        top_over: of what: "channels" of F, by the gradient of the summed logits, as released; or "labels", by logit, as
            the paper words it: log-softmax is then summed over those labels, and F over all channels.
        splitting: False attacks the input instead of every split (the paper's ablation without layer splitting).
        rectifier_shortcut: whether Z may read the pattern of gradients off a rectifier's mask where the two were seen
            to agree (up to two steps, or "union"; see :mod:`openood_sandi.rectifiers`); False computes every gradient.
        memory_fraction: the share of the device's free memory that a batch's replays may plan for.

    Raises:
        ValueError, TypeError: for an option out of range, or split points that the network does not have.
        ReplayError: where the network cannot be split; the message says where and what to do.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        variant: str = "auto",
        splits: str | Sequence[str] = "auto",
        feature: str = "auto",
        steps: int = 2,
        step_size: float = 1e-3,
        epsilon: float = math.inf,
        combine: str = "count",
        attribution: str = "max_logit",
        ascent: str = "cross_entropy",
        top_fraction: float = 0.9,
        top_over: str = "channels",
        splitting: bool = True,
        rectifier_shortcut: bool = True,
        memory_fraction: float = 0.5,
    ) -> None:
        checks.require_choice(
            variant=variant, combine=combine, attribution=attribution, ascent=ascent, top_over=top_over
        )
        checks.require_count(steps=steps)
        checks.require_positive(step_size=step_size, epsilon=epsilon)
        checks.require_share(top_fraction=top_fraction, memory_fraction=memory_fraction)
        self.net = checks.eager_network(net)
        self.variant, self.combine, self.top_fraction, self.top_over = variant, combine, top_fraction, top_over
        self.attribution, self.ascent, self.splitting = attribution, ascent, splitting
        self.attack = Attack(steps, step_size, epsilon)
        self.memory_fraction = memory_fraction
        self._wanted_splits, self._wanted_feature = splits, feature
        self._splits: tuple[Split, ...] | None = None
        self._feature: Split | None = None
        self._rectifier_shortcut = rectifier_shortcut
        self._candidate_gates: dict[Site, Gate] = {}
        self._certificate: Certificate | None = None
        self._forward_suffices = False
        self._gates: dict[Site, Gate] | None = None
        self._call_names: tuple[str, ...] = ()
        self._unchecked = 0
        self._bytes_per_pixel = 0.0

    # ------------------------------------------------------------------ public

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes and scores of a batch.

        Args:
            x: images (B, C, H, W) as the network expects them, on its device.

        Returns:
            ``pred`` (B,) int64 and ``tau`` (B,) in the logits' dtype: Eq. 14, larger = more out-of-distribution. An
            image whose logits are not finite has tau = NaN.
        """
        logits, densities = self._score(x)
        tau = score(densities, logits.dtype)
        return logits.argmax(1), tau.masked_fill(~logits.isfinite().all(1), math.nan)

    def densities(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: E (B, K)}, Eq. 11 for Z or Eq. 13 for A, in float64, for images ``x`` (B, C, H, W)."""
        return self._score(x)[1]

    def explain(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: (B, R, S)}: the maps A_j of Eq. 10 (of L_attr on the logits), summed over channels."""
        with self._ready(x) as (parts, splits, _):
            return _joined([self._explain_part(part, splits) for part in parts])

    @property
    def split_names(self) -> tuple[str, ...]:
        """The split points in call order; known after the first batch."""
        if self._splits is None:
            raise RuntimeError("the split points are found on the first batch; score one first")
        return tuple(split.name for split in self._splits)

    # ------------------------------------------------------------------ scoring

    def _score(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self._ready(x) as (parts, splits, feature):
            scored = [self._score_part(part, splits, feature) for part in parts]
        return torch.cat([logits for logits, _ in scored]), _joined([densities for _, densities in scored])

    def _explain_part(self, x: Tensor, splits: Sequence[Split]) -> dict[str, Tensor]:
        observer = AttributionMaps(splits)
        self._walk(x, splits, None, logits_plan(splits, self.attribution, self.ascent), observer, Gates())
        return observer.maps()

    def _score_part(
        self, x: Tensor, splits: Sequence[Split], feature: Split | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if feature is not None:
            average = ChannelAverage(splits, feature, self.attack.steps)
            plan = channel_average_plan(splits, feature, self.ascent, self.top_fraction, self.top_over)
            logits, _, _ = self._walk(x, (*splits, feature), feature.site, plan, average, Gates())
            return logits, average.densities()
        if self._gates is None:
            self._gates = self._checked(
                dict(self._candidate_gates), x[: _FIRST_CHECK if self.attack.steps > 1 else None]
            )
        elif self._unchecked >= _CHECK_EVERY:
            self._gates = self._checked(self._gates, x[:_LATER_CHECK]) or self._gates
        self._unchecked += len(x)
        logits, densities, _ = self._score_z(x, splits, self._gates or {})
        return logits, densities

    def _score_z(
        self, x: Tensor, splits: Sequence[Split], gates: dict[Site, Gate]
    ) -> tuple[Tensor, dict[str, Tensor], bool]:
        """Logits, densities of Z, and whether the patterns at the ``gates`` could be read off their rectifiers."""
        density = NonZeroDensity(splits, self.attack.steps, self.combine)
        at = {split.site: gates[split.site] for split in splits if split.site in gates}
        given = Gates(at, 1 if self._forward_suffices else self.attack.steps, self._certificate, density.pattern)
        plan = logits_plan(splits, self.attribution, self.ascent)
        logits, doubtful, same_calls = self._walk(x, splits, None, plan, density, given)
        # Gates are places on the tape of the first batch, and a forward pass alone needs its certificate.
        if at and (not same_calls or (doubtful and self._forward_suffices)):
            logits, found, _ = self._score_z(x, splits, {})
            return logits, found, False
        found = density.densities()
        if doubtful:
            found |= self._settle(gates, [split for split in splits if split.site in doubtful], x, found)
        return logits, found, True

    def _find_gates(self, found: Survey, splits: Sequence[Split]) -> None:
        """The gates worth having: where one forward pass tells g_1, or one backward pass more g_2."""
        gates = find_gates(found.calls, found.positions(splits))
        self._certificate = find_certificate(found.calls)
        # The union of a rectifier's patterns is the first one; that of a max-pool's is not.
        union = self.combine == "union" and all(gate.pool is None for gate in gates.values())
        self._forward_suffices = self._certificate is not None and (self.attack.steps == 1 or union)
        if self._forward_suffices or self.attack.steps == 2:
            self._candidate_gates = gates

    def _shortcut_applies(self) -> bool:
        """Only g_1 and g_2 need no pass through the suffixes; a saturated cross-entropy has g = 0 anywhere."""
        few = self.attack.steps <= 2 or self.combine == "union"
        return self._rectifier_shortcut and few and self.splitting and self.attribution == "max_logit"

    def _checked(self, gates: dict[Site, Gate], x: Tensor) -> dict[Site, Gate] | None:
        """Those of the ``gates`` that tell the pattern of the true gradients on ``x``; None if ``x`` cannot tell."""
        self._unchecked = 0
        assert self._splits is not None
        splits = [split for split in self._splits if split.site in gates]
        if splits:
            _, found, read = self._score_z(x, splits, gates)
            if not read:
                return None
            self._settle(gates, splits, x, found)
        return gates

    def _settle(
        self, gates: dict[Site, Gate], splits: Sequence[Split], x: Tensor, found: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The exact densities on ``x``; gates that ``found`` others, by more than rounding explains, are given up."""
        _, exact, _ = self._score_z(x, splits, {})
        for split in splits:
            differing = float((found[split.name] - exact[split.name]).abs().mean())
            if differing > _COINCIDENCE and gates.pop(split.site, None) is not None:
                _log.info(
                    "the gradient at %s has zeros that its rectifier does not explain (%.2g of all positions); "
                    "computing it from now on",
                    split.name,
                    differing,
                )
        return exact

    def _walk(
        self, x: Tensor, splits: Sequence[Split], feature: Site | None, plan: Plan, observer: Observer, gates: Gates
    ) -> tuple[Tensor, list[Site], bool]:
        """Logits, gates in doubt, and whether the network made the calls that it made in the survey."""
        tape = Tape(self.net, [split.site for split in splits])
        doubtful: list[Site] = []
        if self.splitting:
            budget = self._budget(x) // 2
            logits, doubtful = walk_splits(tape, x, feature, plan, self.attack, observer, budget, gates)
        else:
            logits = walk_input(tape, x, feature, plan, partial(ascended, self.ascent), self.attack, observer)
        same_calls = tape.call_names == self._call_names
        if not same_calls and any(split.site.module is None for split in splits):
            raise ReplayError(
                "this batch takes the network through other calls than the first one did, so its split points at "
                "functional calls cannot be found again; use one SandI for each image size, or name modules in splits"
            )
        return logits, doubtful, same_calls

    # ------------------------------------------------------------------ the network

    @contextmanager
    def _ready(self, x: Tensor) -> Iterator[tuple[tuple[Tensor, ...], tuple[Split, ...], Split | None]]:
        """The batch in parts that fit in memory, the split points and F, with parameters frozen, gradients enabled."""
        checks.require_images(x)
        checks.require_eval(self.net)
        trainable = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x.detach()
            try:
                for parameter in trainable:
                    parameter.requires_grad_(False)
                if self._splits is None:
                    self._find_splits(x[:2])
                assert self._splits is not None
                yield torch.split(x, self._part_size(x)), self._splits, self._feature
            finally:
                for parameter in trainable:
                    parameter.requires_grad_(True)

    def _part_size(self, x: Tensor) -> int:
        """How many images half the memory budget holds through a recorded pass; the other half is for replays."""
        image = 3 * self._bytes_per_pixel * x[0].numel()  # results, what autograd saves beside them, gradients
        return max(1, int(self._budget(x) / 2 / image))

    def _budget(self, x: Tensor) -> int:
        return int(self.memory_fraction * free_memory(x.device))

    def _find_splits(self, x: Tensor) -> None:
        found, recorded = survey(self.net, x)
        with torch.no_grad():
            plain = self.net(x)
        checks.require_logits(plain)
        checks.require_same(plain, recorded)
        uses_feature = self.variant == "A" or (self.variant == "auto" and recorded.shape[1] > 100)
        splits = found.splits(self._wanted_splits, default="last_stage" if uses_feature else "all")
        if uses_feature:
            self._feature = found.feature(self._wanted_feature)
            splits = found.before(self._feature, splits, self._wanted_splits)
        elif self._shortcut_applies():
            self._find_gates(found, splits)
        self._call_names = found.call_names
        self._bytes_per_pixel = found.size / x.numel()
        self._splits = splits


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of a batch as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
