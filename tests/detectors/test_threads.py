"""Several threads score with one network while another trains it: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.every_detector import KINDS, images, made, network

SCORING = 3
ROUNDS = 2


SLOW = ("S&I-Z",)
every_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in KINDS]
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
def test_threads_with_one_detector_and_one_that_trains(name: str) -> None:
    """From the first batch on, when layers are looked for: a look at another thread's pass would find others."""
    net = network(pause=2e-4)
    alone = made(name, net)
    batches = [images(2 + k, 20 + k) for k in range(SCORING)]
    expected = [alone(x) for x in batches]
    for _ in range(ROUNDS):
        detector = made(name, net)

        def score(which: int, detector: Any = detector) -> None:
            for _ in range(2):
                pred, found = detector(batches[which])
                assert torch.equal(pred, expected[which][0])
                torch.testing.assert_close(found, expected[which][1], rtol=0, atol=0)

        together([*(lambda k=k: score(k) for k in range(SCORING)), trains(net, 6)])


@every_kind
def test_threads_with_a_detector_each(name: str) -> None:
    net = network(pause=2e-4)
    batches = [images(3, 30 + k) for k in range(SCORING)]
    expected = [made(name, net)(x)[1] for x in batches]
    detectors = [made(name, net) for _ in range(SCORING)]

    def score(which: int) -> None:
        torch.testing.assert_close(detectors[which](batches[which])[1], expected[which], rtol=0, atol=0)

    together([lambda k=k: score(k) for k in range(SCORING)])
