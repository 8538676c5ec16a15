"""A network and the surroundings of a call are left as found, whatever happens; what cannot be scored is refused clearly."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openood_sandi import SandI
from tests import networks
from tests.networks import Case
from tests.oracle import Options, Reference
from tests.trap_networks import WIDTH, FrozenStem, Trap, conv

CASES = {case.name: case for case in networks.HANDMADE}
SPLITS = ["norm0", "norm1", "norm9"]


def prepared(make: Callable[[], nn.Module], size: int = 16) -> tuple[nn.Module, Tensor]:
    case = Case("", make, size, "feature")
    return networks.build(case), networks.images(case)


class Block(Trap):
    """One rectified convolution; subclasses and tests change what happens to its normalised output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(WIDTH)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.change(x, self.norm1(self.conv1(x))))


def block_with(change: Callable[[Tensor, Tensor], Tensor]) -> type[Block]:
    return type("Changed", (Block,), {"change": lambda _self, x, y: change(x, y)})


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

# --- left as found --------------------------------------------------------------------------------------------------------


def surroundings(net: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything that a call could leave changed, in a form that compares by ``==``."""
    found: dict[str, Any] = {
        "random numbers": torch.get_rng_state().tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "modes": torch._C._len_torch_function_stack(),
        "dtype": torch.get_default_dtype(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "x": (x.requires_grad, x.grad is None, x._version, x.sum().item()),
    }
    for name, module in net.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if "hook" in key and hasattr(value, "keys")}
        found[f"module {name}"] = (module.training, hooks, sorted(vars(module)), id(module.forward.__func__))
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.flatten().tolist()
        found[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor._version, tensor.flatten().tolist(), grad)
    return found


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
def test_left_as_found(trained: tuple[nn.Module, Tensor], options: dict[str, Any], use: Callable[[SandI, Tensor], object]) -> None:
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
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_left_as_found_after_an_error_at_any_pass(
    trained: tuple[nn.Module, Tensor], options: dict[str, Any], use: Callable[[SandI, Tensor], object], error: type[BaseException]
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


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"])
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


# --- inputs ---------------------------------------------------------------------------------------------------------------


@every_use
def test_memory_layout_of_the_input_does_not_matter(options: dict[str, Any], use: Callable[[SandI, Tensor], object]) -> None:
    net, x = prepared(CASES["InPlaceResidual"].make)
    expected = use(SandI(net, **options), x)
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3]).to(x)
    wide[..., ::2] = x
    for layout in (x.to(memory_format=torch.channels_last), wide[..., ::2], x.flip(0).flip(0), x.transpose(2, 3).contiguous().transpose(2, 3)):
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


# --- wrappers, copies -----------------------------------------------------------------------------------------------------


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


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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


# --- what cannot be scored ------------------------------------------------------------------------------------------------


def raises(net: nn.Module, x: Tensor, match: str, **options: Any) -> None:
    """The first batch is refused by a message that matches, and leaves everything as found."""
    before = surroundings(net, x)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
        SandI(net, **options)(x)
    assert surroundings(net, x) == before


def test_train_mode_is_refused() -> None:
    net, x = prepared(Block)
    raises(net.train(), x, r"eval\(\)")


def test_one_normalisation_layer_in_train_mode_is_refused() -> None:
    net, x = prepared(Block)
    net.norm1.train()
    raises(net, x, r"norm1.*|eval\(\)")


def test_a_network_without_split_points_is_refused() -> None:
    net, x = prepared(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)))
    raises(net, x, "split")


@pytest.mark.parametrize("given, meant", [("norm11", "norm1"), (["norm0", "conv11"], "conv1"), ("feture", "feature")])
def test_unknown_split_points_name_near_ones(given: str | list[str], meant: str) -> None:
    net, x = prepared(Block)
    wrong = given if isinstance(given, str) else given[-1]
    raises(net, x, rf"(?s){wrong}.*{meant}", splits=given)


def test_a_call_that_does_not_happen_is_refused() -> None:
    net, x = prepared(CASES["Reused"].make)
    raises(net, x, r"norm1#4|norm1", splits="norm1#4")


def test_an_unknown_feature_names_near_ones() -> None:
    net, x = prepared(Block)
    raises(net, x, "(?s)featur.*feature", variant="A", feature="featur")


def test_a_split_that_gives_a_tuple_is_refused_by_name() -> None:
    net, x = prepared(CASES["Tuples"].make)
    raises(net, x, "pair1", splits="pair1")


def test_a_split_behind_the_feature_map_is_refused_by_name() -> None:
    net, x = prepared(Block)
    raises(net, x, "norm9", variant="A", feature="norm1", splits=["norm0", "norm9"])


class TwoOutputs(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_network_that_gives_more_than_logits_is_refused() -> None:
    net, x = prepared(Block)
    net.__class__ = TwoOutputs
    raises(net, x, "(?i)logits|tuple")


class ActiveDropout(Block):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5, training=True)


def test_randomness_in_eval_mode_is_refused() -> None:
    net, x = prepared(ActiveDropout)
    with pytest.raises(RuntimeError, match="(?i)random|dropout"):
        SandI(net)(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_network_is_refused() -> None:
    net, x = prepared(Block)
    traced = torch.jit.trace(net, x)
    with pytest.raises((TypeError, RuntimeError, ValueError), match="(?i)script"):
        SandI(traced, splits="norm1")(x)


# Things a network may do that an engine can get wrong: the result must be the reference's, or there must be none.
AGREE_OR_REFUSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "number of a perturbed tensor": lambda x, y: y / float(y.abs().max()),
    "item of a clean tensor": lambda x, y: y * x.detach().mean().item(),
    "branch on a perturbed tensor": lambda x, y: y * 2 if y.mean() > 0 else y * 3,
    "branch that flips under the step": lambda x, y: y * 2 if bool((y.abs() < 1e-3).any()) else y * 3,
    "detached": lambda x, y: y + y.detach() * 2,
    "data": lambda x, y: y + y.data * 2,
    "numpy": lambda x, y: y + torch.from_numpy(y.detach().numpy().copy()),
    "checkpoint": lambda x, y: checkpoint(lambda t: F.relu(t) * t, y, use_reentrant=False),
    "sorted": lambda x, y: y.sort(1).values,
    "top k": lambda x, y: y * (y >= y.flatten(2).topk(5).values[..., -1, None, None]),
    "nonzero": lambda x, y: torch.zeros_like(y).masked_scatter(y > 0, y[y > 0] * 2),
    "shape": lambda x, y: y.view(y.shape[0], -1).view(len(y), WIDTH, *y.size()[2:]) / y.numel() * y.stride(1),
    "batch mates": lambda x, y: y - y.mean(0, keepdim=True),
    "slice in place": lambda x, y: (y[:, 4:].mul_(0.5), y)[1],
    "slice in place without effect": lambda x, y: (y[:, 4:].clamp_(max=1e6), y)[1],
    "copy into a slice": lambda x, y: (b := torch.zeros_like(y), b[:, 4:].copy_(y[:, :4]), b)[-1],
    "copy of a clean tensor into a slice": lambda x, y: (b := torch.zeros_like(y), b[:, 4:].copy_(x[:, :4]), b * y)[-1],
    "in place behind a view": lambda x, y: (flat := y.flatten(2), y.add_(1.0), flat.view_as(y))[-1],
    "in place through a view": lambda x, y: (F.relu_(y.view(len(y), -1)[:, 7:]), y - 0.3)[-1],
    "transposed view": lambda x, y: (y.transpose(2, 3).add_(x), y)[-1],
    "diagonal": lambda x, y: (y.diagonal(dim1=2, dim2=3).mul_(3.0), y)[-1],
    "set": lambda x, y: y.clone().index_fill_(1, torch.tensor([1]), 0.5).index_add(1, torch.tensor([0]), y[:, 2:3]),
}


@pytest.mark.parametrize("variant", ["Z", "A"])
@pytest.mark.parametrize("change", AGREE_OR_REFUSE.values(), ids=AGREE_OR_REFUSE)
@pytest.mark.filterwarnings("ignore:.*performance drop.*:UserWarning")
def test_agrees_or_refuses(change: Callable[[Tensor, Tensor], Tensor], variant: str) -> None:
    net, x = prepared(block_with(change))
    splits = SPLITS if variant == "Z" else SPLITS[:2]
    options = Options(variant, steps=2, step_size=0.05, feature="feature" if variant == "A" else "")
    try:
        detector = SandI(net, variant=variant, splits=splits, step_size=0.05, feature="feature")
        found = [detector(images)[1] for images in (x, 20 * x)]
    except RuntimeError as error:
        assert type(error).__name__ == "ReplayError", error
        assert len(str(error)) > 40
        return
    for images, tau in zip((x, 20 * x), found, strict=True):
        torch.testing.assert_close(tau, Reference(net, images, splits, options).tau(), rtol=1e-12, atol=0)


def test_a_split_inside_no_grad() -> None:
    """Autograd has nothing to say there; behind the block, splits are as any others."""
    net, x = prepared(FrozenStem)
    tau = SandI(net, variant="Z", splits=["norm1", "norm9"])(x)[1]
    torch.testing.assert_close(tau, Reference(net, x, ["norm1", "norm9"], Options("Z")).tau(), rtol=1e-12, atol=0)
    before = surroundings(net, x)
    assert SandI(net, variant="Z")(x)[1].isfinite().all()
    assert surroundings(net, x) == before
