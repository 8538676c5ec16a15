"""A twin computes what its network computes, follows every change of it, and leaves no trace on it."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from openood_sandi.engine.threads import in_this_thread
from openood_sandi.engine.twin import Twin
from tests.helpers import networks
from tests.helpers.cases import build, images, prepared
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


@pytest.fixture
def trained() -> tuple[nn.Module, Tensor]:
    """A network as training leaves it: parameters that require gradients and have some, in eval mode."""
    net, x = prepared(Block)
    net.requires_grad_(True)
    net(x).sum().backward()
    return net, x


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
def test_what_is_replaced_is_seen(trained: tuple[nn.Module, Tensor], replace: Callable[[nn.Module], None]) -> None:
    net, x = trained
    twin = Twin(net)
    assert_same(twin, x)
    replace(net)
    assert_same(twin, x)


@pytest.mark.parametrize(
    "convert", [lambda net: net.float(), lambda net: net.to(torch.bfloat16), lambda net: net.half()]
)
def test_conversions_are_seen(trained: tuple[nn.Module, Tensor], convert: Callable[[nn.Module], nn.Module]) -> None:
    net, x = trained
    twin = Twin(net)
    assert_same(twin, x)
    convert(net)
    assert_same(twin, x.to(net.stem.weight.dtype))


def test_what_is_written_in_place_is_seen_without_a_new_twin(trained: tuple[nn.Module, Tensor]) -> None:
    net, x = trained
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


def test_nothing_to_do_costs_two_copies_of_the_buffers(trained: tuple[nn.Module, Tensor]) -> None:
    net, x = trained
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
def test_writes_into_buffers_that_torch_does_not_count_are_seen(
    trained: tuple[nn.Module, Tensor], write: Callable[[nn.Module, Tensor], None]
) -> None:
    net, x = trained
    twin = Twin(net)
    assert_same(twin, x)
    version = net.norm1.running_mean._version
    write(net, x)
    assert net.norm1.running_mean._version == version
    assert_same(twin, x)


# --- it leaves nothing behind ---------------------------------------------------------------------------------------


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


def test_what_forward_writes_is_undone_and_leaves_no_trace() -> None:
    net, x = prepared(Writing)
    net.requires_grad_(True)
    net(x)  # leaves tensors of autograd's graph on the network
    kept, last, constant = list(net.kept), net.newest, net.constant.clone()
    twin = Twin(net)
    for _ in range(3):
        before = surroundings(net, x)
        with twin.use() as module:
            found = module(x)
        assert surroundings(net, x) == before
        assert net.newest is last and list(map(id, net.kept)) == list(map(id, kept))
        torch.testing.assert_close(net.constant, constant, rtol=0, atol=0)
        assert all(tensor.grad_fn is None for tensor in [module.newest, *module.kept]), "tensors of a pass are let go"
        with torch.no_grad():
            original = Writing().double().eval()
            original.load_state_dict(net.state_dict())
            original.constant, original.kept, original.newest = constant.clone(), list(kept), last
            original.counts = dict(net.counts)
            torch.testing.assert_close(found, original(x), rtol=0, atol=0)


def test_the_callers_state_is_taken_anew_for_each_batch() -> None:
    net, x = prepared(Writing)
    twin = Twin(net)
    for _ in range(3):
        with torch.no_grad(), twin.use() as module:
            found = module(x)
            torch.testing.assert_close(found, net(x), rtol=0, atol=0)  # which writes on the network


def test_left_as_found_after_an_error(trained: tuple[nn.Module, Tensor]) -> None:
    net, x = trained
    twin = Twin(net)
    before = surroundings(net, x)
    with pytest.raises(KeyboardInterrupt), twin.use() as module:
        module.norm1.register_forward_hook(lambda *_: None)
        raise KeyboardInterrupt
    assert surroundings(net, x) == before
    assert not twin.current().norm1._forward_hooks
    assert_same(twin, x)


def test_freed_without_the_garbage_collector() -> None:
    net, x = prepared(Writing)
    net.norm1.register_forward_hook(lambda module, args, output: output)
    twin = Twin(net)
    with twin.use() as module:
        module(x)
    gc.collect()
    gc.disable()
    try:
        alive = [weakref.ref(net), weakref.ref(twin), weakref.ref(module)]
        del net, twin, module
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda twin: pickle.loads(pickle.dumps(twin))])
def test_copies_have_a_twin_of_their_own(trained: tuple[nn.Module, Tensor], copied: Callable[[Any], Any]) -> None:
    net, x = trained
    twin = Twin(net)
    twin.current()
    other_net, other = copied((net, twin))
    assert other.net is other_net and other.current() is not twin.current()
    assert_same(other, x)


# --- networks that have no twin ---------------------------------------------------------------------------------------


class WithFile(Block):
    def __init__(self) -> None:
        super().__init__()
        self.log = (line for line in ())  # as open files and sockets, not to be copied


def forward_by_closure() -> nn.Module:
    net = Block()
    plain = net.forward
    net.forward = lambda x: 2 * plain(x)
    return net


def hook_by_closure() -> nn.Module:
    net = Block()
    net.norm1.register_forward_hook(lambda module, args, output: net.norm9(output))
    return net


def weak_parent() -> nn.Module:
    net = Block()
    net.norm1.parent = weakref.ref(net)
    return net


GLOBAL_NET = Block().double().eval()


def forward_by_global() -> nn.Module:
    GLOBAL_NET.__dict__.pop("forward", None)
    GLOBAL_NET.forward = lambda x: Block.forward(GLOBAL_NET, x)
    return GLOBAL_NET


SHARED = {
    WithFile: r"cannot be copied \(TypeError: .*generator",
    forward_by_closure: r"function 'forward_by_closure.*holds on to",
    hook_by_closure: r"function 'hook_by_closure.*of layer 'norm1'.*holds on to",
    weak_parent: r"weak reference of layer 'norm1'",
    forward_by_global: r"function 'forward_by_global.*holds on to",
}


@pytest.mark.parametrize("make", SHARED, ids=lambda make: make.__name__)
def test_networks_without_a_twin_are_run_themselves(make: Callable[[], nn.Module]) -> None:
    net, x = prepared(make)
    net.requires_grad_(True)
    twin = Twin(net)
    assert twin.shared and re.search(SHARED[make], twin.why_shared), twin.why_shared
    tensors = {name: (value.clone(), value.requires_grad) for name, value in net.state_dict(keep_vars=True).items()}
    with twin.use() as module:
        assert module is net
        module(x)
        net.norm1.running_mean.add_(1)
        net.norm9.running_mean = torch.zeros(8).double()
        net.extra = x
    for name, value in net.state_dict(keep_vars=True).items():
        torch.testing.assert_close(value.detach(), tensors[name][0].detach(), rtol=0, atol=0)
        assert value.requires_grad == tensors[name][1]
    assert not hasattr(net, "extra")


def test_a_reason_that_is_gone_gives_a_twin() -> None:
    net, x = prepared(WithFile)
    twin = Twin(net)
    assert twin.shared
    net.log = None
    assert not twin.shared
    assert_same(twin, x)


def test_without_a_twin_what_cannot_be_run_is_refused() -> None:
    net, _ = prepared(WithFile)
    net.compile(backend="eager")
    with pytest.raises(ValueError, match=r"no private copy.*generator.*net.compile\(\)"), Twin(net).use():
        pass
    with torch.inference_mode():
        net, _ = prepared(WithFile)
    with pytest.raises(ValueError, match=r"no private copy.*generator.*inference_mode"), Twin(net).use():
        pass


# --- threads --------------------------------------------------------------------------------------------------------


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


def test_training_beside(trained: tuple[nn.Module, Tensor]) -> None:
    """With a rate of zero: the weights are written, and stay what they are."""
    net, x = trained
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


def test_weights_updated_meanwhile_are_told_once(
    trained: tuple[nn.Module, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    net, _ = trained
    twin = Twin(net)
    for _ in range(2):
        with twin.use(), torch.no_grad():
            net.conv1.weight.add_(1)
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "updated while" in caplog.text


def test_features_kept_by_a_predicting_thread_do_not_cost_the_twin() -> None:
    """Its forward passes replace attributes, graph and all, while the twin is made."""

    class Keeping(Block):
        def change(self, x: Tensor, y: Tensor) -> Tensor:
            self.newest = y
            return y

    net, x = prepared(Keeping)
    net.requires_grad_(True)
    right = gradients(Twin(net), x)
    twin = Twin(net)
    with running(lambda: net(x)) as errors:
        for _ in range(40):
            torch.testing.assert_close(gradients(twin, x), right, rtol=0, atol=0)
            assert not twin.shared
    assert not errors
