"""Networks where the pattern of non-zero gradients is not the mask of the rectifier behind the split, or not always."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.trap_networks import WIDTH, Trap, conv


class TwoRectifiers(Trap):
    """A split feeds two rectifiers of opposite sign and a clipped one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return F.relu(y) + F.relu(-y - 0.5) * 2 + F.hardtanh(y, 0.2, 0.7)


class Saturated(Trap):
    """ReLU6 well beyond 6; a rectifier whose negative slope is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = conv(), nn.BatchNorm2d(WIDTH), conv(), nn.BatchNorm2d(WIDTH)
        self.act1, self.act2 = nn.ReLU6(), nn.LeakyReLU(0.2, inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)) * 8)))) / 4


class ZeroWeights(Trap):
    """Half of a rectified map meets weights of zero; a quarter is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = conv(), nn.BatchNorm2d(WIDTH), conv(6, WIDTH)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 0]).view(1, 6, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm1(self.conv1(x)))[:, :6] * self.mask)


class Gate(Trap):
    """Images of low contrast have their features switched off, and with them every gradient behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(x.flatten(1).std(1) - 0.8)
        y = F.relu(self.norm1(self.conv1(F.relu(self.norm0(self.stem(x))))))
        y = self.feature(self.norm9(self.last(y)))
        return self.head(y.mean((2, 3)) * gate[:, None])


class Starved(Trap):
    """A rectifier that is off everywhere for some images, whose branch then has no gradient; a skip goes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = conv(), nn.BatchNorm2d(WIDTH), conv()

    def middle(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return x + F.relu(self.conv2(y) - 4.0)


class Strided(Trap):
    """A stride passes by three positions of four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = conv(), nn.BatchNorm2d(WIDTH), conv(kernel=1, stride=2)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class Cropped(Trap):
    """A pool and a convolution whose windows do not reach the border."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = conv(), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 2, stride=3)

    def middle(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.conv2(y)) + F.avg_pool2d(y, 3)[:, :, :1, :1]


class Pruned(Trap):
    """Convolutions with channels of zero weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = conv(), nn.BatchNorm2d(WIDTH), conv()

    def eval(self) -> Pruned:
        with torch.no_grad():
            self.conv2.weight[:, ::2] = 0.0
        return super().eval()

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.norm1(self.conv1(x)))))


RECTIFIER_TRAPS: dict[str, type[nn.Module]] = {
    trap.__name__: trap for trap in (TwoRectifiers, Saturated, ZeroWeights, Gate, Starved, Strided, Cropped, Pruned)
}
