"""Trained networks and real images: every count read is the exact engine's, and every tau between its bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from openood_sandi import SandI
from tests.helpers import real_images

pytestmark = [pytest.mark.slow, real_images.needed]
IMAGES = 100  # of each of the two lists
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


@pytest.mark.parametrize("name", real_images.SETS)
@pytest.mark.parametrize(
    "make", [real_images.network, real_images.resnet56, real_images.resnet18], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("options", [{"steps": 2}, {"combine": "intersection"}], ids=str)
def test_tau_is_between_its_bounds(name: str, make: Callable[[], nn.Module], options: dict[str, object]) -> None:
    """Also where the lower one is an estimate, as it is in all of these: nothing dies within a step in them."""
    net, x = make(), real_images.load(name, 2)[0]
    bounds = SandI(net, variant="Z", **options).bounds(x)
    tau = SandI(net, variant="Z", rectifier_shortcut=False, **options)(x)[1]
    assert bool((bounds.low <= tau).all()) and bool((tau <= bounds.high).all())
    assert bool((bounds.low < bounds.high).all()) and float((bounds.half_width / tau).max()) < 0.005
