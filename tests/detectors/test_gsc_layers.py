"""Gradient Short-Circuit at any layer: its first order against finite differences and plain autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi.detectors.gsc import INFO, GradientShortCircuit
from openood_sandi.engine.suffix import sensitivity
from tests.helpers import tiny_suite
from tests.helpers.surroundings import surroundings


@pytest.fixture
def net() -> nn.Module:
    return tiny_suite.network().double()


@pytest.fixture
def x() -> Tensor:
    return tiny_suite.images(5, 0, 5).double()


def with_output(net: nn.Module, layer: str, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits of a whole second forward pass in which the module returns ``change`` of its output."""
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, output: change(output.clone()))
    try:
        return net(x)
    finally:
        handle.remove()


def expected_logits(net: nn.Module, layer: str, x: Tensor, mask_ratio: float) -> Tensor:
    """Image by image: the gradient by autograd, the masking by sorting, the derivative by central differences."""
    return torch.stack([_expected(net, layer, image[None], mask_ratio)[0] for image in x])


def _expected(net: nn.Module, layer: str, image: Tensor, mask_ratio: float) -> Tensor:
    outputs: list[Tensor] = []
    with torch.no_grad():
        handle = net.get_submodule(layer).register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
        net(image)
        handle.remove()
    feature = outputs[0].requires_grad_()
    logits = with_output(net, layer, image, lambda _: feature * 1)
    gradient = torch.autograd.grad(logits[0, logits.argmax()], feature)[0].flatten().tolist()
    order = sorted(range(len(gradient)), key=lambda i: -abs(gradient[i]))
    direction = torch.zeros_like(feature).flatten()
    for coordinate in order[: round(mask_ratio * len(order))]:
        direction[coordinate] = -feature.detach().flatten()[coordinate]
    step = 1e-7 * direction.view_as(feature)
    with torch.no_grad():
        ahead, behind = (with_output(net, layer, image, change) for change in (lambda f: f + step, lambda f: f - step))
    return logits.detach() + (ahead - behind) / 2e-7


