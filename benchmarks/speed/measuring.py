"""What is timed: one method on one network, its cost, counts, and agreement with the naive loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from comparison.cost import measure
from comparison.environment import free_memory
from torch import Tensor, nn

from openood_sandi import SandI

from .instrument import Counts, count
from .loops import SandIOptions, SplitLoop
from .networks import TimedNetwork

Job = Callable[[Tensor], object]
"""Takes images (B, C, H, W)."""


@dataclass(frozen=True)
class TimedMethod:
    """One row of the table for each network.

    Attributes:
        kind: what runs: a forward pass without and with a graph, MSP, SandI with and without its rectifier shortcut,
            its bounds, its decisions (where bounds are proved, and by their estimates as well), the naive and the
            released loop of :mod:`.loops`.
        options: what of S&I is computed.
        slow: whether it is timed on a small batch for a few turns.
    """

    kind: Literal["forward", "kept", "msp", "sandi", "exact", "bounds", "decisions", "estimates", "naive", "released"]
    options: SandIOptions | None = None
    slow: bool = False

    def applies(self, network: TimedNetwork) -> bool:
        """Whether the network uses this variant of S&I."""
        return self.options is None or self.options.variant == network.variant

    def job(self, net: nn.Module, splits: Sequence[str], feature: str | None) -> Job | SandI | SplitLoop:
        """The method at work on ``net``; of S&I, an object that also tells its densities."""
        if self.kind == "forward":
            return torch.no_grad()(net.forward)
        if self.kind == "kept":
            return net
        if self.kind == "msp":  # Hendrycks and Gimpel, ICLR 2017: the detector that costs a forward pass
            return torch.no_grad()(lambda images: net(images).softmax(dim=1).max(dim=1))
        assert self.options is not None
        if self.kind in ("naive", "released"):
            return SplitLoop(net, splits, self.options, feature=feature, released=self.kind == "released")
        detector = SandI(
            net,
            splits=list(splits),
            feature=feature or "auto",
            rectifier_shortcut=self.kind != "exact",
            **asdict(self.options),
        )
        if self.kind == "bounds":
            return detector.bounds
        if self.kind in ("decisions", "estimates"):
            return Decisions(detector, hard=self.kind == "decisions")
        return detector


class Decisions:
    """``detector.is_ood`` at the threshold that 95 % of the first batch's images are below, by the middle of bounds."""

    def __init__(self, detector: SandI, hard: bool) -> None:
        self._detector, self._hard = detector, hard

    def __call__(self, images: Tensor) -> Tensor:
        """Whether each of the images (B, C, H, W) is OOD, (B,)."""
        if self._detector.threshold is None:
            self._detector.threshold = float(self._detector.bounds(images).middle.quantile(0.95))
        return self._detector.is_ood(images, self._hard)


Z, A = SandIOptions("Z"), SandIOptions("A")
METHODS: dict[str, TimedMethod] = {
    "forward": TimedMethod("forward"),
    "kept": TimedMethod("kept"),
    "msp": TimedMethod("msp"),
    "gaia-z": TimedMethod("sandi", SandIOptions("Z", steps=1)),
    "sandi-z-union": TimedMethod("sandi", SandIOptions("Z", combine="union")),
    "sandi-z": TimedMethod("sandi", Z),
    "sandi-z-intersection": TimedMethod("sandi", SandIOptions("Z", combine="intersection")),
    "bounds-z": TimedMethod("bounds", Z),
    "bounds-z-t5": TimedMethod("bounds", SandIOptions("Z", steps=5)),
    "decisions-z": TimedMethod("decisions", Z),
    "decisions-z-estimates": TimedMethod("estimates", Z),
    "sandi-z-exact": TimedMethod("exact", Z, slow=True),
    "naive-z": TimedMethod("naive", Z, slow=True),
    "released-z": TimedMethod("released", Z, slow=True),
    "sandi-z-t5": TimedMethod("sandi", SandIOptions("Z", steps=5), slow=True),
    "gaia-a": TimedMethod("sandi", SandIOptions("A", steps=1, top_fraction=1.0)),
    "sandi-a": TimedMethod("sandi", A),
    "naive-a": TimedMethod("naive", A, slow=True),
    "released-a": TimedMethod("released", A, slow=True),
}


CHECKED = 2
"""How many images the naive loop's scores are compared on."""
SLOW_BATCH = 2
"""Batch size of slow methods on a CPU."""


