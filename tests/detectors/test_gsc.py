"""Gradient Short-Circuit against autograd and a second pass through the last layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openood_sandi.detectors.gsc import GradientShortCircuit, short_circuited
from tests.helpers import tiny_suite
from tests.helpers.surroundings import surroundings


@pytest.fixture
def net() -> nn.Module:
    return tiny_suite.network().double()


@pytest.fixture
def x() -> Tensor:
    return tiny_suite.images(9, 0, 5).double()


def by_autograd(net: nn.Module, x: Tensor, mask_ratio: float) -> Tensor:
    """New logits, image by image: the gradient by autograd, and a second pass through the last layer."""
    found = []
    for image in x:
        with torch.no_grad():
            feature = net.stage3(net.stage2(net.stage1(image[None]))).mean((2, 3))
        feature.requires_grad_()
        logits = net.head(feature)
        gradient = torch.autograd.grad(logits[0, logits.argmax()], feature)[0][0]
        order = sorted(range(len(gradient)), key=lambda i: -abs(float(gradient[i])))
        changed = feature.detach().clone()
        for coordinate in order[: round(mask_ratio * len(order))]:
            changed[0, coordinate] = 0
        found.append(net.head(changed)[0].detach())
    return torch.stack(found)


@pytest.mark.parametrize("mask_ratio", [0.05, 0.1, 0.5, 0.97])
def test_against_autograd_and_a_second_pass(net: nn.Module, x: Tensor, mask_ratio: float) -> None:
    logits = by_autograd(net, x, mask_ratio)
    pred, energy = GradientShortCircuit(net, mask_ratio=mask_ratio)(x)
    torch.testing.assert_close(energy, -logits.logsumexp(1), rtol=1e-10, atol=1e-10)
    msp = GradientShortCircuit(net, mask_ratio=mask_ratio, score="msp")(x)[1]
    torch.testing.assert_close(msp, -logits.softmax(1).amax(1), rtol=1e-10, atol=1e-10)
    assert torch.equal(pred, net(x).argmax(1))  # the network's own


def test_nothing_masked_is_energy_and_everything_masked_is_the_bias(net: nn.Module, x: Tensor) -> None:
    assert torch.equal(GradientShortCircuit(net, mask_ratio=0)(x)[1], -net(x).logsumexp(1))
    everything = GradientShortCircuit(net, mask_ratio=1)(x)[1]
    torch.testing.assert_close(everything, -net.head.bias.logsumexp(0).expand(9), rtol=1e-10, atol=1e-10)


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.1, 10), st.floats(0.1, 10))
def test_linear_in_features_and_weights_whatever_their_order(seed: int, ratio: float, a: float, b: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, weight = (torch.randn(n, 8, dtype=torch.double, generator=generator) for n in (5, 4))
    logits = short_circuited(features, features @ weight.T, weight, ratio)
    scaled = short_circuited(a * features, a * b * features @ weight.T, b * weight, ratio)
    torch.testing.assert_close(scaled, a * b * logits)
    order = torch.randperm(8, generator=generator)
    shuffled = short_circuited(features[:, order], features @ weight.T, weight[:, order], ratio)
    torch.testing.assert_close(shuffled, logits)


class ConvolutionHead(nn.Module):
    """As BiT: the last layer is a 1x1 convolution of the pooled map."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(net.stage1, net.stage2, net.stage3, nn.AdaptiveAvgPool2d(1))
        self.head = nn.Conv2d(32, tiny_suite.CLASSES, 1).double()
        self.head.weight.data.copy_(net.head.weight[:, :, None, None])
        self.head.bias.data.copy_(net.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))[..., 0, 0]


@pytest.mark.parametrize("wrap", [ConvolutionHead, nn.DataParallel, torch.compile, nn.Sequential])
def test_any_network_with_a_linear_last_layer(net: nn.Module, x: Tensor, wrap: type[nn.Module]) -> None:
    expected = GradientShortCircuit(net)(x)
    for found, wanted in zip(GradientShortCircuit(wrap(net).eval())(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_network_is_left_as_found(net: nn.Module, x: Tensor) -> None:
    before = surroundings(net, x)
    GradientShortCircuit(net)(x)
    assert surroundings(net, x) == before


def test_what_cannot_be_done_is_said(net: nn.Module, x: Tensor) -> None:
    for options, message in [
        ({"mask_ratio": 1.5}, "mask_ratio=1.5: expected a share, from 0 to 1"),
        ({"mask_ratio": True}, "mask_ratio=True"),
        ({"score": "entropy"}, "score='entropy': expected one of 'energy', 'msp'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GradientShortCircuit(net, **options)
    with pytest.raises(ValueError, match=r"not the output of a linear layer \(its last one is '0.head'\)"):
        GradientShortCircuit(nn.Sequential(net, nn.Softmax(1)).eval())(x)
    with pytest.raises(ValueError, match="train mode"):
        GradientShortCircuit(net.train())(x)
