"""timm's architectures: default split points, and gradients there equal to the naive reference in float64.

One small architecture of each family; the whole list and its outcome are in docs/timm.md.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

pytest.importorskip("timm", reason="timm is not installed: pip install openood-sandi[test]")

import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers import timm_families
from tests.helpers.naive_splits import Naive

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # timm's own

#: Where an error that says where and what to do is right: {(architecture, variant): a part of it}.
REFUSED: dict[tuple[str, str], str] = {}


@lru_cache(maxsize=1)  # the variants of one network follow each other
def network(name: str) -> tuple[nn.Module, Tensor]:
    return timm_families.build(name)


@pytest.mark.parametrize("variant", ["Z", "A"])
@pytest.mark.parametrize("name", timm_families.QUICK)
def test_default_splits_have_the_gradients_of_the_reference(name: str, variant: str) -> None:
    outcome = timm_families.examine(*network(name), variant)
    refusal = REFUSED.get((name, variant))
    if refusal is None:
        assert outcome.result == "equal", outcome
    else:
        assert outcome.result.startswith("refused: ") and refusal in outcome.result, outcome


@pytest.mark.parametrize("name", [name for name in timm_families.QUICK if name.startswith("test_")])
def test_densities_of_the_detector_are_those_of_the_reference(name: str) -> None:
    net, x = network(name)
    z, a = SandI(net, variant="Z"), SandI(net, variant="A")
    for detector in (z, a):
        found = detector.densities(x)
        splits, feature = timm_families.chosen(net, x, detector.variant)
        assert tuple(split.name for split in splits) == detector.split_names
        naive, split = Naive(net, x, feature), splits[len(splits) // 2]
        by_channel = split.by_channel(torch.stack(naive.gradients(split)), lead=1)  # (T, B, K, positions)
        if feature is None:
            expected = (by_channel != 0).double().mean((0, 3))
        else:
            outer = feature.by_channel(torch.stack(naive.output_gradients()), lead=1).mean((0, 3)).abs().mean(1)
            expected = by_channel.mean((0, 3)).abs() / outer.sqrt()[:, None]
        torch.testing.assert_close(found[split.name], expected, rtol=1e-9, atol=1e-9 * float(expected.max()))


def test_a_wrong_gradient_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = timm_families._gradients

    def spoilt(*arguments: object) -> object:
        return {site: [gradient * (1 + 1e-8) for gradient in gs] for site, gs in taken(*arguments).items()}

    monkeypatch.setattr(timm_families, "_gradients", spoilt)
    assert timm_families.examine(*network("test_resnet"), "Z").result.startswith("differs by 1.0e-08")
