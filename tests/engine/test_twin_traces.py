"""A twin leaves no trace on its network, and a network that has none is run itself."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from openood_sandi.engine.twin import Twin
from tests.helpers.cases import prepared
from tests.helpers.surroundings import surroundings
from tests.helpers.trap_networks import Block
from tests.helpers.twins import WithFile, Writing, assert_same, trained

# --- it leaves nothing behind ---------------------------------------------------------------------------------------


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


def test_left_as_found_after_an_error() -> None:
    net, x = trained()
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
def test_copies_have_a_twin_of_their_own(copied: Callable[[Any], Any]) -> None:
    net, x = trained()
    twin = Twin(net)
    twin.current()
    other_net, other = copied((net, twin))
    assert other.net is other_net and other.current() is not twin.current()
    assert_same(other, x)


# --- networks that have no twin ---------------------------------------------------------------------------------------


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
