"""Threads may score, predict and train with one network at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi.engine.threads import in_this_thread
from openood_sandi.engine.twin import Twin
from tests.helpers.cases import prepared
from tests.helpers.trap_networks import Block
from tests.helpers.twins import WithFile, Writing, trained


def gradients(twin: Twin, x: Tensor) -> Tensor:
    """Of the largest logits by the output of norm1, through a hook as the engine's."""
    leaves: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    with twin.use() as net:
        handle = net.norm1.register_forward_hook(in_this_thread(replace))
        try:
            logits = net(x)
            return torch.autograd.grad(logits.max(1).values.sum(), leaves[0])[0]
        finally:
            handle.remove()


@contextmanager
def running(job: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Repeats ``job`` in another thread meanwhile; what it raises."""
    done, errors = threading.Event(), []

    def repeat() -> None:
        try:
            while not done.is_set():
                job()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("make", [Block, Writing, WithFile], ids=lambda make: make.__name__)
@pytest.mark.parametrize("one", [True, False], ids=["one twin", "a twin each"])
def test_two_threads_score(make: Callable[[], nn.Module], one: bool) -> None:
    net, x = prepared(make)
    net.requires_grad_(True)
    twin = Twin(net)
    other = twin if one else Twin(net)
    right = gradients(Twin(net), x), gradients(Twin(net), x * 2)

    def score() -> None:
        torch.testing.assert_close(gradients(other, x * 2), right[1], rtol=0, atol=0)

    with running(score) as errors:
        for _ in range(60):
            torch.testing.assert_close(gradients(twin, x), right[0], rtol=0, atol=0)
    assert not errors
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not net.norm1._forward_hooks


@pytest.mark.parametrize("make", [Block, WithFile], ids=lambda make: make.__name__)
def test_predicting_beside(make: Callable[[], nn.Module]) -> None:
    net, x = prepared(make)
    twin = Twin(net)
    right, logits = gradients(Twin(net), x), net(x)

    def predict() -> None:
        found = net(x)
        assert not found.requires_grad
        torch.testing.assert_close(found, logits, rtol=0, atol=0)

    with running(predict) as errors:
        for _ in range(60):
            torch.testing.assert_close(gradients(twin, x), right, rtol=0, atol=0)
    assert not errors


def test_training_beside() -> None:
    """With a rate of zero: the weights are written, and stay what they are."""
    net, x = trained()
    twin, optimiser = Twin(net), torch.optim.SGD(net.parameters(), lr=0.0)
    right = gradients(Twin(net), x)

    def train() -> None:
        optimiser.zero_grad()
        net(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        optimiser.step()

    with running(train) as errors:
        for _ in range(60):
            torch.testing.assert_close(gradients(twin, x), right, rtol=0, atol=0)
    assert not errors


def test_weights_updated_meanwhile_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    net, _ = trained()
    twin = Twin(net)
    for _ in range(2):
        with twin.use(), torch.no_grad():
            net.conv1.weight.add_(1)
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "updated while" in caplog.text


class Meanwhile:
    """Has its jobs done by another thread, one each time that it is copied."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []

    def __deepcopy__(self, memo: Any) -> Meanwhile:
        if self.jobs:
            thread = threading.Thread(target=self.jobs.pop())
            thread.start()
            thread.join()
        return self


class Keeping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.meanwhile, self.newest = Meanwhile(), torch.zeros(1)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.newest = y
        return y


def test_features_kept_by_a_predicting_thread_do_not_cost_the_twin() -> None:
    """A forward pass replaces an attribute, graph and all, while the twin is made, and while it is made again."""
    net, x = prepared(Keeping)
    net.requires_grad_(True)
    right = gradients(Twin(net), x)
    net.meanwhile.jobs += [lambda: net(x)] * 2
    twin = Twin(net)
    torch.testing.assert_close(gradients(twin, x), right, rtol=0, atol=0)
    assert not net.meanwhile.jobs and net.newest.grad_fn is not None
    assert not twin.shared
