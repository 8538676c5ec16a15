"""A network and the surroundings of a call are left as found, whatever happens; wrappers and layouts change nothing."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers import networks
from tests.helpers.cases import prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.surroundings import surroundings
from tests.helpers.trap_networks import Block

CASES = {case.name: case for case in networks.HANDMADE}
SPLITS = ["norm0", "norm1", "norm9"]


USES: dict[str, tuple[dict[str, Any], Callable[[SandI, Tensor], object]]] = {
    "z": ({"variant": "Z", "steps": 3}, lambda d, x: d(x)),
    "z_union": ({"variant": "Z", "combine": "union"}, lambda d, x: d(x)),
    "z_exact": ({"variant": "Z", "rectifier_shortcut": False}, lambda d, x: d(x)),
    "a": ({"variant": "A", "feature": "feature", "ascent": "max_logit"}, lambda d, x: d(x)),
    "densities": ({"variant": "Z"}, lambda d, x: d.densities(x)),
    "explain": ({"variant": "Z"}, lambda d, x: d.explain(x)),
    "input_only": ({"variant": "Z", "splitting": False}, lambda d, x: d(x)),
}
every_use = pytest.mark.parametrize("options, use", USES.values(), ids=USES)

# --- left as found --------------------------------------------------------------------------------------------------


@pytest.fixture
def trained() -> tuple[nn.Module, Tensor]:
    """A network as training leaves it: parameters that require gradients and hold some, a hook of the user's own."""
    net, x = prepared(CASES["Reused"].make)
    net.requires_grad_(True)
    net.stem.requires_grad_(False)
    net(x).sum().backward()
    net.register_forward_hook(lambda _m, _a, _o: None)
    return net, x


@every_use
def test_left_as_found(
    trained: tuple[nn.Module, Tensor], options: dict[str, Any], use: Callable[[SandI, Tensor], object]
) -> None:
    net, x = trained
    before = surroundings(net, x)
    detector = SandI(net, **options)
    for _ in range(2):
        use(detector, x)
        assert surroundings(net, x) == before


