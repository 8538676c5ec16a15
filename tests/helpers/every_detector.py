"""One of each detector, on a network of three stages."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi import GradientShortCircuit, PrototypeFusion, SandI, SandIC
from openood_sandi.detectors.gaia import GAIA
from openood_sandi.detectors.options import options_of
from tests.helpers.cases import randomise


class Staged(nn.Module):
    """Three stages of a convolution, a batch norm and a ReLU each, the last two at half the resolution before.

    Behind each of its parts it pauses for so many seconds: other threads have their turn.
    """

    def __init__(self, width: int = 8, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause
        widths = ((3, width, 1), (width, 2 * width, 2), (2 * width, 3 * width, 2))
        self.stage1, self.stage2, self.stage3 = (self.stage(*each) for each in widths)
        self.head = nn.Linear(3 * width, 5)

    @staticmethod
    def stage(before: int, after: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, 3, stride, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.stage1, self.stage2, self.stage3):
            x = stage(x)
            time.sleep(self.pause)
        x = self.head(x.mean((2, 3)))
        time.sleep(self.pause)
        return x


def network(width: int = 8, pause: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    net = Staged(width, pause)
    randomise(net)
    return net.eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


TRAINING = (images(60, 1), torch.arange(60) % 5)


KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "S&I-Z": (SandI, {"variant": "Z"}),
    "union": (SandI, {"variant": "Z", "combine": "union"}),
    "S&I-A": (SandI, {"variant": "A"}),
    "GAIA": (GAIA, {}),
    "GSC": (GradientShortCircuit, {}),
    "GSC at a layer": (GradientShortCircuit, {"layer": "last_stage", "mask_ratio": 0.1}),
    "Prototype Fusion": (PrototypeFusion, {}),
    "S&I-C": (SandIC, {"use_z": "always"}),
}


def made(name: str, net: nn.Module) -> Any:
    """A detector that is fitted, where it has to be, and has not seen a batch yet."""
    kind, options = KINDS[name]
    detector = kind(net, **options)
    return like(detector.fit([TRAINING], val=images(60, 2)), net) if kind.fitted else detector  # type: ignore[attr-defined]


def like(detector: Any, net: nn.Module) -> Any:
    """The same on ``net``, as OpenOOD's face makes one for each data set."""
    other = type(detector)(net, **{name: detector.options[name] for name in options_of(type(detector))})
    for name in detector.fitted:
        setattr(other, name, getattr(detector, name))
    return other