@pytest.mark.parametrize(
    ("layer", "mask_ratio"),
    # at stage3 gradients are equal within a channel: a quarter is eight of them, whole
    [("stage1", 0.3), ("stage2.conv1", 0.02), ("stage2.bn2", 0.3), ("stage2.shortcut", 0.02), ("stage3", 0.25)],
)
def test_against_finite_differences(net: nn.Module, x: Tensor, layer: str, mask_ratio: float) -> None:
    logits = expected_logits(net, layer, x, mask_ratio)
    pred, energy = GradientShortCircuit(net, mask_ratio=mask_ratio, layer=layer)(x)
    torch.testing.assert_close(energy, -logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    msp = GradientShortCircuit(net, mask_ratio=mask_ratio, score="msp", layer=layer)(x)[1]
    torch.testing.assert_close(msp, -logits.softmax(1).amax(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(pred, net(x).argmax(1))


def test_exact_where_the_rest_is_linear(net: nn.Module, x: Tensor) -> None:
    after = sensitivity(net, "stage3", x)  # then a mean over positions and the linear layer
    mask = torch.rand(after.feature.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    with torch.no_grad():
        expected = with_output(net, "stage3", x, lambda output: output.masked_fill(mask, 0))
    torch.testing.assert_close(after.logits_moved(-after.feature * mask), expected, rtol=1e-12, atol=1e-12)


def test_the_default_is_the_formula_of_the_linear_layer_bit_for_bit(net: nn.Module, x: Tensor) -> None:
    net, x = net.float(), x.float()
    with torch.no_grad():
        feature = net.stage3(net.stage2(net.stage1(x))).mean((2, 3))
        logits, weight = net.head(feature), net.head.weight
        largest = weight[logits.argmax(1)].abs().topk(round(0.1 * 32), dim=1).indices
        removed = torch.zeros_like(feature).scatter(1, largest, feature.gather(1, largest))
        expected = -(logits - removed @ weight.T).logsumexp(1)
    assert torch.equal(GradientShortCircuit(net, mask_ratio=0.1)(x)[1], expected)


def test_last_stage_is_a_name_for_the_last_map(net: nn.Module, x: Tensor) -> None:
    named, found = (GradientShortCircuit(net, mask_ratio=0.1, layer=layer)(x)[1] for layer in ("stage3", "last_stage"))
    assert torch.equal(named, found)


class InPlace(nn.Module):
    """A convolution called twice, its output overwritten at once, and a head that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.pair, self.end = nn.Identity(), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)) * 2
        x = self.act(self.conv(x).sub_(0.1))
        return self.end(x.amax((2, 3)).square()).tanh()


@pytest.fixture
def in_place() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return InPlace().double().eval()


@pytest.mark.parametrize("call", [1, 2])
def test_writes_in_place_and_each_call_of_a_module(in_place: nn.Module, x: Tensor, call: int) -> None:
    def rest(feature: Tensor) -> Tensor:
        feature = feature.relu() * 2 if call == 1 else feature
        feature = F.conv2d(feature, in_place.conv.weight, in_place.conv.bias, padding=1) if call == 1 else feature
        return in_place.end((feature - 0.1).relu().amax((2, 3)).square()).tanh()

    with torch.no_grad():
        feature = in_place.conv(x)
        feature = feature if call == 1 else in_place.conv(feature.relu() * 2)
    after = sensitivity(in_place, f"conv#{call}" if call > 1 else "conv", x)
    torch.testing.assert_close(after.feature, feature)
    direction = torch.randn(feature.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    logits, change = torch.func.jvp(rest, (feature,), (direction,))
    torch.testing.assert_close(after.logits, logits)
    torch.testing.assert_close(after.logits_moved(direction), logits + change)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
        self.end = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def test_attention(x: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Attention().double().eval()
    logits = expected_logits(net, "patch", x, 0.2)
    energy = GradientShortCircuit(net, mask_ratio=0.2, layer="patch")(x)[1]
    torch.testing.assert_close(energy, -logits.logsumexp(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", ["stage2", "last_stage"])
def test_the_network_is_left_as_found(net: nn.Module, x: Tensor, layer: str) -> None:
    before = surroundings(net, x)
    GradientShortCircuit(net, layer=layer)(x)
    with pytest.raises(ValueError, match="no module of that name"):
        GradientShortCircuit(net, layer="stage9")(x)
    assert surroundings(net, x) == before
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in net.parameters())


def test_images_do_not_see_each_other_nor_the_callers_mode(net: nn.Module, x: Tensor) -> None:
    detector = GradientShortCircuit(net, mask_ratio=0.1, layer="stage2")
    together = detector(x)[1]
    spoilt = torch.cat([torch.full_like(x[:1], torch.nan), x])
    torch.testing.assert_close(detector(spoilt)[1][1:], together, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(detector(x)[1], together, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(detector(x * 1)[1], together, rtol=1e-12, atol=1e-12)


class Cut(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach() * 2


def test_what_cannot_be_done_is_said(net: nn.Module, in_place: nn.Module, x: Tensor) -> None:
    with pytest.raises(TypeError, match="layer=3: expected a string"):
        GradientShortCircuit(net, layer=3)
    for network, layer, message in [
        (net, "stage4", "layer='stage4': the network has no module of that name; did you mean stage"),
        (in_place, "conv#two", "layer='conv#two': the network has no module of that name"),
        (in_place, "conv#0", r"module 'conv' is called 2 time\(s\)"),
        (in_place, "conv#3", r"module 'conv' is called 2 time\(s\)"),
        (in_place, "pair", r"module 'pair' is called 0 time\(s\)"),
        (Cut(net).eval(), "0.stage2", "no derivative by its output"),
    ]:
        with pytest.raises(ValueError, match=message):
            GradientShortCircuit(network, layer=layer)(x)


def test_a_network_without_a_linear_head_needs_a_layer() -> None:
    """As its ``INFO`` says, the default alone needs a linear head."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.Tanh()]
    net = nn.Sequential(*layers)
    x = torch.randn(3, 3, 8, 8)
    assert INFO.needs == "a linear head by default"
    with pytest.raises(ValueError, match="not the output of a linear layer"):
        GradientShortCircuit(net.eval())(x)
    assert GradientShortCircuit(net, layer="1")(x)[1].isfinite().all()