@dataclass(frozen=True)
class Setting:
    """How everything in a run is timed; ``turns`` are those of a method that is not slow."""

    device: torch.device
    turns: int
    clock: Callable[[], float]
    seed: int = 0
    width: float = 1.0
    splits: str = "paper"

    def batch_sizes(self, method: str, wanted: list[int]) -> list[int]:
        """Those of ``wanted`` that the method is timed with; a small one for slow methods on a CPU."""
        if METHODS[method].slow and self.device.type == "cpu":
            return [min(SLOW_BATCH, *wanted)]
        return wanted

    def turns_of(self, method: str) -> int:
        """How often the method is timed."""
        return min(self.turns, max(3, self.turns // 3)) if METHODS[method].slow else self.turns


class Bench:
    """One network on one device, measured method by method."""

    def __init__(self, name: str, network: TimedNetwork, setting: Setting) -> None:
        self._name, self._network, self._setting = name, network, setting
        self._net = network.build(setting.width, setting.seed).to(setting.device)
        self._splits = network.splits(self._net, setting.splits)
        self._plain: dict[int, tuple[Counts, Counts]] = {}
        self._expected: dict[SandIOptions, dict[str, Tensor]] = {}

    def measure(self, method: str, batch: int) -> dict[str, Any]:
        """A row of the table: the ``method`` on ``batch`` images, quartiles being those of the ratios of single turns.

        Floating point operations ``flops`` are in plain forward passes. ``peak_of_kept`` is the peak memory over that
        of a forward pass that keeps its activations for a backward pass, ``peak_of_free`` over what was free before;
        ``differing_counts`` and ``score_difference`` are those of :func:`differences` from the naive loop.
        """
        setting, images = self._setting, self._images(batch)
        job = METHODS[method].job(self._net, self._splits, self._network.architecture.paper_feature)
        turns = setting.turns_of(method)
        cost = measure(self._net, job, images, turns=turns, clock=setting.clock)
        free = free_memory(setting.device)
        counts = count(lambda: job(images), setting.device)
        forward, kept = self._plain_counts(batch)
        differing_counts, score_difference = self._agreement(method, job)
        return {
            "network": self._name,
            "splits": len(self._splits),
            "method": method,
            "batch": batch,
            "turns": turns,
            **cost.columns(),
            "flops": counts.flops / forward.flops,
            "launches": counts.launches,
            "peak_bytes": counts.peak_bytes,
            "peak_of_kept": counts.peak_bytes / kept.peak_bytes,
            "peak_of_free": counts.peak_bytes / free,
            "differing_counts": differing_counts,
            "score_difference": score_difference,
        }

    def _images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._setting.seed)
        size = self._network.image_size
        return torch.randn(batch, 3, size, size, generator=generator).to(self._setting.device)

    def _plain_counts(self, batch: int) -> tuple[Counts, Counts]:
        """Of a forward pass without a graph, and with the one that the parameters' gradients need."""
        if batch not in self._plain:
            images = self._images(batch)
            with torch.no_grad():
                forward = count(lambda: self._net(images), self._setting.device)
            self._plain[batch] = forward, count(lambda: self._net(images), self._setting.device)
        return self._plain[batch]

    def _agreement(self, method: str, job: Job | SandI | SplitLoop) -> tuple[int | None, float | None]:
        """Differences from the naive loop with the same options, on a few images."""
        options = METHODS[method].options
        if options is None or METHODS[method].kind == "naive" or not isinstance(job, (SandI, SplitLoop)):
            return None, None
        images = self._images(CHECKED)
        if options not in self._expected:
            loop = SplitLoop(self._net, self._splits, options, feature=self._network.architecture.paper_feature)
            self._expected[options] = loop.densities(images)
        return differences(job.densities(images), self._expected[options], options.variant)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor], variant: str) -> tuple[int | None, float]:
    """How many densities differ (Z, where they are counts over a number of positions), and tau at most, relatively."""
    ours = torch.cat([found[split] for split in expected], dim=1)
    theirs = torch.cat(list(expected.values()), dim=1)
    # Densities are fractions of integers: unequal ones are further apart than rounding in float64.
    differing = int(((ours - theirs).abs() > 1e-9).sum()) if variant == "Z" else None
    tau = theirs.square().sum(1).sqrt()
    return differing, float(((ours.square().sum(1).sqrt() - tau) / tau).abs().max())
