"""S&I-C image by image in loops over float64 numbers, and small networks that show their pre-activations.

Nothing of the package is used: the networks are run block by block here, and every quantity is from its definition.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
Act = Callable[[Tensor], Tensor]


class Hooked:
    """The pre-activations of one pass, in order, as copies; the networks below tell them to this list if asked."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, act: Act, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return act(x)


def plainly(act: Act, x: Tensor) -> Tensor:
    return act(x)


class Block(nn.Module):
    """Convolution, batch norm, activation; with a squeeze-and-excite gate, or with the activation called twice."""

    def __init__(self, given: int, width: int, act: Act, *, gate: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(given, width, 3, 2, 1), nn.BatchNorm2d(width)
        self.act = act
        self.squeeze = nn.Conv2d(width, 2, 1) if gate else None
        self.excite = nn.Conv2d(2, width, 1) if gate else None
        self.again = nn.Conv2d(width, width, 1) if twice else None

    def forward(self, x: Tensor, tell: Callable[[Act, Tensor], Tensor] = plainly) -> Tensor:
        x = tell(self.act, self.norm(self.conv(x)))
        if self.squeeze is not None and self.excite is not None:
            # the gate's own activation is told to nobody
            x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return x if self.again is None else tell(self.act, self.again(x))


class Staged(nn.Module):
    """Three stages of one block, each at half the resolution of the one before."""

    def __init__(self, act: Act, *, linear: bool = True, **options: bool) -> None:
        super().__init__()
        widths = (3, 6, 8, 10)
        blocks = [Block(given, width, act, **options) for given, width in itertools.pairwise(widths)]
        self.stage1, self.stage2, self.stage3 = blocks
        self.head = nn.Linear(widths[-1], CLASSES)
        self.linear = linear

    def forward(self, x: Tensor, tell: Callable[[Act, Tensor], Tensor] = plainly) -> Tensor:
        for stage in (self.stage1, self.stage2, self.stage3):
            x = stage(x, tell)
        logits = self.head(x.mean((2, 3)))
        return logits if self.linear else 3 * logits.tanh()


class Tokens(nn.Module):
    """One resolution, as a vision transformer: patches, blocks of tokens (B, N, D) with GELU, the mean, a head."""

    linear = True

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)) for _ in range(depth)
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, tell: Callable[[Act, Tensor], Tensor] = plainly) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for norm, up, down in self.blocks:
            x = x + down(tell(F.gelu, up(norm(x))))
        return self.head(x.mean(1))


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = build().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return net


def images(count: int, seed: int, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.double)
    return offset + torch.randn(count, 3, size, size, generator=generator, dtype=torch.double)


# ------------------------------------------------------------------------------------------- one image

Vector = list[float]


@dataclass
class Read:
    """What one pass over one image gives."""

    shares: list[Vector]
    """E of every activation map."""
    logits: Vector
    feature: Vector


def read(net: nn.Module, image: Tensor, clip: float, channels: int) -> Read:
    """E_jk by counting positions one by one; ``channels`` is the dimension of them in pre-activations."""
    told, inputs = Hooked(), []
    handle = net.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = net(image[None], told)
    handle.remove()
    shares = []
    for x in told.seen:
        rows = x[0].movedim(channels - 1, 0).flatten(1).tolist()
        shares.append([sum(1 for value in row if 0 < value < clip) / len(row) for row in rows])
    return Read(shares, logits[0].tolist(), inputs[0][0].tolist())


# ------------------------------------------------------------------------------------------- all quantities


class Reference:
    """Fitted as :class:`openood_sandi.SandIC`, and scores as it should.

    Args:
        net: one of the networks above.
        ends: which activation maps end the stages.
        clip: of the activation.
        channels: the dimension of channels in pre-activations.
        by_class: whether prototypes are by class.
    """

    def __init__(
        self, net: nn.Module, ends: Sequence[int], *, clip: float = math.inf, channels: int = 1, by_class: bool = True
    ) -> None:
        self.net, self.ends, self.clip, self.channels, self.by_class = net, ends, clip, channels, by_class

    def fit(self, training: Tensor, labels: Sequence[int], val: Tensor) -> Reference:
        seen = [self.read(image) for image in training]
        groups = sorted(set(labels)) if self.by_class else [None]
        self.prototypes = [
            [
                unit(mean([unit(r.shares[j]) for r, c in zip(seen, labels, strict=True) if group in (None, c)]))
                for group in groups
            ]
            for j in self.ends
        ]
        self.mean_feature = mean([r.feature for r in seen])
        values = [self.values(self.read(image)) for image in val]
        self.statistics = {name: moments([v[name] for v in values]) for name in values[0]}
        self.statistics["b"] = moments([self.base(v) for v in values])
        return self

    def read(self, image: Tensor) -> Read:
        return read(self.net, image, self.clip, self.channels)

    def values(self, r: Read) -> dict[str, float]:
        found = {"m": -max(r.logits), "d": self.distance(r), "z": sum(e * e for share in r.shares for e in share)}
        return {**found, "f": self.fdbd(r)} if self.net.linear else found

    def distance(self, r: Read) -> float:
        largest = [
            max(dot(unit(r.shares[j]), p) for p in prototypes)
            for j, prototypes in zip(self.ends, self.prototypes, strict=True)
        ]
        return -sum(largest)

    def fdbd(self, r: Read) -> float:
        weight, y = self.net.head.weight.tolist(), r.logits.index(max(r.logits))
        distances = []
        for c, row in enumerate(weight):
            apart = math.dist(weight[y], row)
            if apart > 0:
                distances.append((r.logits[y] - r.logits[c]) / apart)
        return -sum(distances) / len(distances) / math.dist(r.feature, self.mean_feature)

    def base(self, values: dict[str, float]) -> float:
        return sum(self.standard(name, values[name]) for name in ("m", "f") if name in values)

    def standard(self, name: str, value: float) -> float:
        mean_of_id, deviation = self.statistics[name]
        return (value - mean_of_id) / deviation

    def score(self, image: Tensor, *, gate: float = 1.5, use_z: bool = False) -> float:
        values = self.values(self.read(image))
        score = max(self.standard("b", self.base(values)), -2.0)
        score += max(0.0, self.standard("d", values["d"]) - gate)
        return score + (max(0.0, self.standard("z", values["z"]) - gate) if use_z else 0.0)


def mean(vectors: Sequence[Vector]) -> Vector:
    return [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]


def unit(vector: Vector) -> Vector:
    length = math.sqrt(dot(vector, vector))
    return [value / length for value in vector] if length else vector


def dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def moments(values: Sequence[float]) -> tuple[float, float]:
    centre = sum(values) / len(values)
    return centre, math.sqrt(sum((value - centre) ** 2 for value in values) / len(values))
