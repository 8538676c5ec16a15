"""What decides gradients unseen by the record is noticed: at every split point, in every precision, in any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import ReplayError, SandI
from tests.helpers.cases import prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.trap_networks import WIDTH, Block, conv

STEP = 0.05


class _OverTheMean(torch.autograd.Function):
    """Lets through of each image's gradient what exceeds its mean; on several copies at once, another mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (grad > grad.mean((1, 2, 3), keepdim=True))


@torch.jit.script
def less_the_mean(y: Tensor) -> Tensor:
    return torch.relu(y - y.mean(1, keepdim=True))


class Late(nn.Module):
    """Sixteen stems side by side; in one of the last is what ``hides``."""

    hides: Callable[[Tensor], Tensor] = _OverTheMean.apply

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Sequential(conv(3), nn.BatchNorm2d(WIDTH)) for _ in range(16))
        self.last, self.norm9 = conv(), nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        *seen, hidden, last = (F.relu(stem(x)) for stem in self.stems)
        y = torch.stack(seen).sum(0) + type(self).hides(hidden) + last
        return self.head(F.relu(self.norm9(self.last(y))).mean((2, 3)))


class Small(Late):
    """In a residual branch of hardly any weight, whose gradients do not show before it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, WIDTH - 3))
        for number, stem in enumerate(self.stems):
            y = F.relu(stem[1](x))
            x = x + 1e-7 * stem[0](_OverTheMean.apply(y[:, :3]) if number == 7 else y[:, :3])
        return self.head(F.relu(self.norm9(self.last(x))).mean((2, 3)))


class Scripted(Late):
    hides = less_the_mean


def assert_right(net: nn.Module, x: Tensor, tolerance: float = 1e-9, **options: Any) -> SandI:
    detector = SandI(net, variant="Z", step_size=STEP, **options)
    tau = detector(x)[1]
    path = {name: value for name, value in options.items() if name != "splits"}
    right = Reference(net, x, detector.split_names, Options(step_size=STEP, **path)).tau()
    torch.testing.assert_close(tau, right, rtol=tolerance, atol=0, check_dtype=False)
    return detector


class _Faint(_OverTheMean):
    """Cuts off what hardly weighs in a gradient, by the mean over other dimensions on several copies."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        sizes = grad.abs()
        faint = sizes < 1e-9
        return grad * ~(faint & (sizes < (sizes * faint).mean((1, 2, 3), keepdim=True)))


class Faint(Block):
    """Half of its channels have hardly any weight."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 1e-12]).to(y).repeat(WIDTH // 2).view(-1, 1, 1)
        return x + _Faint.apply(y) * scale * torch.linspace(0.1, 3, 8).to(y)


@pytest.mark.parametrize("network", [Late, Small, Scripted, Faint])
def test_at_every_split_point(network: Callable[[], nn.Module]) -> None:
    assert assert_right(*prepared(network))._network.is_plain


def test_in_half_precision() -> None:
    net, x = prepared(Block)
    net.feature.register_full_backward_hook(lambda module, given, out: (_OverTheMean.backward(None, given[0]),))
    assert_right(net.to(torch.bfloat16), x.to(torch.bfloat16), tolerance=0.01)  # the sums of Eq. 14, too


def test_in_a_layer_that_only_later_images_go_through() -> None:
    class Chooses(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm1(self.conv1(F.relu(self.norm0(self.stem(x))))))
            y = _OverTheMean.apply(y) if x.mean() > 2 else y
            return self.head(self.feature(self.norm9(self.last(y))).mean((2, 3)))

    net, x = prepared(Chooses)
    detector = assert_right(net, x)
    assert not detector._network.is_plain
    right = Reference(net, x + 5, detector.split_names, Options(step_size=STEP)).tau()
    torch.testing.assert_close(detector(x + 5)[1], right, rtol=1e-9, atol=0)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad * weight, None


def _with_a_hook(x: Tensor, weight: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda grad: grad * weight)
    return x


@pytest.mark.parametrize("cut", [_Weighted.apply, _with_a_hook])
def test_gradients_that_it_makes_zero_for_some_images_alone(cut: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Rectifiers tell nothing of them, and one image of each class, computed as well, may be one of the others."""

    class Cuts(Block):
        def forward(self, x: Tensor) -> Tensor:
            dark = (x.mean((1, 2, 3), keepdim=True) < 2).to(x)
            y = cut(F.relu(self.norm1(self.conv1(F.relu(self.norm0(self.stem(x)))))), dark)
            return self.head(self.feature(self.norm9(self.last(y))).mean((2, 3)))

    net, x = prepared(Cuts)
    with torch.no_grad():
        net.head.bias[0] = 100.0  # one class for all
    detector = assert_right(net, x, steps=1)
    right = Reference(net, x + 5, detector.split_names, Options(steps=1)).tau()
    torch.testing.assert_close(detector(x + 5)[1], right, rtol=1e-9, atol=0)


def test_split_points_at_functional_calls_are_refused() -> None:
    """Whole passes cannot check them."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = conv(3), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.stem(x) + 0.1)
            return self.head(_OverTheMean.apply(y).mean((2, 3)))

    net, x = prepared(Adds)
    with pytest.raises(ReplayError, match=r"_OverTheMeanBackward.*'add'.*name modules in splits"):
        SandI(net, variant="Z")(x)
    assert_right(net, x, splits=["stem"])


def test_one_image_alone_in_whole_passes() -> None:
    """Torch's batch norm has a wrong gradient where that of one image comes in another memory order, through a view."""

    class Tokens(Block):
        def change(self, x: Tensor, y: Tensor) -> Tensor:
            tokens = y.flatten(2).mT
            mixed = (tokens @ tokens.mT).softmax(-1) @ tokens
            return _OverTheMean.apply(mixed.mT.reshape_as(y))

    net, x = prepared(Tokens)
    detector = SandI(net, variant="Z", step_size=STEP, steps=3)
    both, alone = detector.explain(x), detector.explain(x[:1])
    assert detector._network.is_plain
    for name, attribution in alone.items():
        torch.testing.assert_close(attribution, both[name][:1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda y: y + torch.func.grad(lambda t: t.pow(4).sum() / 4)(y),
        lambda y: y * torch.func.vmap(torch.func.jacrev(torch.tanh))(y.mean((2, 3))).sum(2)[..., None, None],
        lambda y: torch.func.vmap(lambda t: t.relu() * t.mean())(y),
    ],
)
def test_transforms_of_functions(transformed: Callable[[Tensor], Tensor]) -> None:
    """Results inside ``torch.func.vmap`` and ``grad`` are no tensors outside."""

    class Transforms(Block):
        def change(self, x: Tensor, y: Tensor) -> Tensor:
            return transformed(y)

    assert_right(*prepared(Transforms))
