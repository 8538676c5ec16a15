"""Where gradients are zero, told by the rectifiers' masks, is where plain autograd's are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.random_graphs import RandomGraph

DTYPES = (torch.float64, torch.float32)


def shares(net: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """E of GAIA-Z by plain autograd: {module: (B, K)}, the share of positions where d(largest logit)/d(output) != 0."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, given: object, output: Tensor, name: str = name) -> Tensor:
            # a new tensor: what else the network does with the old one is beside the split
            outputs[name] = output.view_as(output) if output.requires_grad else output.detach().requires_grad_(True)
            return outputs[name]

        handles.append(net.get_submodule(name).register_forward_hook(keep))
    try:
        logits = net(x)
        gradients = torch.autograd.grad(logits.amax(1).sum(), [outputs[name] for name in names], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, gradient in zip(names, gradients, strict=True):
        gradient = torch.zeros_like(outputs[name]) if gradient is None else gradient
        found[name] = (gradient.flatten(2) != 0).double().sum(2) / gradient.flatten(2).shape[2]
    return found


def require_read(net: nn.Module, x: Tensor, splits: str | list[str] = "auto", least: float = 1.0) -> SandI:
    """GAIA-Z of two batches is plain autograd's, bit by bit, and was read off masks for so many of the images."""
    detector = SandI(net, variant="Z", steps=1, splits=splits)
    for batch in (x, x.flip(0)[: len(x) // 2]):
        found = detector.densities(batch)
        for name, share in shares(net, batch, list(found)).items():
            assert torch.equal(found[name], share), name
    assert detector.proved_share >= least
    return detector


class Block(nn.Module):
    """A narrow network of two stages with what ``between`` makes of the first one's map."""

    def __init__(self, between: Callable[[Block, Tensor], Tensor], width: int = 6, closed: float = 1.0) -> None:
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.strided = nn.Conv2d(width, width, 2, stride=3)
        self.n1, self.n2, self.n3 = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        nn.init.constant_(self.n3.weight, 4.0), nn.init.constant_(self.n3.bias, 3.0)
        self.more = nn.Conv2d(2 * width, width, 3, padding=1)
        self.between = between
        self.head = nn.Linear(width, 4)
        nn.init.normal_(self.n0.bias, -closed), nn.init.normal_(self.n1.bias, -closed)
        nn.init.normal_(self.n2.bias, -closed / 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.n0(self.c0(x)))
        return self.head(F.relu(self.n2(self.between(self, a))).mean((2, 3)))


def chain(net: Block, a: Tensor) -> Tensor:
    return net.wide(F.relu(net.n1(net.wide(a))))


def grouped(net: Block, a: Tensor) -> Tensor:
    return net.grouped(F.relu(net.n1(net.grouped(a))))


def depthwise(net: Block, a: Tensor) -> Tensor:
    return net.point(F.relu(net.n1(net.depthwise(a))))


def relu6(net: Block, a: Tensor) -> Tensor:
    return net.wide(F.relu6(net.n3(net.wide(a))))


def concatenated(net: Block, a: Tensor) -> Tensor:
    return net.more(torch.cat([a, F.relu(net.n1(net.depthwise(a)))], 1))


def residual(net: Block, a: Tensor) -> Tensor:
    return a + net.wide(F.relu(net.n1(net.wide(a))))


def linear_bottleneck(net: Block, a: Tensor) -> Tensor:
    return net.depthwise(net.n1(net.point(a)))


def max_pool(net: Block, a: Tensor) -> Tensor:
    return net.wide(F.max_pool2d(F.relu(net.n1(net.wide(a))), 2))


def average_pool(net: Block, a: Tensor) -> Tensor:
    return net.depthwise(F.avg_pool2d(F.relu(net.n1(net.wide(a))), 3, 2, 1))


def adaptive_pool(net: Block, a: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(net.depthwise(F.relu(net.n1(net.wide(a)))), 3)


def passed_by(net: Block, a: Tensor) -> Tensor:
    return net.strided(F.relu(net.n1(net.wide(a))))


def sliced(net: Block, a: Tensor) -> Tensor:
    return F.pad(a[:, 1:-1, ::2, 1::2], (1, 0, 0, 1, 1, 1))


def viewed(net: Block, a: Tensor) -> Tensor:
    return net.grouped(a.flatten(2).contiguous().reshape(a.shape))


KINDS = (chain, grouped, depthwise, relu6, concatenated, residual, linear_bottleneck, max_pool, average_pool)
KINDS += (adaptive_pool, passed_by, sliced, viewed)


def made(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return build().to(dtype).eval().requires_grad_(False)


def images(count: int, dtype: torch.dtype, size: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_read_at_closed_positions(kind: Callable[[Block, Tensor], Tensor], dtype: torch.dtype) -> None:
    net = made(lambda: Block(kind), dtype)
    detector = require_read(net, images(8, dtype))
    assert any(bool((share < 0.5).any()) for share in detector.densities(images(2, dtype)).values())


@pytest.mark.parametrize("zeros", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_read_past_weights_of_zero(kind: Callable[[Block, Tensor], Tensor], zeros: float) -> None:
    """Also where whole columns, windows, rows of the head and scales of norms are zero."""
    net = made(lambda: Block(kind, closed=0.5), torch.float64)
    generator = torch.Generator().manual_seed(2)
    for layer in (net.wide, net.grouped, net.depthwise, net.point, net.strided, net.more, net.head):
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) >= zeros)
    net.head.weight[:2, :3] = 0
    net.n1.weight[1] = 0
    require_read(net, images(8, torch.float64))


def test_a_depthwise_channel_whose_own_unit_is_off_is_dead() -> None:
    """Twenty units are open at the position, and none of their gradients is."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 20, 1, groups=20), nn.BatchNorm2d(20)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 3)),
    ).double()
    net.eval().requires_grad_(False)
    net[0].bias.fill_(9.0)
    net[3].weight.abs_()
    net[3].bias.fill_(0.1)
    net[4].bias[:10] = -99.0
    detector = require_read(net, images(4, torch.float64))
    assert detector.densities(images(4, torch.float64))["1"].mean(0).tolist() == [0.0] * 10 + [1.0] * 10


@pytest.mark.parametrize("size", [9, 8])
def test_overlapping_windows_of_a_max_pool_leave_images_to_be_computed(size: int) -> None:
    def overlapping(net: Block, a: Tensor) -> Tensor:
        return net.depthwise(F.max_pool2d(F.relu(net.n1(net.wide(a))), 3, 2, 1))

    for dtype in DTYPES:
        require_read(made(lambda: Block(overlapping, closed=2.0), dtype), images(8, dtype, size), least=0.0)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_paddings_by_name(padding: str) -> None:
    class Named(Block):
        def __init__(self) -> None:
            super().__init__(lambda net, a: net.named(F.relu(net.n1(net.wide(a)))))
            self.named = nn.Conv2d(6, 6, (2, 4), padding=padding)

    require_read(made(Named, torch.float64), images(6, torch.float64))


def test_what_lies_before_the_first_split_may_be_anything() -> None:
    class Prepared(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.silu((x - 0.1) / 0.3).sort(-1).values.roll(1, -1))

    require_read(made(lambda: Prepared(chain), torch.float64), images(6, torch.float64))


def test_a_head_of_convolution_and_pool() -> None:
    class Convolved(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(chain(self, F.relu(self.n0(self.c0(x)))), 1).flatten(1)

    net = made(lambda: Convolved(chain), torch.float64)
    net.wide.weight.mul_(torch.rand(net.wide.weight.shape) > 0.1)
    require_read(net, images(6, torch.float64), ["n0", "n1"])


def test_what_got_a_splits_tensor_beside_it_does_not_count() -> None:
    """An Identity returns the tensor that it was given, which others have as well."""

    class Beside(Block):
        def __init__(self) -> None:
            super().__init__(residual)
            self.same = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            a = self.n0(self.c0(x))
            return self.head(F.relu(self.depthwise(F.relu(a)) + self.n2(self.same(a))).mean((2, 3)))

    class Inside(Block):
        def __init__(self) -> None:
            super().__init__(lambda net, a: net.inner(a))
            self.inner = Both()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.near = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
            self.last = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.near(y) + self.last(y)

    require_read(made(Beside, torch.float64), images(6, torch.float64), ["same"], least=0.0)
    require_read(made(Inside, torch.float64), images(6, torch.float64), ["inner.last", "inner.norm"], least=0.0)


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 40))])
def test_random_graphs(seed: int) -> None:
    dtype = DTYPES[seed % 2]
    net = RandomGraph(seed).to(dtype)
    x = net.images(8, dtype)
    for options in ({"steps": 1}, {"combine": "union", "step_size": 0.05}, {"steps": 2, "step_size": 0.05}):
        exact = SandI(net, variant="Z", rectifier_shortcut=False, **options).densities(x)
        for name, density in SandI(net, variant="Z", **options).densities(x).items():
            assert torch.equal(density, exact[name]), (name, options)


def test_most_images_of_random_graphs_without_overlapping_windows_are_read() -> None:
    blocks = ("convolution", "residual", "preactivation", "dense", "inverted", "average", "adaptive", "option_a")
    for seed in range(10):
        net = RandomGraph(seed, blocks).double().requires_grad_(False)
        names = [name for name, layer in net.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        require_read(net, net.images(8, torch.float64), names)
