"""The rectifier shortcut on a trained network and real images: every count is the exact engine's."""

from __future__ import annotations

import pytest
import torch

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
