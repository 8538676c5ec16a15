"""Counts of non-zero gradients are exact, however many positions a channel has and however they lie in memory."""

from __future__ import annotations

import pytest
import torch

from openood_sandi.detectors.sandi.densities import NonZeroDensity
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split


@pytest.mark.parametrize("combine", ["count", "union", "intersection"])
@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("shape", [(1, 7), (8, 8), (15, 17), (16, 16), (51, 40), (32, 64), (112, 112)])
def test_densities_are_the_shares_of_positions(shape: tuple[int, int], axis: int, combine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 5, *shape, generator=generator) < share for share in (0.5, 0.9))
    first[0, 0] = second[0, 0] = True  # as much as can be counted
    density = NonZeroDensity([Split(Site("layer", "layer", 1), axis)], 2, combine)
    for mask in (first, second):
        density.pattern(Site("layer", "layer", 1), mask.movedim(1, axis))
    both = {"count": (first.double() + second) / 2, "union": first | second, "intersection": first & second}[combine]
    torch.testing.assert_close(density.densities()["layer"], both.double().mean((2, 3)), rtol=1e-14, atol=0)
