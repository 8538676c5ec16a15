"""The speed benchmark: its networks, the loops it times, what it counts, and the command."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


import numpy as np
from networks.catalogue import norms
from networks.cifar import CifarResNet, WideResNet
from networks.imagenet import BitResNet
from speed import measuring, report, scaling
from speed.instrument import count
from speed.loops import Prefix, SandIOptions, SplitLoop
from speed.networks import NETWORKS, TimedNetwork, narrow, out_of_place

from openood_sandi import SandI

CPU = torch.device("cpu")
NARROW = {"resnet18": 1 / 16, "resnet34": 1 / 16, "wrn40-2": 1 / 8, "bit-s-r101x1": 1 / 16, "resnet50": 1 / 16}


def small(name: str) -> TimedNetwork:
    """A network of the benchmark on images of a size that tests can afford."""
    return replace(NETWORKS[name], image_size=16 if NETWORKS[name].image_size == 32 else 64)


def images_for(network: TimedNetwork, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, network.image_size, network.image_size, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "name, parameters, splits",
    [
        ("resnet18", 11_220_132, 20),
        ("resnet34", 21_328_292, 36),
        ("wrn40-2", 2_255_156, 38),
        ("bit-s-r101x1", 44_541_480, 9),
        ("resnet50", 25_557_032, 10),
    ],
)
def test_networks_have_the_published_size_and_the_papers_number_of_splits(
    name: str, parameters: int, splits: int
) -> None:
    with torch.device("meta"):
        net = NETWORKS[name].architecture.make(NETWORKS[name].classes)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert len(NETWORKS[name].splits(net, "paper")) == splits


@pytest.mark.parametrize("name", NARROW)
def test_random_weights_leave_both_halves_of_rectifiers_and_a_soft_softmax(name: str) -> None:
    network = small(name)
    net = network.build(NARROW[name])
    images = images_for(network, 4).float()
    shares: list[float] = []
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda _, args, __: shares.append(float((args[0] > 0).float().mean())))
    logits = net(images)
    assert not net.training and all(0.1 < share < 0.95 for share in shares)
    assert 0.5 < logits.std() < 8 and logits.softmax(1).max() < 0.999
    assert torch.equal(logits, network.build(NARROW[name])(images)), "seeded, so the same at every call"


def test_split_presets() -> None:
    with torch.device("meta"):
        resnet, bit = (NETWORKS[name].architecture.make(10) for name in ("resnet18", "bit-s-r101x1"))
    assert NETWORKS["resnet18"].splits(resnet, "norms") == norms(resnet)
    assert NETWORKS["bit-s-r101x1"].splits(bit, "norms") == NETWORKS["bit-s-r101x1"].splits(bit, "paper")


def test_a_width_multiplies_channels_but_not_those_of_images_and_logits() -> None:
    """As the networks' own widths do, which the same factors give."""
    for made, own, width in (
        (CifarResNet((1, 2), (64, 128), classes=10), CifarResNet((1, 2), (16, 32), classes=10), 0.25),
        (WideResNet(16, 2, classes=5), WideResNet(16, 2, base=4, classes=5), 0.25),
        (BitResNet((1, 1), classes=7), BitResNet((1, 1), base=8, classes=7), 1 / 8),
    ):
        narrow(made, width)
        assert made(torch.randn(2, 3, 32, 32)).shape == own(torch.randn(2, 3, 32, 32)).shape
        assert {name: w.shape for name, w in made.state_dict().items()} == {
            name: w.shape for name, w in own.state_dict().items()
        }


