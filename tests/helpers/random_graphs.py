"""Small random networks of all that :mod:`openood_sandi.detectors.sandi.links` reads, with units that are dead."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = (
    "convolution",
    "residual",
    "preactivation",
    "dense",
    "inverted",
    "max_pool",
    "average",
    "adaptive",
    "option_a",
)
SIZES = (6, 7, 8, 9, 11)


class RandomGraph(nn.Module):
    """One to four random blocks between a stem and a random head; 3 to 30 channels.

    Weights are zero here and there, strides pass positions by, and biases close units and whole positions.

    Args:
        seed: of the layers and their weights.
        blocks: the kinds that it may have.
    """

    def __init__(self, seed: int, blocks: tuple[str, ...] = BLOCKS) -> None:
        super().__init__()
        self.seed, self.blocks = seed, blocks
        self.size = random.Random(seed).choice(SIZES)
        self.layers = nn.ModuleList()
        self._next: int | None = None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            self._run(torch.randn(8, 3, self.size, self.size))
        self.eval()

    def images(self, count: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(count, 3, self.size, self.size, generator=generator, dtype=torch.float64).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._next = 0
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        self.choose = random.Random(self.seed + 1)  # the same choices in every pass
        x = self._rectified(self._norm(self._conv(x, self.choose.choice((3, 4, 6)), 3, padding=1)))
        for _ in range(self.choose.choice((1, 2, 3, 4))):
            x = getattr(self, "_" + self.choose.choice(self.blocks))(x)
        return self._head(x)

    def _layer(self, make: Callable[[], nn.Module], x: Tensor) -> Tensor:
        """The next layer on ``x``; in the first pass it is made."""
        if self._next is None:
            self.layers.append(make().eval())
            result: Tensor = self.layers[-1](x)
        else:
            result = self.layers[self._next](x)
            self._next += 1
        return result

    # ------------------------------------------------------------------ layers

    def _conv(self, x: Tensor, outputs: int, kernel: int, **options: int) -> Tensor:
        zeros, bias = self.choose.choice((0, 0, 0, 0.05, 0.3)), self.choose.random() < 0.5

        def make() -> nn.Module:
            layer = nn.Conv2d(x.shape[1], outputs, kernel, bias=bias, **options)  # type: ignore[arg-type]
            layer.weight.mul_(2 * (torch.rand(layer.weight.shape) >= zeros))
            return layer

        return self._layer(make, x)

    def _any_conv(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        divisor = next((d for d in (4, 3, 2) if channels % d == 0), 1)
        groups = self.choose.choice((1, 1, divisor, channels))
        kernel, stride = self.choose.choice((1, 2, 3, 3)), self.choose.choice((1, 1, 1, 2, 3))
        dilation, padding = self.choose.choice((1, 1, 1, 2)), self.choose.choice((0, kernel // 2))
        outputs = self.choose.choice((2, 3, 4, 6, 8)) if groups == 1 else groups * self.choose.choice((1, 1, 2, 3))
        if min(x.shape[2:]) + 2 * padding <= dilation * (kernel - 1):
            kernel, stride, dilation, padding = 1, 1, 1, 0
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self._conv(x, outputs, kernel, **options)

    def _norm(self, x: Tensor) -> Tensor:
        closed, dead = self.choose.choice((0, 0.5, 1, 2)), self.choose.random() < 0.05

        def make() -> nn.Module:
            layer = nn.BatchNorm2d(x.shape[1])
            layer.running_mean, layer.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False) + 0.01
            signs = torch.randint(0, 2, layer.weight.shape) * 2 - 1
            layer.weight.copy_(signs * (0.5 + torch.rand(layer.weight.shape)))
            layer.bias.normal_().sub_(closed)
            if dead:
                layer.weight[0] = 0
            return layer

        return self._layer(make, x)

    def _rectified(self, x: Tensor) -> Tensor:
        kind = self.choose.choice(("relu", "relu", "method", "relu6", "hardtanh", "both_clips"))
        if kind == "hardtanh":
            return F.hardtanh(x, 0.0, 1.0)
        if kind == "both_clips":
            return F.hardtanh(x, -0.5, 0.7)
        return x.relu() if kind == "method" else getattr(F, kind)(x)

    # ------------------------------------------------------------------ blocks

    def _convolution(self, x: Tensor) -> Tensor:
        return self._rectified(self._norm(self._any_conv(x)))

    def _residual(self, x: Tensor) -> Tensor:
        y = self._rectified(self._norm(self._conv(x, x.shape[1], 3, padding=1)))
        return self._rectified(x + self._norm(self._conv(y, x.shape[1], 3, padding=1)))

    def _preactivation(self, x: Tensor) -> Tensor:
        return x + self._conv(self._rectified(self._norm(x)), x.shape[1], 3, padding=1)

    def _dense(self, x: Tensor) -> Tensor:
        return torch.cat(
            [x, self._conv(self._rectified(self._norm(x)), self.choose.choice((1, 2, 3)), 3, padding=1)], 1
        )

    def _inverted(self, x: Tensor) -> Tensor:
        wide = self.choose.choice((1, 2)) * x.shape[1]
        y = F.relu6(self._norm(self._conv(x, wide, 1)))
        y = F.relu6(self._norm(self._conv(y, wide, 3, padding=1, groups=wide)))
        return x + self._norm(self._conv(y, x.shape[1], 1))

    def _max_pool(self, x: Tensor) -> Tensor:
        x = F.relu(self._norm(self._any_conv(x)))
        return (
            F.max_pool2d(x, *self.choose.choice(((2, 2), (3, 2, 1), (3, 1, 1), (2, 3)))) if min(x.shape[2:]) > 2 else x
        )

    def _average(self, x: Tensor) -> Tensor:
        return (
            F.avg_pool2d(x, *self.choose.choice(((2, 2), (3, 2, 1), (3, 1, 1), (2, 3)))) if min(x.shape[2:]) > 2 else x
        )

    def _adaptive(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.choose.choice((2, 3))) if min(x.shape[2:]) > 2 else x

    def _option_a(self, x: Tensor) -> Tensor:
        y = self._norm(self._conv(x, x.shape[1] + 2, 3, stride=2, padding=1))
        return self._rectified(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))

    def _head(self, x: Tensor) -> Tensor:
        kind, zeros = self.choose.choice(("mean", "flat", "adaptive", "two")), self.choose.choice((0, 0, 0.2))
        if kind == "two":
            hidden = x.mean((2, 3))
            x = F.relu(self._layer(lambda: nn.Linear(hidden.shape[1], 6), hidden))
        elif kind == "flat":
            x = x.flatten(1)
        else:
            x = x.mean((2, 3)) if kind == "mean" else torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)

        def make() -> nn.Module:
            layer = nn.Linear(x.shape[1], 5)
            layer.weight.mul_(3 * (torch.rand(layer.weight.shape) >= zeros))
            return layer

        return self._layer(make, x)
