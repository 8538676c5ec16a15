"""The plain walk equals the naive reference, on every network and on what a function mode cannot see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openood_sandi.detectors.sandi.losses import LogitsPlan, channel_average_plan
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.plain import PlainWalk, walk_plain
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.twin import Twin
from openood_sandi.engine.walk import Observer, Walk
from tests.helpers import cases, networks
from tests.helpers.cases import Case, prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.surroundings import surroundings
from tests.helpers.trap_networks import Block, conv

ATTACK = Attack(steps=2, step_size=0.01)
OPTIONS = Options("Z", steps=2, step_size=0.01)


class Recorder(Observer):
    """Keeps what it is told: {site name: [g_1, g_2, ...]}, and the motions likewise."""

    def __init__(self, moves: bool = False) -> None:
        self.gradients: dict[str, list[Tensor]] = {}
        self.motions: dict[str, list[Tensor]] = {}
        self.wants_motion = moves

    def gradient(self, site: Site, gradient: Tensor) -> None:
        self.gradients.setdefault(site.name, []).append(gradient)

    def motion(self, site: Site, offset: Tensor) -> None:
        self.motions.setdefault(site.name, []).append(offset)


def site(name: str) -> Site:
    module, _, number = name.partition("#")
    return Site(name, module, int(number or 1))


def walk(net: nn.Module, x: Tensor, names: Any, *, moves: bool = False) -> tuple[PlainWalk, Recorder]:
    """The plain walk of the twin of ``net``, Z's losses at the splits of these names."""
    splits = [Split(site(name), 1) for name in names]
    plan, recorder = LogitsPlan(splits, "max_logit", "cross_entropy"), Recorder(moves)
    with Twin(net).use() as twin:
        return walk_plain(twin, x, [split.site for split in splits], Walk(plan, ATTACK), recorder), recorder


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(b.abs().max().item(), 1e-300))


def assert_right(net: nn.Module, x: Tensor, names: Any, right: nn.Module | None = None) -> None:
    """The walk of ``net`` against the reference of ``right``, the same function written so that autograd sees all."""
    naive = Reference(net if right is None else right, x, names, OPTIONS)
    found, recorder = walk(net, x, names, moves=True)
    assert not found.cut_off
    torch.testing.assert_close(found.logits, naive.logits, rtol=1e-12, atol=1e-12)
    for name in names:
        path = naive.paths[name]
        assert_close(recorder.gradients[name], path.gradients)
        moves = [after - before for before, after in zip(path.activations, path.activations[1:], strict=False)]
        assert_close(recorder.motions[name], moves)


# --- every network --------------------------------------------------------------------------------------------------


@networks.each
def test_gradients_and_motions(case: Case) -> None:
    net, x = cases.build(case), cases.images(case, batch=2)
    assert_right(net, x, cases.split_points(case, net, x)[-3::2])


@pytest.mark.parametrize("ascent", ["cross_entropy", "max_logit"])
@pytest.mark.parametrize("name", ["InPlaceResidual", "Reused", "Attention"])
def test_channel_averages(name: str, ascent: str) -> None:
    case = next(case for case in networks.HANDMADE if case.name == name)
    net, x = cases.build(case), cases.images(case)
    names = cases.split_points(case, net, x, before=case.feature)
    naive = Reference(net, x, names, Options("A", 2, 0.01, feature=case.feature, ascent=ascent))
    of_feature = Split(site(case.feature), naive.feature_path.channel_dim)
    splits = [Split(site(name), naive.paths[name].channel_dim) for name in names]
    plan, recorder = channel_average_plan(splits, of_feature, ascent, 0.9, "channels"), Recorder()
    sites = [split.site for split in (*splits, of_feature)]
    walk_plain(net, x, sites, Walk(plan, ATTACK, of_feature.site), recorder)
    for name in names:
        assert_close(recorder.gradients[name], naive.paths[name].gradients)
    assert_close(recorder.gradients[case.feature], naive.feature_path.gradients)


# --- what a function mode cannot see --------------------------------------------------------------------------------

SPLITS = ["norm0", "norm1", "norm9"]


class _ChannelNorm(torch.autograd.Function):
    """Divides by the root mean square over channels; its backward reduces over dimension 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = (x.square().mean(1, keepdim=True) + 1e-3).rsqrt()
        ctx.save_for_backward(x * scale, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return scale * (grad - y * (grad * y).mean(dim=1, keepdim=True))


class HandWritten(Block):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return x + _ChannelNorm.apply(y)


class HandWrittenSeen(Block):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y * (y.square().mean(1, keepdim=True) + 1e-3).rsqrt()


class Checkpointed(Block):
    """Its branch, with norm1, a split, inside, is run again in the backward pass."""

    reentrant: bool | None = None

    def branch(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x)).tanh().square()

    def middle(self, x: Tensor) -> Tensor:
        y = self.branch(x) if self.reentrant is None else checkpoint(self.branch, x, use_reentrant=self.reentrant)
        return F.gelu(x + y)


class Reentrant(Checkpointed):
    reentrant = True


class NonReentrant(Checkpointed):
    reentrant = False


class ReentrantTwice(Reentrant):
    def middle(self, x: Tensor) -> Tensor:
        return super().middle(super().middle(x))


class Scripted(Block):
    """A traced activation in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.act = torch.jit.trace(nn.Sequential(nn.SiLU(), conv()), torch.zeros(1, 8, 8, 8))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.act(y)


