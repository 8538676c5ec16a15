"""Wrappers for several devices are looked through, around a network and inside it, and the log says so once."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import GradientShortCircuit, PrototypeFusion, SandI, SandIC
from openood_sandi.engine.wrappers import unwrapped
from tests.helpers.cases import prepared
from tests.helpers.trap_networks import Block

pytestmark = pytest.mark.usefixtures("process_group")


def distributed(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net.requires_grad_(True))


Wrap = Callable[[nn.Module], nn.Module]
WRAPS: dict[str, Wrap] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": distributed,
    "compiled, for several devices": lambda net: nn.DataParallel(torch.compile(net)),
    "for several devices, compiled": lambda net: torch.compile(distributed(net)),
    "three": lambda net: distributed(nn.DataParallel(nn.DataParallel(net))),
    "inside": lambda net: nn.Sequential(nn.DataParallel(net)),
    "two inside": lambda net: nn.Sequential(distributed(nn.DataParallel(net))),
}
every_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


@every_wrap
def test_scores_are_those_of_the_network_and_one_line_says_so(wrap: Wrap, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net, x = prepared(Block)
    expected = SandI(net)(x)
    wrapped = wrap(net)
    for _ in range(2):  # as OpenOOD's face makes a detector for each data set
        found = SandI(wrapped)(x)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=0)
    told = [record for record in caplog.records if "looked through" in record.getMessage()]
    assert len(told) == 1 and told[0].levelno == logging.INFO
    assert "DataParallel" in told[0].getMessage() and "torchrun" in told[0].getMessage()


@pytest.mark.parametrize("kind", [SandI, GradientShortCircuit, PrototypeFusion, SandIC])
def test_every_detector_looks_through(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net, _ = prepared(Block)
    assert kind(nn.DataParallel(net)).net is net
    assert caplog.text.count("looked through") == 1


def test_a_network_without_wrappers_is_told_nothing_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net, x = prepared(Block)
    assert unwrapped(net) is net and unwrapped(torch.compile(net)) is net
    SandI(net)(x)
    assert "looked through" not in caplog.text


@pytest.mark.parametrize("wrap", [nn.DataParallel, distributed])
def test_a_wrapper_inside_is_not_run(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would split the batch among devices, in threads, or wait for other processes."""
    net, x = prepared(Block)
    outer = nn.Sequential(wrap(net), nn.Identity())
    expected = SandI(net, splits="norm*")(x)[1]

    def run(*_: object, **__: object) -> Tensor:
        raise AssertionError("the wrapper was run")

    monkeypatch.setattr(type(outer[0]), "forward", run)
    torch.testing.assert_close(SandI(outer)(x)[1], expected, rtol=1e-12, atol=0)


def test_a_layer_replaced_inside_a_wrapper_shows() -> None:
    net, x = prepared(Block)
    other = prepared(Block)[0]
    with torch.no_grad():
        other.conv1.weight.mul_(-1)
    outer = nn.Sequential(nn.DataParallel(net))
    detector = SandI(outer)
    detector(x)
    outer[0].module = other
    torch.testing.assert_close(detector(x)[1], SandI(other)(x)[1], rtol=1e-12, atol=0)


def test_a_detector_of_a_wrapped_network_is_pickled_without_the_wrapper() -> None:
    net, x = prepared(Block)
    detector = SandI(nn.DataParallel(net))
    again = pickle.loads(pickle.dumps(detector))
    torch.testing.assert_close(again(x)[1], detector(x)[1], rtol=0, atol=0)
    assert type(again.net) is Block
