"""What a pass leaves on the network has no part in the next one: scores are those of the network as it was found."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.cases import prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.trap_networks import WIDTH, Block

STEP = 0.05


def mean_of(y: Tensor) -> Tensor:
    return y.mean((2, 3), keepdim=True)


class KeepsFirst(Block):
    """Stores at its first pass, with its gradient, what later ones use."""

    first: Tensor | None = None

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        if self.first is None:
            self.first = mean_of(y)
        return y - self.first / 2


class Averages(Block):
    """An exponential average with its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(1, WIDTH, 1, 1))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * mean_of(y)
        return y - self.average


class History(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append(y)
        return y + 0.3 * self.seen[0] + 0.1 * len(self.seen)


class Counts(Block):
    passes = 0

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.passes += 1
        return y * self.passes if self.passes % 2 else y.tanh()


class Caches(Block):
    """Something of the size of its images, made when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.ramps: dict[int, Tensor] = {}

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        width = y.shape[-1]
        if width not in self.ramps:
            self.ramps[width] = torch.linspace(0, 1, width).to(y)
        return y * self.ramps[width]


class ReplacesData(Block):
    """Its weight is another one after each pass, by another piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.2, 1, WIDTH))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.gain.data = self.gain.data * 0.9
        return y * self.gain[:, None, None]


class WritesBefore(Averages):
    """In place, and uses what it has written."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1)
        return y - self.average


class WritesImages(Averages):
    """In place, what autograd follows: the buffer becomes part of the pass's graph."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 + 0 * y.mean())
        return y - self.average


class WritesAfter(Averages):
    """In place, and has used what was there, by a little that a look at tolerances would not see."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        y = y * (1 + self.average)
        self.average.add_(1e-9)
        return y


class WritesUncounted(Averages):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        y = y * (1 + self.average)
        self.average.data.add_(1e-9)
        return y


REPLAYED = [KeepsFirst, Averages, History, Counts, Caches, ReplacesData]
PLAIN = [WritesBefore, WritesImages, WritesAfter, WritesUncounted]
OPTIONS: list[dict[str, Any]] = [
    {"variant": "Z", "steps": 2, "rectifier_shortcut": True},
    {"variant": "Z", "steps": 3, "combine": "intersection", "rectifier_shortcut": False},
    {"variant": "A", "steps": 3},
    {"variant": "A", "steps": 2, "splitting": False},
]


def not_yet_run(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    used, x = prepared(make)
    net = make().double().eval()
    net.load_state_dict({name: value for name, value in used.state_dict().items() if name != "average"}, strict=False)
    return net, x


def starting_anew(net: nn.Module) -> nn.Module:
    """A network each of whose passes is one over a copy of ``net`` as it is now, but for the hooks set on it."""
    fresh = copy.deepcopy(net)

    def restart(module: nn.Module, args: Any) -> None:
        found = dict(copy.deepcopy(fresh).named_modules())
        for name, part in module.named_modules():
            kept = {key: value for key, value in vars(part).items() if key.endswith("_hooks") or key == "_modules"}
            vars(part).clear()
            vars(part).update({**vars(found[name]), **kept})

    net.register_forward_pre_hook(restart)
    return net


@pytest.mark.parametrize("options", OPTIONS, ids=["Z", "every gradient", "A", "input"])
@pytest.mark.parametrize("make", [*REPLAYED, *PLAIN])
def test_every_pass_starts_from_the_state_that_was_found(
    make: Callable[[], nn.Module], options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    net, x = not_yet_run(make)
    detector = SandI(net, step_size=STEP, memory_fraction=1e-9, **options)  # one image, one split at a time
    with caplog.at_level(logging.WARNING):
        for batch in (x, 2 * x[:1]):
            tau = detector(batch)[1]
            chosen = {name: value for name, value in options.items() if name != "rectifier_shortcut"}
            asked = Options(**chosen, step_size=STEP, feature=detector.feature_name or "")
            right = Reference(starting_anew(copy.deepcopy(net)), batch, detector.split_names, asked).tau()
            torch.testing.assert_close(tau, right, rtol=1e-9, atol=0)
    told = [record.getMessage() for record in caplog.records]
    assert bool(told) == (make in PLAIN)
    assert all("writes into 'average' in place" in line for line in told)


def test_parts_of_a_batch_start_from_one_state() -> None:
    net, x = not_yet_run(Averages)
    x = torch.cat([x, 2 * x, 3 * x])
    whole, parts = SandI(net, variant="A"), SandI(net, variant="A", memory_fraction=1e-9)
    torch.testing.assert_close(parts(x)[1], whole(x)[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(whole(x)[1], whole(x)[1], rtol=0, atol=0)