def test_the_resnet_without_additions_in_place_is_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is missing: pip install torchvision")
    theirs = models.resnet50(num_classes=10).eval()
    ours = out_of_place(10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


# ---------------------------------------------------------------- loops


@pytest.mark.parametrize(
    "released, options",
    [
        *((released, SandIOptions()) for released in (False, True)),
        (True, SandIOptions(combine="union")),
        (False, SandIOptions(combine="intersection", steps=3)),
    ],
)
@pytest.mark.parametrize("name", ["resnet18", pytest.param("wrn40-2", marks=pytest.mark.slow)])
def test_loops_give_the_counts_of_sandi_z(name: str, released: bool, options: SandIOptions) -> None:
    network = small(name)
    net = network.build(NARROW[name]).double()
    splits = network.splits(net, "paper")
    loop = SplitLoop(net, splits, options, released=released)
    images = images_for(network)
    detector = SandI(net, splits=splits, **asdict(options))
    expected = detector.densities(images)
    found = loop.densities(images)
    assert found.keys() == expected.keys()
    for split in splits:
        torch.testing.assert_close(found[split], expected[split], rtol=0, atol=1e-12)
    pred, tau = loop(images)
    assert torch.equal(pred, detector(images)[0])
    torch.testing.assert_close(tau, detector(images)[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "released, options", [(False, SandIOptions("A")), (True, SandIOptions("A", steps=1, top_fraction=1.0))]
)
@pytest.mark.parametrize("name", [pytest.param("bit-s-r101x1", marks=pytest.mark.slow), "resnet50"])
def test_loops_give_the_averages_of_sandi_a(name: str, released: bool, options: SandIOptions) -> None:
    network = small(name)
    net = network.build(NARROW[name]).double()
    splits = network.splits(net, "paper")
    loop = SplitLoop(net, splits, options, feature=network.architecture.paper_feature, released=released)
    images = images_for(network)
    assert network.architecture.paper_feature is not None
    expected = SandI(net, splits=splits, feature=network.architecture.paper_feature, **asdict(options)).densities(
        images
    )
    found = loop.densities(images)
    assert found.keys() == expected.keys()
    for split in splits:
        torch.testing.assert_close(found[split], expected[split], rtol=1e-9, atol=1e-12)


def test_a_loop_for_a_needs_a_feature() -> None:
    with pytest.raises(ValueError, match="feature"):
        SplitLoop(nn.Identity(), [], SandIOptions("A"))


def test_loops_leave_the_network_as_it_was() -> None:
    network = small("resnet18")
    net = network.build(NARROW["resnet18"])
    images = images_for(network).float()
    before = net(images)
    SplitLoop(net, ["layer3.0.bn1"], SandIOptions(), released=True)(images)
    with pytest.raises(RuntimeError, match="stop"), Prefix(net).kept():
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or "forward" in vars(module) for module in net.modules())
    assert torch.equal(net(images), before) and before.requires_grad


def chain() -> nn.Sequential:
    """Three 1x1 convolutions of 4 channels, of equal cost, and a classifier."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 1, bias=False), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2, bias=False))


def test_loops_spend_what_they_say() -> None:
    net, images = chain(), torch.randn(5, 4, 8, 8)
    convolution = 2 * 5 * 64 * 4 * 4  # a multiplication and an addition for each of 4 x 4 weights at 64 positions
    linear = 2 * 5 * 4 * 2
    # Splits behind the first and the second convolution. A forward pass has 3 convolutions, their suffixes 2 and 1.
    prediction = 3 * convolution + linear
    suffixes = (2 + 1) * convolution + 2 * linear
    naive = count(lambda: SplitLoop(net, ["0", "2"], SandIOptions())(images), CPU)
    # two whole passes for each split; two backward passes in the first step, one in the last
    assert naive.flops == prediction + 4 * (3 * convolution + linear) + 3 * suffixes
    released = count(lambda: SplitLoop(net, ["0", "2"], SandIOptions(), released=True)(images), CPU)
    prefixes = (1 + 2) * convolution
    # the prefix once; the suffix and two backward passes in both steps
    assert released.flops == prediction + prefixes + 2 * 3 * suffixes


# ---------------------------------------------------------------- counting


def test_counts_of_a_hand_worked_example() -> None:
    net, images = chain(), torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        forward = count(lambda: net(images), CPU)
    assert forward.flops == 3 * 2 * 5 * 64 * 16 + 2 * 5 * 8
    # 3 convolutions, 3 rectifiers, the mean over positions and the matrix product; flattening makes a view
    assert forward.launches == 8
    # The next layer's output is made while the last one's is still there, of 5 x 4 x 64 floats each.
    assert forward.peak_bytes == 2 * 5 * 4 * 64 * 4
    # Kept for the backward pass: what enters each convolution and what leaves each rectifier, the mean and the logits;
    # the third convolution's output is the last to go.
    kept = count(lambda: net(images), CPU)
    assert (kept.flops, kept.launches) == (forward.flops, forward.launches)
    assert 3 * 5 * 4 * 64 * 4 < kept.peak_bytes < 5 * 5 * 4 * 64 * 4


def test_counts_see_backward_passes_and_what_is_freed() -> None:
    weight = torch.randn(16, 32, requires_grad=True)
    x = torch.randn(8, 32)

    def work() -> None:
        for _ in range(3):
            torch.autograd.grad(F.linear(x, weight).sum(), weight)

    once, thrice = count(lambda: torch.autograd.grad(F.linear(x, weight).sum(), weight), CPU), count(work, CPU)
    assert once.flops == 2 * (2 * 8 * 16 * 32)
    assert (thrice.flops, thrice.launches) == (3 * once.flops, 3 * once.launches)
    assert once.peak_bytes <= thrice.peak_bytes <= once.peak_bytes + 8  # nothing piles up but the last loss


def test_differences_count_channels_and_compare_scores() -> None:
    expected = {"a": torch.tensor([[0.5, 0.25]], dtype=torch.float64), "b": torch.tensor([[1.0]], dtype=torch.float64)}
    assert measuring.differences(expected, expected, "Z") == (0, 0.0)
    other = {"a": torch.tensor([[0.5, 0.5]], dtype=torch.float64), "b": expected["b"] + 1e-15}
    differing, relative = measuring.differences(other, expected, "Z")
    assert differing == 1 and relative == pytest.approx(math.sqrt(1.5 / 1.3125) - 1)
    assert measuring.differences(other, expected, "A")[0] is None


@pytest.mark.parametrize("options", [{"steps": 1}, {"combine": "union"}], ids=str)
def test_what_is_read_off_one_forward_pass_keeps_a_byte_a_unit(options: dict[str, Any]) -> None:
    """At most 0.35 of what a forward pass holds that keeps its activations, narrow as the network may be."""
    torch.manual_seed(0)
    net = CifarResNet((3, 3, 3), (16, 32, 64), 10, padded=True).eval()
    x = torch.randn(4, 3, 32, 32)
    detector = SandI(net, variant="Z", **options)
    detector(x)
    assert detector.proved_share == 1
    assert count(lambda: detector(x), CPU).peak_bytes < 0.35 * count(lambda: net(x), CPU).peak_bytes


# ---------------------------------------------------------------- timing and report


def test_msps_share_is_that_of_the_same_network_and_batch() -> None:
    rows = [("a", "msp", 8, 1.5), ("a", "msp", 64, 1.0), ("a", "sandi-z", 8, 3.0), ("a", "sandi-z", 64, 4.0)]
    rows += [("b", "msp", 8, 2.0), ("b", "sandi-z", 8, 2.5), ("b", "sandi-z", 16, 2.5)]
    measured = [dict(zip(("network", "method", "batch", "forwards"), row, strict=True)) for row in rows]
    frame = report.table([{**row, "differing_counts": None, "score_difference": None} for row in measured])
    np.testing.assert_allclose(frame["of_msp"], [1, 1, 0.5, 0.25, 1, 0.8, np.nan])


# ---------------------------------------------------------------- scaling


def test_splits_are_chosen_evenly() -> None:
    assert scaling.evenly("abcdef", 3) == ["a", "c", "e"]
    assert scaling.evenly("abcdef", 1) == ["a"]
    assert scaling.evenly("abc", None) == ["a", "b", "c"]


def test_a_sweep_changes_one_thing_at_a_time() -> None:
    swept = scaling.sweeps(8, quick=False)
    base = scaling.Point(batch=8)
    for points in swept.values():
        changed = {key for _, point in points for key, value in asdict(point).items() if value != asdict(base)[key]}
        assert len(changed) == 1 and len({value for value, _ in points}) == len(points) > 3
    assert all(len(points) == 2 for points in scaling.sweeps(8, quick=True).values())


def test_a_point_is_measured_with_its_own_numbers() -> None:
    setting = measuring.Setting(CPU, turns=2, clock=time.perf_counter, width=1 / 16)
    few = scaling.measure_point(1, scaling.Point(splits=1, batch=2, size=8, blocks=1), setting)
    many = scaling.measure_point(9, scaling.Point(splits=9, batch=2, size=8, blocks=1), setting)
    assert [point["method"] for point in few] == [point["method"] for point in many]
    flops = {point["method"]: (point["flops"], more["flops"]) for point, more in zip(few, many, strict=True)}
    assert flops["naive-z"][1] > 5 * flops["naive-z"][0]
    assert all(name in measuring.METHODS for name in flops)
