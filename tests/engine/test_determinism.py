"""An image's score is its own: whatever its batch, its place, what was scored before, and how the work is cut up.

In float64 exactly, counts of non-zero gradients bit for bit. In float32 as exactly as torch computes the network: its
kernels for one image may round otherwise than those for several, and a rectifier whose input is that close to zero
then lets a position through or not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openood_sandi import SandI
from openood_sandi.runs.score import score_dataset
from tests.helpers import networks, real_images
from tests.helpers.cases import build, images

OPTIONS: dict[str, dict[str, Any]] = {
    "Z": {"variant": "Z"},
    "Z, one step": {"variant": "Z", "steps": 1},
    "Z, three steps": {"variant": "Z", "steps": 3},
    "Z, union": {"variant": "Z", "combine": "union"},
    "Z, every gradient": {"variant": "Z", "rectifier_shortcut": False, "combine": "intersection"},
    "Z, input only": {"variant": "Z", "splitting": False},
    "A": {"variant": "A"},
    "A, labels": {"variant": "A", "top_over": "labels", "ascent": "max_logit"},
}
NETWORKS = ("InPlaceResidual", "Dense", "Reused", "Grouped")
#: Every option on two of the networks, every network with half of the options.
PAIRS = [(name, option) for i, name in enumerate(NETWORKS) for j, option in enumerate(OPTIONS) if (i + j + j // 2) % 2]


def densities(detector: SandI, x: Tensor, order: Sequence[int], size: int) -> dict[str, Tensor]:
    """Those of all images in their own order, scored in another one in batches of ``size``."""
    found = [detector.densities(part) for part in x[list(order)].split(size)]
    back = torch.tensor(order).argsort()
    return {name: torch.cat([part[name] for part in found])[back] for name in found[0]}


def ways(count: int) -> dict[str, tuple[list[int], int, dict[str, Any]]]:
    """Orders, batch sizes and options that must not matter."""
    forwards = list(range(count))
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "one by one": (forwards, 1, {}),
        "three at a time, backwards": (forwards[::-1], 3, {}),
        "shuffled": (shuffled, 4, {}),
        "little memory": (forwards, count, {"memory_fraction": 1e-9}),
    }


def assert_independent(net: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    expected = SandI(net, **options).densities(x)
    for way, (order, size, more) in ways(len(x)).items():
        for name, found in densities(SandI(net, **options, **more), x, order, size).items():
            if options["variant"] == "Z":
                assert torch.equal(found, expected[name]), (way, name)
            else:
                torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12, msg=f"{way}: {name}")


@pytest.mark.parametrize("name, option", PAIRS)
def test_exact_in_float64(name: str, option: str) -> None:
    (case,) = (case for case in networks.HANDMADE if case.name == name)
    x = torch.cat([images(case, seed=seed) for seed in range(2)])
    assert_independent(build(case), x, OPTIONS[option])


@functools.cache
def trained() -> tuple[nn.Module, Tensor]:
    """A ResNet-20 trained on CIFAR-10, with images that it knows and textures."""
    return real_images.network(), torch.cat([real_images.load(name, 8)[0] for name in real_images.SETS])


@pytest.mark.slow
@real_images.needed
@pytest.mark.parametrize("name", ["Z", "Z, three steps", "Z, union", "A"])
def test_exact_in_float64_on_a_trained_network(name: str) -> None:
    # every gradient at all 19 splits would take minutes
    options = OPTIONS[name] | ({"splits": "layer3.*"} if name == "Z, three steps" else {})
    net, x = trained()
    try:
        assert_independent(net.double(), x.double(), options)
    finally:
        net.float()


@pytest.mark.slow
@real_images.needed
@pytest.mark.parametrize("name", ["Z", "A"])
def test_in_float32_to_a_thousandth(name: str) -> None:
    net, x = trained()
    expected = SandI(net, **OPTIONS[name])(x)[1]
    for order, size, more in ways(len(x)).values():
        detector = SandI(net, **OPTIONS[name], **more)
        found = torch.cat([detector(part)[1] for part in x[order].split(size)])
        torch.testing.assert_close(found, expected[order], rtol=1e-3, atol=0)


def test_the_number_of_loading_processes_does_not_matter() -> None:
    (case,) = (case for case in networks.HANDMADE if case.name == "InPlaceResidual")
    net = build(case).float()
    data = TensorDataset(torch.cat([images(case, seed=seed) for seed in range(4)]).float(), torch.arange(12))
    runs = [
        score_dataset(
            SandI(net, variant="Z"), DataLoader(data, batch_size=5, num_workers=workers), "cpu", progress=False
        )
        for workers in (0, 2)
    ]
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            assert found.tobytes() == expected.tobytes() and found.dtype == expected.dtype