class DifferentiatesInForward(Block):
    """Its branch is the gradient of an energy: score models, equivariant force fields, implicit layers."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(y.pow(4).sum() / 4, y, create_graph=True)
        return x + slope


class DifferentiatesSeen(Block):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y**3


def like(make: Callable[[], nn.Module], net: nn.Module) -> nn.Module:
    """Another class with the weights of ``net``."""
    other = prepared(make)[0]
    other.load_state_dict(net.state_dict())
    return other


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "make, seen",
    [
        (HandWritten, HandWrittenSeen),
        (Reentrant, Checkpointed),
        (NonReentrant, Checkpointed),
        (DifferentiatesInForward, DifferentiatesSeen),
        (Scripted, None),
    ],
)
def test_what_is_hidden_from_a_function_mode(make: Callable[[], nn.Module], seen: Callable[[], nn.Module]) -> None:
    net, x = prepared(make)
    assert_right(net, x, SPLITS, None if seen is None else like(seen, net))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_densenet_that_saves_memory() -> None:
    densenet = networks.torchvision_models().DenseNet
    case = Case("d", lambda: densenet(8, (2, 2), 16, num_classes=11, memory_efficient=True), 32, "features.denseblock2")
    net, x = cases.build(case), cases.images(case, batch=2)
    seen = densenet(8, (2, 2), 16, num_classes=11).double().eval()
    seen.load_state_dict(net.state_dict())
    names = ["features.norm0", "features.denseblock1.denselayer1.norm2", "features.denseblock2.denselayer2.norm1"]
    assert_right(net, x, names, seen.requires_grad_(False))


def test_a_module_called_twice_in_a_checkpoint_is_refused_by_name() -> None:
    net, x = prepared(ReentrantTwice)
    with pytest.raises(ReplayError, match=r"'norm1' is called 2 times.*checkpoint"):
        walk(net, x, ["norm1"])


# --- what autograd does not tie to the losses, and what cannot be a split --------------------------------------------


class FrozenBranch(Block):
    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.norm1(self.conv1(x))
        return x + y


class Inference(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(x)


def test_a_forward_under_inference_mode_has_no_gradients() -> None:
    net, x = prepared(Inference)
    found, _ = walk(net, x, SPLITS)
    assert [site.name for site in found.cut_off] == SPLITS


def test_splits_without_gradients_are_reported() -> None:
    net, x = prepared(FrozenBranch)
    found, recorder = walk(net, x, SPLITS)
    assert [site.name for site in found.cut_off] == ["norm1"]
    assert not torch.stack(recorder.gradients["norm1"]).any()
    assert recorder.gradients["norm0"][0].any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (Site("relu", None, 7), "'relu' is the result of a function call.*name modules"),
        (Site("norm1#2", "norm1", 2), "does not reach split point 'norm1#2'"),
    ],
)
def test_sites_that_cannot_be_are_refused_by_name(wrong: Site, message: str) -> None:
    net, x = prepared(Block)
    plan = LogitsPlan([Split(wrong, 1)], "max_logit", "cross_entropy")
    with pytest.raises(ReplayError, match=message):
        walk_plain(net, x, [wrong], Walk(plan, ATTACK), Recorder())


# --- state ----------------------------------------------------------------------------------------------------------


class Averaging(Block):
    """Divides by a moving average of what it has seen, by in-place calls and by assignment, and normalises in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(8))
        self.passes = 0

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        self.passes += 1
        self.average.mul_(0.9).add_(y.detach().abs().mean((0, 2, 3)), alpha=0.1)
        return y / self.average[:, None, None] * self.passes

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


def test_every_pass_starts_from_the_same_state() -> None:
    net, x = prepared(Averaging)
    given = x.clone()
    before, passes, average = surroundings(net, x), net.passes, net.average

    class Fresh(nn.Module):
        """Forgets what the last pass wrote."""

        def __init__(self) -> None:
            super().__init__()
            self.norm0, self.norm1, self.norm9 = net.norm0, net.norm1, net.norm9

        def forward(self, x: Tensor) -> Tensor:
            net.passes, net.average = passes, average.clone()
            return net(x.clone())

    found, recorder = walk(net, x, SPLITS)
    assert surroundings(net, x) == before and torch.equal(x, given)
    naive = Reference(Fresh(), x, SPLITS, OPTIONS)
    torch.testing.assert_close(found.logits, naive.logits, rtol=1e-12, atol=1e-12)
    for name in SPLITS:
        assert_close(recorder.gradients[name], naive.paths[name].gradients)


def test_gradients_of_the_callers_parameters_are_left_alone() -> None:
    """Without a twin, on a network that is being trained."""
    net, x = prepared(Block)
    expected = walk(net, x, SPLITS)[1]
    net.requires_grad_(True)
    net(x).sum().backward()
    before, recorder = surroundings(net, x), Recorder()
    plan = LogitsPlan([Split(site(name), 1) for name in SPLITS], "max_logit", "cross_entropy")
    walk_plain(net, x, [site(name) for name in SPLITS], Walk(plan, ATTACK), recorder)
    assert surroundings(net, x) == before
    for name in SPLITS:
        assert_close(recorder.gradients[name], expected.gradients[name])
