"""Networks for the tests of twins, and what a twin has to be."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from openood_sandi.engine.twin import Twin
from tests.helpers.cases import prepared
from tests.helpers.surroundings import surroundings
from tests.helpers.trap_networks import Block


def assert_same(twin: Twin, x: Tensor) -> None:
    """The twin's logits are the network's, and leave it alone; its module is not the network."""
    before = surroundings(twin.net, x)
    with twin.use() as module, torch.enable_grad():
        assert module is not twin.net
        found = module(x.clone()).detach()
    assert surroundings(twin.net, x) == before
    with torch.no_grad():
        torch.testing.assert_close(found, copy.deepcopy(twin.net)(x.clone()), rtol=0, atol=0)


def trained() -> tuple[nn.Module, Tensor]:
    """A network as training leaves it: parameters that require gradients and have some, in eval mode."""
    net, x = prepared(Block)
    net.requires_grad_(True)
    net(x).sum().backward()
    return net, x


class Writing(Block):
    """Writes into buffers, by call and by assignment, into attributes and lists; all of it bears on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_mean", torch.zeros(8))
        self.constant, self.expanded = torch.ones(8).double(), torch.ones(1).double().expand(8)
        self.kept: list[Tensor] = []
        self.counts = {"passes": 0}
        self.newest: Tensor | None = None

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.average + self.constant * self.expanded + self.seen + self.counts["passes"] + len(self.kept)
        y = y / scale[:, None, None] + self.last_mean[:, None, None]
        y = y if self.newest is None else y + self.newest.mean()
        self.average.mul_(0.9).add_(y.detach().abs().mean((0, 2, 3)), alpha=0.1)
        self.seen += 1
        self.last_mean = y.detach().mean((0, 2, 3))
        self.constant.data.add_(1)  # which torch does not count
        self.counts["passes"] += 1
        self.kept.append(y)
        self.newest = y
        return y


class WithFile(Block):
    def __init__(self) -> None:
        super().__init__()
        self.log = (line for line in ())  # as open files and sockets, not to be copied
