"""One forward pass a batch for all methods that read logits, penultimate features, or the means of stages."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from openood_sandi import SandIC
from openood_sandi.detectors.sandi.calibrated_summary import Summary
from openood_sandi.engine.features import Penultimate, hooked, pooled, stages

from ..environment import free_memory

SHARE = 0.25
"""Of the free memory, what passes may take; batches that do not fit are computed for each method."""


@dataclass(frozen=True)
class Pass:
    """Of a batch: F (B, D), the last layer's input, if that is linear; logits (B, C); stages' means (B, channels)."""

    features: Tensor | None
    logits: Tensor
    means: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        kept = (self.features, self.logits, *self.means.values())
        return sum(tensor.nbytes for tensor in kept if tensor is not None)


class SharedPass:
    """What ``net`` computes of images (B, C, H, W), once for each batch; the batch is known by its content."""

    keeping = True
    latest: ClassVar[SharedPass | None] = None
    """Of the network that is compared on now: those before have been forgotten."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.net = net
        self.penultimate: Penultimate | None = Penultimate(net)
        try:
            self.penultimate.head(x)
        except ValueError:  # only logits are shared
            self.penultimate = None
        self.stages: tuple[str, ...] = ()
        with contextlib.suppress(ValueError), torch.no_grad():  # a network without stages has none to share
            names = stages(net, x)
            with pooled(net, names) as means:
                net(x)
            self.stages = tuple(name for name in names if name in means)
        self._known: dict[bytes, Pass] = {}
        self._free = SHARE * free_memory(x.device)

    @classmethod
    def of(cls, net: nn.Module, x: Tensor) -> SharedPass:
        """That of the network, the same for all who ask; ``x`` is a batch of images, to find its layers with."""
        if cls.latest is None or cls.latest.net is not net:
            if cls.latest is not None:
                cls.latest.forget()
            cls.latest = cls(net, x)
        return cls.latest

    def forget(self) -> None:
        """Give the memory back, and keep nothing from now on."""
        self._known, self._free = {}, 0

    def __call__(self, x: Tensor) -> Pass:
        if not self.keeping:
            return self._computed(x)
        key = _digest(x)
        return self._known[key] if key in self._known else self._kept(key, self._computed(x))

    @contextlib.contextmanager
    def of_another_pass(self, x: Tensor) -> Iterator[None]:
        """Keeps what the network computes of ``x`` in the block, where another than the methods above passes it."""
        seen: dict[str, Tensor] = {}

        def see(name: str, given: Tensor, output: Tensor) -> None:
            seen["logits" if name == "net" else "features"] = (output if name == "net" else given.flatten(1)).clone()

        head = {"head": self.penultimate.head(x).module} if self.penultimate else {}
        with pooled(self.net, self.stages) as means, hooked({"net": self.net, **head}, see):
            yield
        if self.keeping and len(seen["logits"]) == len(x):
            self._kept(_digest(x), Pass(seen.get("features"), seen["logits"], dict(means)))

    def _kept(self, key: bytes, found: Pass) -> Pass:
        if key not in self._known and found.nbytes <= self._free:
            self._free -= found.nbytes
            self._known[key] = found
        return found

    @torch.no_grad()
    def _computed(self, x: Tensor) -> Pass:
        with pooled(self.net, self.stages) as means:
            features, logits = self.penultimate(x) if self.penultimate else (None, self.net(x))
        return Pass(features, logits, dict(means))


def _digest(x: Tensor) -> bytes:
    """Of what is in a tensor."""
    content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode() + content.tobytes()).digest()


class SharedNetwork(nn.Module):
    """``net`` for the methods that read its logits or penultimate features: its last layer alone is computed anew."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self._shared = SharedPass.of(net, x)
        self.head = self._shared.penultimate.head(x).module if self._shared.penultimate else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes); what a method writes into them or the features stays its own."""
        found = self._shared(x)
        if self.head is None or found.features is None:
            return found.logits.clone()
        features = found.features.clone()
        if isinstance(self.head, nn.Conv2d):
            features = features[:, :, None, None]
        logits: Tensor = self.head(features)
        return logits.flatten(1)


class SharedMeans(nn.Module):
    """``net`` for Prototype Fusion: its last stages, ``names``, return their means over positions, and all, logits."""

    def __init__(self, net: nn.Module, x: Tensor, count: int) -> None:
        super().__init__()
        self._shared = SharedPass.of(net, x)
        self.names = self._shared.stages[-count:]
        self.where = nn.Parameter(x.new_zeros(()), requires_grad=False)  # what tells the device
        for name in self.names:
            module: nn.Module = self
            for part in name.split("."):
                if part not in dict(module.named_children()):
                    module.add_module(part, _Same())
                module = module.get_submodule(part)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        found = self._shared(x)
        for name in self.names:
            self.get_submodule(name)(found.means[name])
        return found.logits.clone()


class _Same(nn.Module):
    """Returns what it is given, and may have children."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class SharedSandIC(SandIC):
    """S&I-C, whose pass counts activations and so is its own; what the other methods read is kept of it.

    Scored first, it leaves them nothing to compute.
    """

    def _summary(self, x: Tensor) -> Summary:
        with SharedPass.of(self.net, x).of_another_pass(x):
            return super()._summary(x)


@contextlib.contextmanager
def nothing_shared() -> Iterator[None]:
    """Within it every pass is computed, as where a method's own cost is measured."""
    SharedPass.keeping = False
    try:
        yield
    finally:
        SharedPass.keeping = True
