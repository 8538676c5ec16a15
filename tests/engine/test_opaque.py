"""Changes inside what a network keeps and copies as one piece are seen in the next batch."""

from __future__ import annotations

import array
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openood_sandi import SandI
from openood_sandi.engine.contents import Contents
from openood_sandi.engine.opaque import states
from tests.helpers.cases import prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.trap_networks import Block


@dataclass(slots=True)
class Slots:
    gain: float = 1.0


class OwnCopy:
    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        return OwnCopy(self.gain)


class Gained(Block):
    """Its branch is multiplied by a number that it finds in ``kept``."""

    kept: Any
    read: Callable[[Any], float]

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y * type(self).read(self.kept) + x


def first(kept: Any) -> float:
    return float(kept[0])


def gain(kept: Any) -> float:
    return float(kept.gain)


def write_first(kept: Any) -> None:
    kept[0] = -2.0


def write_gain(kept: Any) -> None:
    kept.gain = -2.0


@pytest.mark.parametrize(
    "make, read, write",
    [
        (lambda: np.ones(2), first, write_first),
        (lambda: array.array("d", [1.0]), first, write_first),
        (lambda: types.SimpleNamespace(gain=1.0), gain, write_gain),
        (Slots, gain, write_gain),
        (OwnCopy, gain, write_gain),
        (lambda: {"a": [np.ones(1)]}, lambda kept: first(kept["a"][0]), lambda kept: write_first(kept["a"][0])),
        (
            lambda: torch.eye(2, dtype=torch.float64).to_sparse(),
            lambda kept: first(kept.to_dense()[0]),
            lambda kept: kept._values().fill_(-2.0),
        ),
    ],
)
def test_changes_in_place(
    make: Callable[[], Any], read: Callable[[Any], float], write: Callable[[Any], object]
) -> None:
    net, x = prepared(type("OfThisKind", (Gained,), {"read": staticmethod(read), "kept": make()}))
    net.kept = make()
    detector = SandI(net, variant="Z", step_size=0.05)
    before = detector(x)[1]
    write(net.kept)
    after = detector(x)[1]
    assert not torch.equal(before, after)
    right = Reference(net, x, detector.split_names, Options(step_size=0.05)).tau()
    torch.testing.assert_close(after, right, rtol=1e-9, atol=0)


def test_what_tells_of_no_change_is_not_looked_into() -> None:
    """Nothing is pickled of common networks, and of an object that refers to tensors and modules not these."""
    torchvision = pytest.importorskip("torchvision.models")
    assert not Contents(torchvision.resnet18())._opaque
    (state,) = states([types.SimpleNamespace(net=torchvision.resnet18(), table=torch.zeros(10_000))])
    assert state is not None and len(state) < 500


def test_what_cannot_be_pickled_is_taken_to_be_constant() -> None:
    assert states([types.SimpleNamespace(lines=(line for line in ()))]) == [None]
