"""What is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openood_sandi import SandI

from .loops import SandIOptions, SplitLoop
from .networks import TimedNetwork

Job = Callable[[Tensor], object]
"""Takes images (B, C, H, W)."""


def msp(net: nn.Module) -> Job:
    """Maximum softmax probability (Hendrycks and Gimpel, ICLR 2017), the detector that costs a forward pass."""

    @torch.no_grad()
    def score(images: Tensor) -> tuple[Tensor, Tensor]:
        confidence, pred = net(images).softmax(dim=1).max(dim=1)
        return pred, -confidence

    return score


@dataclass(frozen=True)
class TimedMethod:
    """One row of the table for each network.

    Attributes:
        kind: what runs: a forward pass without and with a graph, MSP, SandI with and without its rectifier shortcut,
            the naive and the released loop of :mod:`.loops`.
        options: what of S&I is computed.
        slow: whether it is timed on a small batch for a few turns.
    """

    kind: Literal["forward", "kept", "msp", "sandi", "exact", "naive", "released"]
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
        if self.kind == "msp":
            return msp(net)
        assert self.options is not None
        if self.kind in ("naive", "released"):
            return SplitLoop(net, splits, self.options, feature=feature, released=self.kind == "released")
        return SandI(
            net,
            splits=list(splits),
            feature=feature or "auto",
            rectifier_shortcut=self.kind == "sandi",
            **asdict(self.options),
        )


Z, A = SandIOptions("Z"), SandIOptions("A")
METHODS: dict[str, TimedMethod] = {
    "forward": TimedMethod("forward"),
    "kept": TimedMethod("kept"),
    "msp": TimedMethod("msp"),
    "gaia-z": TimedMethod("sandi", SandIOptions("Z", steps=1)),
    "sandi-z-union": TimedMethod("sandi", SandIOptions("Z", combine="union")),
    "sandi-z": TimedMethod("sandi", Z),
    "sandi-z-intersection": TimedMethod("sandi", SandIOptions("Z", combine="intersection")),
    "sandi-z-exact": TimedMethod("exact", Z, slow=True),
    "naive-z": TimedMethod("naive", Z, slow=True),
    "released-z": TimedMethod("released", Z, slow=True),
    "sandi-z-t5": TimedMethod("sandi", SandIOptions("Z", steps=5), slow=True),
    "gaia-a": TimedMethod("sandi", SandIOptions("A", steps=1, top_fraction=1.0)),
    "sandi-a": TimedMethod("sandi", A),
    "naive-a": TimedMethod("naive", A, slow=True),
    "released-a": TimedMethod("released", A, slow=True),
}
