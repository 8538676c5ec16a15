"""Random small networks and random options: SandI equals the naive reference, and an image's score is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.cases import Case, build, images, norm_calls
from tests.helpers.oracle import Options, Reference

WIDTH = 4
pytestmark = pytest.mark.slow
FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Step(nn.Module):
    """One random operation of (B, WIDTH, H, W) to the same; ``modules`` may be used more than once."""

    def __init__(self, kind: str, groups: int) -> None:
        super().__init__()
        self.kind = kind
        inputs = 2 * WIDTH if kind == "concat" else WIDTH
        self.conv = nn.Conv2d(inputs, WIDTH, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(2, WIDTH) if kind == "group norm" else nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        if kind == "attention":
            self.layer_norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        if kind == "excite":
            self.excite = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "plain" | "group norm":
                return self.relu(self.norm(self.conv(x)))
            case "pre-activation":
                return x + self.conv(F.relu(self.norm(x)))
            case "residual":
                return self.relu(self.norm(self.conv(x)) + x)
            case "in-place residual":
                out = self.norm(self.conv(x))
                out += x
                return F.relu_(out)
            case "concat":
                return self.relu(self.norm(self.conv(torch.cat([x, -x], 1))))
            case "reused":
                return x + self.relu(self.norm(self.conv(self.relu(self.norm(self.conv(x))))))
            case "max-pool":
                return F.interpolate(F.max_pool2d(self.relu(self.norm(x)), 2), size=x.shape[2:])
            case "pool-relu":
                return F.relu(F.avg_pool2d(self.norm(x), 3, 1, 1)) + x
            case "smooth":
                return F.silu(self.norm(self.conv(x)))
            case "chunk":
                a, b = self.norm(self.conv(x)).chunk(2, dim=1)
                return torch.cat([a * b.sigmoid(), F.relu(a) + x[:, 2:]], dim=1)
            case "slices":
                y = self.norm(self.conv(x))
                y[:, :2] += x[:, 2:]
                return F.relu(y)
            case "excite":
                y = self.norm(x)
                return y * self.excite(y.mean((2, 3))).sigmoid()[..., None, None]
            case "attention":
                q, k, v = self.qkv(self.layer_norm(x.flatten(2).transpose(1, 2))).chunk(3, -1)
                return x + ((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(1, 2).reshape_as(x)
        raise AssertionError(self.kind)


KINDS = [
    "plain",
    "group norm",
    "pre-activation",
    "residual",
    "in-place residual",
    "concat",
    "reused",
    "max-pool",
    "pool-relu",
    "smooth",
    "chunk",
    "slices",
    "excite",
    "attention",
]


class RandomNetwork(nn.Module):
    def __init__(self, steps: list[tuple[str, int]], twice: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH)
        self.steps = nn.ModuleList(Step(*step) for step in steps)
        self.feature, self.head = nn.Conv2d(WIDTH, 6, 1), nn.Linear(6, 5)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for _ in range(1 + self.twice):
            for step in self.steps:
                x = step(x)
        return self.head(F.relu(self.feature(x)).mean((2, 3)))


some_networks = st.builds(
    lambda steps, twice, seed: build(Case("", lambda: RandomNetwork(steps, twice), 12), seed),
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 2, WIDTH])), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 2**16),
)
some_images = st.builds(
    lambda seed, height, width: images(Case("", nn.Module, 14), seed=seed)[:, :, :height, :width],
    st.integers(0, 2**16),
    st.integers(8, 14),
    st.integers(8, 14),
)
some_options = st.fixed_dictionaries(
    {
        "variant": st.sampled_from("ZA"),
        "steps": st.integers(1, 4),
        "step_size": st.sampled_from([1e-3, 1e-2, 0.1]),
        "epsilon": st.sampled_from([float("inf"), 0.05, 1.0]),
        "combine": st.sampled_from(["count", "union", "intersection"]),
        "attribution": st.sampled_from(["max_logit", "cross_entropy"]),
        "ascent": st.sampled_from(["max_logit", "cross_entropy"]),
        "top_fraction": st.floats(0.01, 1.0),
        "top_over": st.sampled_from(["channels", "labels"]),
        "splitting": st.booleans(),
        "stop_at_flip": st.booleans(),
    }
)


def detector(net: nn.Module, **options: Any) -> SandI:
    return SandI(net, splits="all", feature="feature", **options)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11 * expected.abs().max().item())


@FEW
@given(net=some_networks, x=some_images, options=some_options, shortcut=st.booleans())
def test_equals_the_reference(net: nn.Module, x: Tensor, options: dict[str, Any], shortcut: bool) -> None:
    naive = Reference(
        net, x, norm_calls(net, x), Options(feature="feature" if options["variant"] == "A" else "", **options)
    )
    ours = detector(net, rectifier_shortcut=shortcut, **options)
    if not (shortcut and options["steps"] == 2):  # there g_2 is compared on the first batch, and on samples later
        ours(x[:1])  # what the first image shows of the network need not hold for the others
    pred, tau = ours(x)
    assert ours.split_names == naive.splits
    assert torch.equal(pred, naive.pred)
    assert_close(tau, naive.tau())
    for split, density in ours.densities(x).items():
        assert_close(density, naive.densities()[split])
    if options["variant"] == "Z":
        for split, attribution in ours.explain(x).items():
            assert_close(attribution, naive.explain()[split])


@FEW
@given(
    net=some_networks, x=some_images, options=some_options, order=st.permutations(range(3)), share=st.floats(1e-9, 1.0)
)
def test_a_score_is_that_of_the_image_alone(
    net: nn.Module, x: Tensor, options: dict[str, Any], order: list[int], share: float
) -> None:
    """Whatever its batch mates, their order, the batches scored before, and how the work is cut to the memory."""
    tau = detector(net, **options)(x)[1]
    other = detector(net, memory_fraction=share, **options)
    assert_close(other(x[order])[1], tau[order])
    for number in order:
        assert_close(other(x[number : number + 1])[1], tau[number : number + 1])
    assert_close(other(torch.cat([x, x]))[1], torch.cat([tau, tau]))


@settings(FEW, max_examples=20)
@given(net=some_networks, x=some_images, options=some_options)
def test_ranges(net: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    """E of Z is a share, and grows from intersection through count to union; tau is the norm of E."""
    options["variant"] = "Z"
    by_combine = {c: detector(net, **options | {"combine": c}).densities(x) for c in ("intersection", "count", "union")}
    for split, count in by_combine["count"].items():
        low, high = by_combine["intersection"][split], by_combine["union"][split]
        assert (low >= 0).all() and (low <= count + 1e-12).all() and (count <= high + 1e-12).all() and (high <= 1).all()
    tau = detector(net, **options)(x)[1]
    assert_close(tau, torch.cat(list(by_combine[options["combine"]].values()), 1).square().sum(1).sqrt())
