"""Any change of weights is seen, by whatever way it was made."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from openood_sandi.engine.devices import fetch
from openood_sandi.engine.fingerprint import Fingerprint
from openood_sandi.engine.network import Weights
from tests.helpers.cases import prepared
from tests.helpers.foreign_device import OnDevice, foreign_device


def told(fingerprint: Fingerprint) -> tuple[bytes, ...]:
    """What ``fingerprint`` says by reading, without the counts of writes."""
    return Weights.values(fingerprint.sums())


def _weights() -> Tensor:
    weights = torch.randn(70, 41, generator=torch.Generator().manual_seed(0))
    weights[3, 5] = 1e-20
    weights[8] = 0
    return weights


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.mul_(0.5),
    "by .data": lambda w: w.data.mul_(0.5),
    "by .numpy()": lambda w: w.view(torch.uint8).numpy().__setitem__((2, 3), 77),
    "a weight too small to matter to a norm": lambda w: w.data[3, 5].zero_(),
    "one bit": lambda w: w.data.view(torch.uint8)[4, 4].bitwise_xor_(1),
    "the last element": lambda w: w.data[-1, -1].add_(1),
    "signs": lambda w: w.data.neg_(),
    "a row that moves": lambda w: w.data.copy_(w.roll(1, 0)),
    "columns that change places": lambda w: w.data.copy_(w.flip(1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_shows(change: Callable[[Tensor], object], dtype: torch.dtype) -> None:
    weights = _weights().to(dtype)
    others = [torch.ones(3), weights]
    fingerprint = Fingerprint(others)
    before = told(fingerprint)
    assert told(fingerprint) == before
    change(weights)
    assert told(fingerprint) != before
    assert told(fingerprint) == told(Fingerprint(others))


@pytest.mark.parametrize("lay", [lambda w: w.t(), lambda w: w[::2, 3:], lambda w: w[1:2].expand(5, -1)])
def test_however_a_tensor_lies(lay: Callable[[Tensor], Tensor]) -> None:
    weights = lay(_weights())
    fingerprint = Fingerprint([weights, weights])
    before = told(fingerprint)
    weights.data[1, 2] += 1
    assert told(fingerprint) != before


def test_tensors_made_under_inference_mode_and_integers() -> None:
    with torch.inference_mode():
        weights, table = torch.ones(4), torch.arange(4)
    fingerprint = Fingerprint([weights, table])
    before = told(fingerprint)
    with torch.inference_mode():
        table[2] = 9
    assert told(fingerprint) != before


def test_sparse_tensors_are_counted() -> None:
    weights = torch.eye(3).to_sparse()
    fingerprint = Fingerprint([weights])
    before = fingerprint.counts()
    weights.mul_(2)
    assert fingerprint.counts() != before


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        logits: Tensor = self.head(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))
        return logits


def test_a_proof_does_not_outlive_weights_too_small_to_matter() -> None:
    """Gradients by a weight of 1e-13 are not zero; by .data pruned, they are."""
    net, x = prepared(Sequence)
    net, x = net.float(), x.float()
    with torch.no_grad():
        net.conv2.weight[:, 0] = 1e-13
    detector = SandI(net, variant="Z")
    detector(x)
    assert detector.proved_share == 1
    net.conv2.weight.data[:, 0].zero_()
    right = SandI(copy.deepcopy(net), variant="Z", rectifier_shortcut=False)(x)[1]
    torch.testing.assert_close(detector(x)[1], right, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
def test_on_another_device(dtype: torch.dtype) -> None:
    with foreign_device():
        weights = _weights().to(dtype)
        fingerprint = Fingerprint([OnDevice(weights), OnDevice(weights.t())])
        before = Weights.values(fetch(*fingerprint.sums()))
        weights.data.copy_(weights.roll(1, 0))
        assert Weights.values(fetch(*fingerprint.sums())) != before
        assert len(before) == 1, "one look at the device"
