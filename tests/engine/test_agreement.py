"""A detector scores what a function mode cannot see into as the reference scores the same function written openly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openood_sandi import SandI
from tests.helpers.cases import prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.trap_networks import WIDTH, Block, conv

STEP = 0.05


class _Weighted(torch.autograd.Function):
    """Its backward names the channels by their dimension, counted from the front."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.arange(1, WIDTH + 1).to(grad).view(-1, 1, 1).expand(grad.shape[1], 1, 1)


class Weighted(Block):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return _Weighted.apply(y)


class WeightedOpenly(Block):
    """The same backward, by a term of value zero."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        weights = torch.arange(1, WIDTH + 1).to(y).view(-1, 1, 1)
        return y.detach().square() + weights * (y - y.detach())


class Squared(nn.Module):
    """Something that torch's function mode cannot see into once it is scripted or traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("gain", torch.full((), 0.5))

    def forward(self, y: Tensor) -> Tensor:
        return F.relu(self.conv(y)) * self.gain


class Residual(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = Squared()

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.inner(y)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda module: torch.jit.trace(module, module.conv.weight)])
@pytest.mark.parametrize("options", [{"variant": "Z", "steps": 3}, {"variant": "A", "feature": "feature"}])
def test_torchscript_inside(compiled: Callable[[nn.Module], nn.Module], options: dict[str, Any]) -> None:
    """A network with a submodule that no hook can be set on."""
    net, x = prepared(Residual)
    net.inner = compiled(net.inner)
    detector = SandI(net, step_size=STEP, **options)
    tau = detector(x)[1]
    right = Reference(net, x, detector.split_names, Options(step_size=STEP, **options)).tau()
    torch.testing.assert_close(tau, right, rtol=1e-9, atol=0)


class Open(Block):
    """A convolution and a norm, checkpointed by its subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.norm2 = conv(), nn.BatchNorm2d(WIDTH)

    def inner(self, y: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(y)))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(y)


class Reentrant(Open):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(self.inner, y, use_reentrant=True)


class NonReentrant(Open):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(self.inner, y, use_reentrant=False)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", ["Z", "A"])
@pytest.mark.parametrize("hidden, openly", [(Weighted, WeightedOpenly), (Reentrant, Open), (NonReentrant, Open)])
def test_what_fails_in_the_backward_pass_takes_whole_passes(
    hidden: Callable[[], nn.Module], openly: Callable[[], nn.Module], variant: str
) -> None:
    net, x = prepared(hidden)
    seen = prepared(openly)[0]
    seen.load_state_dict(net.state_dict())
    detector = SandI(net, variant=variant, step_size=STEP)
    tau = detector(x)[1]
    options = Options(variant, step_size=STEP, feature=detector.feature_name or "")
    right = Reference(seen, x, detector.split_names, options).tau()
    torch.testing.assert_close(tau, right, rtol=1e-9, atol=0)


class Drops(Block):
    """The same elements in every pass, whatever else is random."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(0)
        return F.dropout(y, 0.5, True)


def test_copies_drop_what_the_clean_tensor_drops() -> None:
    net, x = prepared(Drops)
    detector = SandI(net, variant="Z", step_size=STEP)
    tau = detector(x)[1]
    torch.testing.assert_close(tau, Reference(net, x, detector.split_names, Options(step_size=STEP)).tau())
