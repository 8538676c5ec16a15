"""Small networks of convolutions, batch norms and rectifiers, as the proofs about their masks take them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI


def exact(net: nn.Module, **options: object) -> SandI:
    return SandI(net, variant="Z", rectifier_shortcut=False, **options)


def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return build().to(dtype).eval()


def images(count: int, size: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plain(nn.Module):
    """Two convolutions beside a shortcut and a linear head; wide enough for every image to be proved."""

    def __init__(self, width: int = 48, classes: int = 4, pool: bool = False) -> None:
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.c1, self.n1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.n0(self.c0(x)))
        a = F.max_pool2d(a, 3, 2, 1) if self.pool else a
        return self.head(F.relu(a + self.n1(self.c1(a))).mean((2, 3)))


class OptionA(Plain):
    """The shortcut of CIFAR ResNets: every other position, and channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(48, 96, 3, 2, 1)
        self.n1, self.head = nn.BatchNorm2d(96), nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.n0(self.c0(x)))
        beside = F.pad(a[:, :, ::2, ::2], (0, 0, 0, 0, 24, 24))
        return self.head(F.relu(beside + self.n1(self.c1(a))).mean((2, 3)))


class Made(Plain):
    """The layers of :class:`Plain`, put together by ``forward``."""

    def __init__(self, together: Callable[[Made, Tensor], Tensor], width: int = 48) -> None:
        super().__init__(width)
        self.c2, self.aux = nn.Conv2d(width, width, 1), nn.Linear(width, 4)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        return self.together(self, x)


WAYS = ("slope", "residual", "in place", "into the residual", "twice", "both clips", "max-pool")


def with_way(kind: str, net: Made, x: Tensor) -> Tensor:
    """A network whose splits are at some distance from their rectifiers."""
    a = F.relu(net.n0(net.c0(x)))
    if kind == "slope":  # a batch norm scales the step by five, up or down
        return net.head(F.relu(net.n1(net.c1(a))).mean((2, 3)))
    if kind == "residual":  # additions in float32 round the step
        return net.head(F.relu(net.n1(net.c1(a)) + net.c2(a)).mean((2, 3)))
    if kind == "in place":
        b = net.n1(net.c1(a))
        b += net.c2(a)
        return net.head(F.relu(b, inplace=True).mean((2, 3)))
    if kind == "into the residual":
        beside = net.c2(a)
        beside += net.n1(net.c1(a))
        return net.head(F.relu_(beside).mean((2, 3)))
    if kind == "twice":
        beside, b = net.c2(a), net.n1(net.c1(a))
        beside += b
        beside += a
        return net.head(beside.relu_().mean((2, 3)))
    if kind == "with a tail":
        return net.head(net.tail(F.relu(net.n1(net.c1(a)))).flatten(1))
    if kind == "both clips":
        return net.head(F.relu6(net.n1(net.c1(a))).mean((2, 3)))
    if kind == "max-pool":
        return net.head(F.max_pool2d(F.relu6(net.n1(net.c1(a)) + net.c2(a)), 3, 2, 1).mean((2, 3)))
    raise AssertionError(kind)
