"""A twin computes what its network computes, and follows every change of it."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from openood_sandi.engine.twin import Twin
from tests.helpers import networks
from tests.helpers.cases import build, images, prepared
from tests.helpers.trap_networks import Block
from tests.helpers.twins import assert_same, trained

# --- the same function, whatever the network is ---------------------------------------------------------------------


@pytest.mark.parametrize("case", [*networks.HANDMADE, *networks.OPENOOD], ids=lambda case: case.name)
def test_computes_the_same(case: Any) -> None:
    net, x = build(case), images(case, batch=2)
    net.requires_grad_(True)
    twin = Twin(net)
    assert_same(twin, x)
    assert not twin.shared and not any(parameter.requires_grad for parameter in twin.current().parameters())


class Tied(Block):
    """One parameter in two places, and one in a list that registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.again.weight = self.conv1.weight
        self.scales = [nn.Parameter(torch.ones(8, 1, 1).double()), {"bias": torch.zeros(8, 1, 1).double()}]
        self.blocks = [nn.BatchNorm2d(8).double().eval()]

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return self.blocks[0](self.again(y) * self.scales[0] + self.scales[1]["bias"])


class Parametrised(Block):
    def __init__(self, how: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv1 = how(self.conv1)


class OldFrozenBatchNorm(nn.Module):
    """As detection networks have it: all of its numbers are buffers."""

    def __init__(self, batch_norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(batch_norm, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class FrozenNorms(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = OldFrozenBatchNorm(self.norm1)


class Traced(Block):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.jit.trace(nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()), torch.zeros(1, 8, 4, 4))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.body(y)


class Guarded(Block):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with self.lock:
            return y


def from_methods() -> nn.Module:
    """Its forward and a hook are methods bound to the instance: copies are bound to the copy."""
    net = Block()

    def doubled(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * type(self).forward(self, x)

    net.forward = types.MethodType(doubled, net)
    net.norm1.register_forward_hook(functools.partial(types.MethodType(lambda self, *call: self.norm9(call[-1]), net)))
    return net


KINDS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "spectral_norm": lambda: Parametrised(parametrizations.spectral_norm),
    "weight_norm": lambda: Parametrised(parametrizations.weight_norm),
    "old spectral_norm": lambda: Parametrised(nn.utils.spectral_norm),
    "frozen batch norm": FrozenNorms,
    "traced": Traced,
    "lock": Guarded,
    "methods": from_methods,
    "fx": lambda: torch.fx.symbolic_trace(Block()),
    "compiled in place": Block,
    "compiled inside": Block,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_network_follow_their_weights(kind: str) -> None:
    net, x = prepared(KINDS[kind])
    net.requires_grad_(True)
    if kind == "compiled in place":
        net.compile(backend=lambda graph, inputs: pytest.fail("the compiled forward was run"))
    elif kind == "compiled inside":
        net.norm1 = torch.compile(net.norm1, backend="eager")
    twin = Twin(net)
    for _ in range(2):
        with twin.use() as module, torch.no_grad():
            found = module(x)
        eager = torch._dynamo.disable(net.forward) if kind.startswith("compiled") else net
        with torch.no_grad():
            torch.testing.assert_close(found, eager(x), rtol=1e-14, atol=1e-14)
            for tensor in [*net.parameters(), *net.buffers()]:
                if tensor.is_floating_point():
                    tensor.mul_(1.1)
    assert (module is not net and twin.current() is module) or kind == "old spectral_norm"
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_tied_parameters_stay_one() -> None:
    net, _ = prepared(Tied)
    module = Twin(net).current()
    assert module.again.weight is module.conv1.weight
    assert module.scales[0].data_ptr() == net.scales[0].data_ptr()
    assert module.blocks[0].weight.data_ptr() == net.blocks[0].weight.data_ptr()


@pytest.mark.parametrize("uses_it", [True, False], ids=["built and run", "built"])
def test_networks_made_under_inference_mode(uses_it: bool) -> None:
    with torch.inference_mode():
        net, x = prepared(Block)
    x = x.clone()
    twin = Twin(net)
    with torch.inference_mode(uses_it):
        module = twin.current()
    z = x.clone().requires_grad_()
    module(z).sum().backward()
    assert z.grad is not None and z.grad.any()
    with torch.inference_mode():
        net.head.weight.mul_(2)
        net.norm1.running_mean.add_(1)
        expected = net(x)
    assert twin.current() is module
    torch.testing.assert_close(module(x), expected.clone(), rtol=0, atol=0)


def test_lazy_layers_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()
    twin = Twin(net)
    with pytest.raises(ValueError, match=r"layer '1' is lazy.*run the network"):
        twin.current()
    x = torch.rand(2, 3, 4, 4)
    net(x)
    assert_same(twin, x)


# --- it follows the original ----------------------------------------------------------------------------------------


def _replace_submodule(net: nn.Module) -> None:
    net.norm1 = nn.Identity()


def _replace_parameter(net: nn.Module) -> None:
    net.conv1.weight = nn.Parameter(net.conv1.weight.detach() * 2)


def _assign_state(net: nn.Module) -> None:
    state = {name: value * 2 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def _replace_data(net: nn.Module) -> None:
    net.conv1.weight.data = net.conv1.weight.data * 2


def _swap_data(net: nn.Module) -> None:
    net.conv1.weight.data = net.conv1.weight.data.transpose(2, 3)


def _replace_buffer(net: nn.Module) -> None:
    net.norm1.running_mean = net.norm1.running_mean + 1


def _change_flag(net: nn.Module) -> None:
    net.norm1.train()
    net.norm1.momentum = 0.0  # its batch statistics are used, and its buffers stay


def _change_number(net: nn.Module) -> None:
    net.norm1.eps = 3.0


def _change_class(net: nn.Module) -> None:
    class Doubling(Block):
        def change(self, x: Tensor, y: Tensor) -> Tensor:
            return 2 * y

    net.__class__ = Doubling


def _add_hook(net: nn.Module) -> None:
    net.norm1.register_forward_hook(lambda module, args, output: -output)


def _add_and_remove_hook(net: nn.Module) -> None:
    net.norm1.register_forward_hook(lambda module, args, output: -output).remove()


REPLACEMENTS = [value for name, value in list(globals().items()) if name.startswith(("_replace", "_assign", "_swap"))]
REPLACEMENTS += [_change_flag, _change_number, _change_class, _add_hook, _add_and_remove_hook]


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda function: function.__name__)
def test_what_is_replaced_is_seen(replace: Callable[[nn.Module], None]) -> None:
    net, x = trained()
    twin = Twin(net)
    assert_same(twin, x)
    replace(net)
    assert_same(twin, x)


@pytest.mark.parametrize(
    "convert", [lambda net: net.float(), lambda net: net.to(torch.bfloat16), lambda net: net.half()]
)
def test_conversions_are_seen(convert: Callable[[nn.Module], nn.Module]) -> None:
    net, x = trained()
    twin = Twin(net)
    assert_same(twin, x)
    convert(net)
    assert_same(twin, x.to(net.stem.weight.dtype))


def test_what_is_written_in_place_is_seen_without_a_new_twin() -> None:
    net, x = trained()
    twin = Twin(net)
    module = twin.current()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.step()
        net.norm1.running_mean.add_(0.5)
        assert_same(twin, x)
        assert twin.current() is module


class CountingCalls(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class CountingKernels(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_nothing_to_do_costs_two_copies_of_the_buffers() -> None:
    net, x = trained()
    twin = Twin(net)
    with twin.use() as module:
        module(x)
    with CountingKernels() as kernels, CountingCalls() as calls, twin.use() as again:
        pass
    assert again is module and (calls.calls, kernels.calls) == (0, 2)


def _by_data(net: nn.Module, x: Tensor) -> None:
    net.norm1.running_mean.data.add_(1)


def _by_numpy(net: nn.Module, x: Tensor) -> None:
    net.norm1.running_mean.numpy()[:] += 1


def _by_batch_norm_under_inference_mode(net: nn.Module, x: Tensor) -> None:
    net.train()
    with torch.inference_mode():
        net(x)
    net.eval()


@pytest.mark.parametrize("write", [_by_data, _by_numpy, _by_batch_norm_under_inference_mode])
def test_writes_into_buffers_that_torch_does_not_count_are_seen(write: Callable[[nn.Module, Tensor], None]) -> None:
    net, x = trained()
    twin = Twin(net)
    assert_same(twin, x)
    version = net.norm1.running_mean._version
    write(net, x)
    assert net.norm1.running_mean._version == version
    assert_same(twin, x)
