"""What is timed, and what it should cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openood_sandi import SandI

from .loops import Options, SplitLoop
from .networks import Network

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
class Goal:
    """The most that a method should cost.

    Attributes:
        forwards: time over that of a plain forward pass.
        of_arithmetic: time in forwards over floating point operations in forwards.
        memory: peak memory over that of a forward pass that keeps its activations.
        of_msp: the least share of MSP's images/s, at the largest batch on a GPU.
    """

    forwards: float | None = None
    of_arithmetic: float | None = None
    memory: float | None = None
    of_msp: float | None = None


@dataclass(frozen=True)
class Method:
    """One row of the table for each network.

    Attributes:
        kind: what runs: a forward pass without and with a graph, MSP, SandI with and without its rectifier shortcut,
            the naive and the released loop of :mod:`.loops`.
        options: what of S&I is computed.
        slow: whether it is timed on a small batch for a few turns.
    """

    kind: Literal["forward", "kept", "msp", "sandi", "exact", "naive", "released"]
    options: Options | None = None
    goal: Goal = Goal()
    slow: bool = False

    def applies(self, network: Network) -> bool:
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


METHODS: dict[str, Method] = {
    "forward": Method("forward"),
    "kept": Method("kept"),
    "msp": Method("msp"),
    "gaia-z": Method("sandi", Options("Z", steps=1), Goal(forwards=1.3)),
    "sandi-z-union": Method("sandi", Options("Z", combine="union"), Goal(forwards=1.3, memory=2.5)),
    "sandi-z": Method("sandi", Options("Z"), Goal(forwards=3.5, memory=2.5, of_msp=0.25)),
    "sandi-z-intersection": Method("sandi", Options("Z", combine="intersection"), Goal(forwards=3.5, memory=2.5)),
    "sandi-z-exact": Method("exact", Options("Z"), slow=True),
    "naive-z": Method("naive", Options("Z"), slow=True),
    "released-z": Method("released", Options("Z"), slow=True),
    "sandi-z-t5": Method("sandi", Options("Z", steps=5), Goal(of_arithmetic=1.3), slow=True),
    "gaia-a": Method("sandi", Options("A", steps=1, top_fraction=1.0), Goal(forwards=1.6)),
    "sandi-a": Method("sandi", Options("A"), Goal(forwards=2.5, of_msp=0.4)),
    "naive-a": Method("naive", Options("A"), slow=True),
    "released-a": Method("released", Options("A"), slow=True),
}
