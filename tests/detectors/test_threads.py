"""Several threads score with one network while another trains it: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import GradientShortCircuit, PrototypeFusion, SandI, SandIC
from openood_sandi.detectors.gaia import GAIA
from tests.helpers.cases import randomise

SCORING = 3
ROUNDS = 2


class Staged(nn.Module):
    """Three stages of a convolution, a batch norm and a ReLU each, the last two at half the resolution before.

    Behind each of its parts other threads have their turn, so that passes of several always overlap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage3 = (self.stage(*widths) for widths in ((3, 8, 1), (8, 16, 2), (16, 24, 2)))
        self.head = nn.Linear(24, 5)

    @staticmethod
    def stage(before: int, after: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, 3, stride, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.stage1, self.stage2, self.stage3):
            x = stage(x)
            time.sleep(2e-4)
        x = self.head(x.mean((2, 3)))
        time.sleep(2e-4)
        return x


def network() -> nn.Module:
    torch.manual_seed(0)
    net = Staged()
    randomise(net)
    return net.eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


TRAINING = (images(60, 1), torch.arange(60) % 5)


def as_fitted(kind: type, net: nn.Module, **options: Any) -> Any:
    """A detector that has been fitted and has not seen a batch yet, as OpenOOD's face makes one for each data set."""
    first, detector = kind(net, **options).fit([TRAINING], val=images(60, 2)), kind(net, **options)
    for name in kind.fitted:
        setattr(detector, name, getattr(first, name))
    return detector


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "S&I-Z": lambda net: SandI(net, variant="Z"),
    "union": lambda net: SandI(net, variant="Z", combine="union"),
    "S&I-A": lambda net: SandI(net, variant="A"),
    "GAIA": GAIA,
    "GSC": GradientShortCircuit,
    "GSC at a layer": lambda net: GradientShortCircuit(net, layer="last_stage", mask_ratio=0.1),
    "Prototype Fusion": lambda net: as_fitted(PrototypeFusion, net),
    "S&I-C": lambda net: as_fitted(SandIC, net, use_z="always"),
}
SLOW = ("S&I-Z",)
every_kind = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, make in KINDS.items()]
)


@pytest.fixture(autouse=True)
def threads_that_alternate() -> Iterator[None]:
    """Hundreds of changes of thread a pass, in place of none."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(jobs: list[Callable[[], None]]) -> None:
    """Runs all jobs at once, and raises what the first of them to fail has raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def trains(net: nn.Module, rounds: int) -> Callable[[], None]:
    """A job that trains at a rate of zero: the weights are written, and stay what they are."""
    x = images(4, 9)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.0)
    optimiser.zero_grad()
    net(x).square().sum().backward()
    right = [parameter.grad.clone() for parameter in net.parameters()]

    def train() -> None:
        for _ in range(rounds):
            optimiser.zero_grad()
            net(x).square().sum().backward()
            for parameter, gradient in zip(net.parameters(), right, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
            optimiser.step()

    return train


@every_kind
def test_threads_with_one_detector_and_one_that_trains(make: Callable[[nn.Module], Any]) -> None:
    """From the first batch on, when layers are looked for: a look at another thread's pass would find others."""
    net = network()
    alone = make(net)
    batches = [images(2 + k, 20 + k) for k in range(SCORING)]
    expected = [alone(x) for x in batches]
    for _ in range(ROUNDS):
        detector = make(net)

        def score(which: int, detector: Any = detector) -> None:
            for _ in range(2):
                pred, found = detector(batches[which])
                assert torch.equal(pred, expected[which][0])
                torch.testing.assert_close(found, expected[which][1], rtol=0, atol=0)

        together([*(lambda k=k: score(k) for k in range(SCORING)), trains(net, 6)])


@every_kind
def test_threads_with_a_detector_each(make: Callable[[nn.Module], Any]) -> None:
    net = network()
    batches = [images(3, 30 + k) for k in range(SCORING)]
    expected = [make(net)(x)[1] for x in batches]
    detectors = [make(net) for _ in range(SCORING)]

    def score(which: int) -> None:
        torch.testing.assert_close(detectors[which](batches[which])[1], expected[which], rtol=0, atol=0)

    together([lambda k=k: score(k) for k in range(SCORING)])