class Failing:
    """A hook that raises at its n-th call."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        self.error, self.left = error, at

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error("stop here")


@every_use
@pytest.mark.parametrize("error", [RuntimeError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)])
def test_left_as_found_after_an_error_at_any_pass(
    trained: tuple[nn.Module, Tensor],
    options: dict[str, Any],
    use: Callable[[SandI, Tensor], object],
    error: type[BaseException],
) -> None:
    net, x = trained
    expected = use(SandI(net, **options), x)
    for passes in range(1, 100):
        failing = Failing(error, passes)
        handle = net.norm1.register_forward_hook(failing)
        before = surroundings(net, x)
        detector = SandI(net, **options)
        try:
            use(detector, x)
        except error as raised:
            assert str(raised) == "stop here"
            assert surroundings(net, x) == before
        else:
            break  # it took fewer passes: nothing left to interrupt
        finally:
            handle.remove()
        assert_equal(use(detector, x), expected)  # and the detector goes on
    assert passes > 3


def assert_equal(found: Any, expected: Any) -> None:
    found, expected = (list(v.values() if isinstance(v, dict) else v) for v in (found, expected))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_no_tensor_outlives_a_batch(trained: tuple[nn.Module, Tensor]) -> None:
    net, x = trained
    detector = SandI(net, variant="Z", steps=3)

    def alive() -> int:
        detector(x)
        gc.collect()
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    alive()
    assert alive() == alive()


@pytest.mark.parametrize(
    "mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)
@every_use
def test_under_any_grad_mode(mode: Any, options: dict[str, Any], use: Callable[[SandI, Tensor], object]) -> None:
    net, x = prepared(CASES["InPlaceResidual"].make)
    expected = use(SandI(net, **options), x)
    with mode():
        assert_equal(use(SandI(net, **options), x * 1), expected)


def test_an_input_that_requires_grad_gets_none() -> None:
    net, x = prepared(Block)
    x.requires_grad_()
    tau = SandI(net)(x)[1]
    assert x.grad is None and not tau.requires_grad


def test_hooks_of_others_are_respected() -> None:
    net, x = prepared(Block)
    plain = SandI(net, variant="Z")(x)[1]
    net.norm1.register_forward_hook(lambda _m, _a, output: output * -1)
    hooked = SandI(net, variant="Z")(x)[1]
    torch.testing.assert_close(hooked, Reference(net, x, SPLITS, Options("Z")).tau(), rtol=1e-12, atol=0)
    assert not torch.equal(hooked, plain)


# --- inputs ---------------------------------------------------------------------------------------------------------


@every_use
def test_memory_layout_of_the_input_does_not_matter(
    options: dict[str, Any], use: Callable[[SandI, Tensor], object]
) -> None:
    net, x = prepared(CASES["InPlaceResidual"].make)
    expected = use(SandI(net, **options), x)
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3]).to(x)
    wide[..., ::2] = x
    for layout in (
        x.to(memory_format=torch.channels_last),
        wide[..., ::2],
        x.flip(0).flip(0),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert_equal(use(SandI(net, **options), layout), expected)


@pytest.mark.parametrize("shape", [(17, 16), (13, 21), (9, 9), (64, 5)])
def test_odd_sizes(shape: tuple[int, int]) -> None:
    net, _ = prepared(CASES["InPlaceResidual"].make)
    x = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = Reference(net, x, ["norm0", "norm1", "norm2", "norm9"], Options("Z"))
    torch.testing.assert_close(SandI(net, variant="Z")(x)[1], expected.tau(), rtol=1e-12, atol=0)


def test_sizes_may_change_between_batches() -> None:
    net, x = prepared(CASES["Reused"].make)
    detector = SandI(net, variant="Z")
    for images in (x, x[:1], x[:, :, :11], x):
        torch.testing.assert_close(detector(images)[1], SandI(net, variant="Z")(images)[1], rtol=1e-12, atol=0)


@every_use
def test_chunks_do_not_change_results(options: dict[str, Any], use: Callable[[SandI, Tensor], object]) -> None:
    net, x = prepared(CASES["Dense"].make)
    assert_equal(use(SandI(net, memory_fraction=1e-12, **options), x), use(SandI(net, **options), x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_spoils_only_its_own_score(bad: float) -> None:
    net, x = prepared(CASES["InPlaceResidual"].make)
    spoilt = x.clone()
    spoilt[1, 0, 3, 3] = bad
    for options in ({"variant": "Z"}, {"variant": "A", "feature": "feature"}):
        tau = SandI(net, **options)(spoilt)[1]
        assert tau[1].isnan()
        torch.testing.assert_close(tau[[0, 2]], SandI(net, **options)(x)[1][[0, 2]], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 16, 16, dtype=torch.float64),
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(2, 3, 16, 16, dtype=torch.float32),
        [1.0],
    ],
    ids=["no batch dimension", "integers", "another dtype", "a list"],
)
def test_inputs_of_the_wrong_kind_are_refused(x: Any) -> None:
    net, _ = prepared(Block)
    # A network of another dtype says so itself, in torch's words.
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"\(B, C, H, W\)|(?i:dtype|type|integer|float)"):
        SandI(net)(x)


# --- wrappers, copies -----------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As OpenOOD's wrapper networks: asks the backbone for more than it may know, and tries again."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, return_feature: bool = False, return_feature_list: bool = False) -> Tensor:
        try:
            return self.backbone(x, return_feature, return_feature_list)
        except TypeError:
            return self.backbone(x)


def openood_react(net: nn.Module) -> nn.Module:
    class TakesFlags(Wrapper):
        def forward(self, x: Tensor, return_feature: bool = False, return_feature_list: bool = False) -> Tensor:
            return self.backbone(x)

    return networks.openood_network("react_net").ReactNet(TakesFlags(net))


@pytest.mark.parametrize("wrap", [nn.DataParallel, Wrapper, openood_react, torch.compile, nn.Sequential])
def test_wrapped_networks_score_the_same(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net, x = prepared(CASES["InPlaceResidual"].make)
    for variant in ("Z", "A"):
        expected = SandI(net, variant=variant, splits="all")(x)
        assert_equal(SandI(wrap(net), variant=variant, splits="all")(x), expected)


def test_distributed_data_parallel(process_group: None) -> None:
    net, x = prepared(CASES["InPlaceResidual"].make)
    expected = SandI(net)(x)
    wrapped = nn.parallel.DistributedDataParallel(net.requires_grad_(True))
    before = surroundings(wrapped, x)
    assert_equal(SandI(wrapped)(x), expected)
    assert surroundings(wrapped, x) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"])
def test_copies_score_the_same(copied: Callable[[SandI], SandI]) -> None:
    net, x = prepared(CASES["Reused"].make)
    detector = SandI(net, variant="Z")
    assert_equal(copied(detector)(x), detector(x))  # before its first batch, and after it
    assert_equal(copied(detector)(x), detector(x))
    assert_equal(SandI(copied(net), variant="Z")(x), detector(x))
