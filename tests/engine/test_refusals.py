"""What cannot be scored is refused clearly; what can is scored right, or refused, but never scored wrong."""

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
from tests.helpers.surroundings import surroundings
from tests.helpers.trap_networks import WIDTH, Block, FrozenStem, Reused, Tuples

SPLITS = ["norm0", "norm1", "norm9"]


def block_with(change: Callable[[Tensor, Tensor], Tensor]) -> type[Block]:
    return type("Changed", (Block,), {"change": lambda _self, x, y: change(x, y)})


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


class Narrow(nn.Module):
    """Its gradients are not zero where the first norm's values lie between 0 and 0.001: no step of 0.5 stays there."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((1e3 * self.norm(x)).clamp(0, 1).mean((2, 3)))
        return logits


def test_intersections_that_are_empty_are_told_from_gradients_that_are_zero() -> None:
    net, x = Narrow().double().eval(), torch.linspace(1e-4, 9e-4, 3).double().view(3, 1, 1, 1).expand(3, 3, 4, 4)
    options = {"variant": "Z", "splits": ["norm"], "step_size": 0.5}
    raises(net, x, "intersection.*non-zero gradient at all of the 2 steps", combine="intersection", **options)
    raises(net, x + 1, "every gradient of the network is zero", combine="intersection", **options)
    assert (SandI(net, **options)(x)[1] > 0).all()


def test_a_network_without_split_points_is_refused() -> None:
    net, x = prepared(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)))
    raises(net, x, "split")


@pytest.mark.parametrize("given, meant", [("norm11", "norm1"), (["norm0", "conv11"], "conv1"), ("feture", "feature")])
def test_unknown_split_points_name_near_ones(given: str | list[str], meant: str) -> None:
    net, x = prepared(Block)
    wrong = given if isinstance(given, str) else given[-1]
    raises(net, x, rf"(?s){wrong}.*{meant}", splits=given)


def test_a_call_that_does_not_happen_is_refused() -> None:
    net, x = prepared(Reused)
    raises(net, x, r"norm1#4|norm1", splits="norm1#4")


def test_an_unknown_feature_names_near_ones() -> None:
    net, x = prepared(Block)
    raises(net, x, "(?s)featur.*feature", variant="A", feature="featur")


def test_a_split_that_gives_a_tuple_is_refused_by_name() -> None:
    net, x = prepared(Tuples)
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
    with pytest.raises(RuntimeError, match=r"(?i)random|dropout"):
        SandI(net)(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_network_is_refused() -> None:
    net, x = prepared(Block)
    traced = torch.jit.trace(net, x)
    with pytest.raises((TypeError, RuntimeError, ValueError), match=r"(?i)script"):
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


class Exits(Block):
    """Images of another brightness leave before the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.feature(self.norm0(self.stem(x)))
        if x.mean() < 2:
            y = self.feature(self.norm1(self.conv1(y)))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("variant", ["Z", "A"])
def test_a_split_point_that_some_images_do_not_reach(variant: str) -> None:
    """It has no gradient for them, neither zero nor any other."""
    net, x = prepared(Exits)
    detector = SandI(net, variant=variant, splits=["norm0", "norm1"], feature="feature#2")
    tau = detector(x)[1]
    with pytest.raises(ValueError, match=r"past split point 'norm1'.*name split points"):
        detector(x + 5)
    torch.testing.assert_close(detector(x)[1], tau)
