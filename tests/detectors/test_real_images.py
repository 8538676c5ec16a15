"""Trained networks and real images: every count read is the exact engine's, and every tau between its bounds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers import real_images
from tests.helpers.networks import openood_network
from tests.helpers.places import CHECKPOINTS

pytestmark = [pytest.mark.slow, real_images.needed]
IMAGES = 50  # of each of the two lists
BATCH = 25  # several batches: what the first shows is only sampled later


@pytest.mark.parametrize("name", real_images.SETS)
@pytest.mark.parametrize("combine", ["count", "union"])
def test_counts_are_those_of_the_exact_engine(name: str, combine: str) -> None:
    images, labels = real_images.load(name, IMAGES)
    net = real_images.network()
    quick = SandI(net, variant="Z", combine=combine)
    exact = SandI(net, variant="Z", combine=combine, rectifier_shortcut=False)
    right = 0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        expected = exact.densities(x)
        for split, density in quick.densities(x).items():
            assert torch.equal(density, expected[split]), split
        right += int((quick(x)[0] == y).sum())
    if name == "test_cifar10":
        assert right > 0.85 * IMAGES  # the weights and the pixels are what they should be


def weights(name: str) -> Path:
    file = CHECKPOINTS / name
    if not file.is_file():
        pytest.skip(f"needs {file}")
    return file


def densenet(classes: int) -> nn.Module:
    net: nn.Module = openood_network("densenet").DenseNet3(100, growth_rate=12, num_classes=classes)
    net.load_state_dict(torch.load(weights(f"cifar{classes}_densenet100.pt"), weights_only=True))
    return net.eval()


def mobilenet() -> nn.Module:
    """With batch norms folded into weights of 8 bits, so that thousands of weights are zero."""
    spec = importlib.util.spec_from_file_location("_mobilenet_v2", weights("mobilenet_v2.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net: nn.Module = module.MobileNetV2(weights("imagenet_mobilenet_v2.npz"))
    return net.eval()


def large(x: Tensor) -> Tensor:
    return F.interpolate(x, size=224, mode="bilinear")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[Tensor], Tensor]]] = {
    "resnet20": (lambda: real_images.network(20), 50, lambda x: x),
    "resnet56": (lambda: real_images.network(56), 20, lambda x: x),
    "densenet, 10 classes": (lambda: densenet(10), 10, lambda x: x),
    "densenet, 100 classes": (lambda: densenet(100), 10, lambda x: x),
    "mobilenet": (mobilenet, 2, large),
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_every_image_is_read_and_as_gradients_are(network: str) -> None:
    build, count, prepare = NETWORKS[network]
    net = build()
    quick = SandI(net, variant="Z", steps=1)
    exact = SandI(net, variant="Z", steps=1, rectifier_shortcut=False)
    for name in real_images.SETS:
        x = prepare(real_images.load(name, count)[0])
        expected = exact.densities(x)
        for split, density in quick.densities(x).items():
            assert torch.equal(density, expected[split]), split
    assert quick.proved_share == 1


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet56", "densenet, 10 classes", "mobilenet"])
def test_the_union_is_that_of_gradients_whether_dead_units_come_alive_or_not(network: str) -> None:
    build, count, prepare = NETWORKS[network]
    net, x = build(), prepare(real_images.load("test_cifar10", -(-count // 5))[0])
    quick = SandI(net, variant="Z", combine="union")
    expected = SandI(net, variant="Z", combine="union", rectifier_shortcut=False).densities(x)
    for split, density in quick.densities(x).items():
        assert torch.equal(density, expected[split]), split
    if network == "mobilenet":  # what depthwise channels have closed may open
        first = SandI(net, variant="Z", steps=1).densities(x)
        assert any(not torch.equal(first[split], density) for split, density in expected.items())
    else:
        assert quick.proved_share == 1


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet20", "resnet56", "resnet18"])
@pytest.mark.parametrize("name, combine", [*zip(real_images.SETS, ("count", "intersection"), strict=True)])
def test_tau_is_between_its_bounds(network: str, name: str, combine: str) -> None:
    """Also where the lower one is an estimate, as it is in all of these: nothing dies within a step in them."""
    net = real_images.resnet18() if network == "resnet18" else NETWORKS[network][0]()
    x = real_images.load(name, 2)[0]
    bounds = SandI(net, variant="Z", combine=combine).bounds(x)
    tau = SandI(net, variant="Z", combine=combine, rectifier_shortcut=False)(x)[1]
    assert bool((bounds.low <= tau).all()) and bool((tau <= bounds.high).all())
    assert bool((bounds.low < bounds.high).all()) and float((bounds.half_width / tau).max()) < 0.005
