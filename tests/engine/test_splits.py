"""Which dimension of a split's tensor is the batch, which counts channels, and which splits "auto" stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from openood_sandi import SandI
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.splits import RecordedNetwork, record_network
from tests.helpers import split_networks as N
from tests.helpers.cases import prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.trap_networks import InPlaceResidual


def recorded(net: nn.Module, size: tuple[int, int] = (8, 8), images: int = 2) -> RecordedNetwork:
    generator = torch.Generator().manual_seed(0)
    net = net.double().eval()
    return record_network(net, torch.randn(images, 3, *size, generator=generator, dtype=torch.float64))[0]


def of(net: nn.Module, name: str = "norm", **options: object) -> Split:
    (split,) = recorded(net, **options).splits([name], default="all")  # type: ignore[arg-type]
    return split


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


# ---------------------------------------------------------------------------------------- channels

NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "LayerNorm": (lambda: nn.LayerNorm(N.WIDTH), True),
    "LayerNorm with a forward of its own": (lambda: N.CastingNorm(N.WIDTH), True),
    "RMSNorm": (lambda: nn.RMSNorm(N.WIDTH), True),
    "RMSNorm by hand": (lambda: N.HandNorm(N.WIDTH), True),
    "LayerNorm without weights": (lambda: nn.LayerNorm(N.WIDTH, elementwise_affine=False), True),
    "LayerNorm over (H, W, C)": (lambda: nn.LayerNorm([8, 8, N.WIDTH]), True),
    "LayerNorm that permutes": (lambda: N.PermutingNorm(N.WIDTH), False),
    "LayerNorm over (C, H, W)": (lambda: nn.LayerNorm([N.WIDTH, 8, 8]), False),
    "LayerNorm over (H, W)": (lambda: nn.LayerNorm([8, 8]), False),
    "GroupNorm": (lambda: nn.GroupNorm(2, N.WIDTH), False),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(N.WIDTH, affine=True), False),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_channels_of_a_norm_on_maps_as_long_as_wide_as_deep(name: str) -> None:
    make, last = NORMS[name]
    assert of(N.Maps(make(), last)).channel_axis == (3 if last else 1), "C = H = W = 8: no length tells"


def test_the_channels_of_vectors_and_sequences() -> None:
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    assert of(vectors, "2").channel_axis == 1
    sequences = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(372, 5))
    assert of(sequences, "2").channel_axis == 1
    assert of(sequences, "1").channel_axis == 1, "the output of a Conv1d is (B, C, L)"


@torch.jit.script
def _hidden(x: Tensor) -> Tensor:  # out of the sight of torch's function modes
    return x * 2


class HiddenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return _hidden(x)


def test_the_length_of_the_weight_decides_where_calls_do_not_show_or_it_is_refused() -> None:
    net = N.Maps(HiddenNorm(), last=True)
    assert of(net, size=(9, 10)).channel_axis == 3
    with pytest.raises(ValueError, match=r"'norm' normalises 8 channels.*more than one.*name another module"):
        of(net, size=(9, 8))


# ---------------------------------------------------------------------------------------- the batch

LAYOUTS = ("tokens", "sequence first", "views", "interleaved views")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [1, 2, 4])
def test_rows_of_an_image_move_its_logits_alone(layout: str, images: int) -> None:
    """Against plain autograd: by image and channel, the gradient of one image's logits is zero at all others."""
    net = seeded(lambda: N.Folded(layout)).double().eval()
    split = of(net, images=images)
    kept: list[Tensor] = []
    net.norm.register_forward_hook(lambda _, __, output: kept.append(output))
    x = torch.randn(images, 3, 8, 8, dtype=torch.float64)
    logits = net(x)
    for b in range(images):
        (gradient,) = torch.autograd.grad(logits[b].sum(), kept[0], retain_graph=True)
        by_channel = split.by_channel(gradient)
        assert by_channel.shape == (images, N.WIDTH, 8 if split.fold == 2 else 4)
        assert [bool(row.any()) for row in by_channel] == [image == b for image in range(images)]
    for b, row in enumerate(split.by_channel(kept[0])):
        (alone,) = split.by_channel(_of_module(net, x[b : b + 1]))
        torch.testing.assert_close(row, alone)


def _of_module(net: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = net.norm.register_forward_hook(lambda _, __, output: seen.append(output))
    net(x)
    handle.remove()
    return seen[0]


def test_one_number_an_image_spreads_over_its_rows() -> None:
    for layout in LAYOUTS:
        split = of(seeded(lambda layout=layout: N.Folded(layout)), images=3)
        z = torch.zeros(*{"tokens": (12, 8), "sequence first": (4, 3, 8)}.get(layout, (6, 8, 2, 2)))
        spread = split.by_channel(z + split.for_images(torch.arange(3.0), z))
        assert torch.equal(spread, torch.arange(3.0)[:, None, None].expand_as(spread)), layout


def test_lanes_before_the_batch_are_left_alone() -> None:
    split = of(seeded(lambda: N.Folded("tokens")), images=3)
    z = torch.randn(5, 12, 8)
    assert torch.equal(split.by_channel(z, lead=1), torch.stack([split.by_channel(lane) for lane in z]))


def test_a_constant_output_is_ordered_by_what_it_was_computed_from() -> None:
    net = seeded(lambda: N.Folded("views"))
    nn.init.zeros_(net.norm.weight)
    split = of(net)
    assert (split.fold, split.image_major) == (2, False)


@pytest.mark.parametrize("net", [N.Folded("scrambled"), N.OncePerImage()], ids=["scrambled", "once an image"])
def test_rows_that_cannot_be_told_apart_are_refused(net: nn.Module) -> None:
    for images in (1, 2):
        with pytest.raises(ValueError, match=r"'norm'.*Name split points where each image has rows of its own"):
            of(net, images=images)


def test_another_size_than_the_folds() -> None:
    split = of(seeded(lambda: N.Folded("tokens")), images=3)
    with pytest.raises(ValueError, match="another size"):
        split.by_channel(torch.zeros(3 * 9 + 2, 8))


# ---------------------------------------------------------------------------------------- what is split


def names(splits: tuple[Split, ...]) -> list[str]:
    return [split.name for split in splits]


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_what_normalises_weights_is_no_split_point(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = N.Maps(nn.BatchNorm2d(N.WIDTH), last=False)
    net.stem, net.conv = wrap(net.stem), wrap(net.conv)
    found = recorded(net)
    assert names(found.splits("auto", default="all")) == ["norm"]
    assert found.feature("auto").name == "relu#2"
    with pytest.raises(ValueError, match="parametrizations"):
        found.splits(["stem.parametrizations.weight"], default="all")


def test_squeezed_maps_are_no_feature_maps() -> None:
    found = recorded(N.Squeezing())
    assert found.feature("auto").name == "mul"


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (2, 2)])
def test_a_last_map_of_one_position_is_the_last_map(size: tuple[int, int]) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    assert recorded(net, size).feature("auto").name == "5"


def test_the_inside_of_attention_is_no_feature_map_and_a_third_of_the_blocks_is_the_last_stage() -> None:
    found = recorded(N.LatentPooled())
    feature = found.feature("auto")
    assert feature.name == "norm"
    splits = found.before(feature, found.splits("auto", default="last_stage"), "auto")
    assert names(splits) == ["blocks.4.0", "blocks.5.0"]


def test_a_last_stage_behind_f_gives_way_to_what_lies_before() -> None:
    found = recorded(N.OneNorm())
    feature = found.feature("auto")
    assert feature.name == "norm"
    assert names(found.before(feature, found.splits("auto", default="last_stage"), "auto")) == ["conv"]
    with pytest.raises(ValueError, match=r"no split point lies before F \('norm'\)"):
        found.before(feature, found.splits("last_stage", default="all"), "last_stage")


class TwoBranches(nn.Module):
    """Logits from a norm on either of two branches, of which the second one is called last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)) for _ in range(2))
        self.early, self.head = nn.BatchNorm2d(3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(self.early(x))
        return self.head(first.mean((2, 3))) + self.head(second.mean((2, 3)))


def test_what_lies_beside_f_on_another_branch_is_left_out() -> None:
    found = recorded(TwoBranches())
    feature = found.feature("auto")
    assert feature.name == "second"
    assert names(found.before(feature, found.splits("all", default="all"), "all")) == ["early"]
    with pytest.raises(ValueError, match=r"'first.2' lies beside F \('second'\)"):
        found.before(feature, found.splits(["first.2"], default="all"), ["first.2"])


class Gated(nn.Module):
    """No norms; an activation of a whole result, and one of half a result of chunk()."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(self.stem(x).relu()).chunk(2, 1)
        return self.head((value * gate.sigmoid()).mean((2, 3)))


def test_half_a_result_is_no_split_point() -> None:
    assert names(recorded(Gated()).splits("all", default="all")) == ["stem"]


class AddsInPlace(nn.Module):
    """What its activation is given was written in place, by calls whose result it drops."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)
        self.named: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        z = self.conv(y)
        z.add_(y)
        z = z if self.named is None else self.named(z)
        return self.head(z.relu().mean((2, 3)))


def test_a_result_that_was_written_in_place_and_dropped_is_a_split_point() -> None:
    net, x = prepared(AddsInPlace)
    detector = SandI(net, variant="Z", step_size=0.1)
    tau = detector(x)[1]
    assert detector.split_names == ("stem", "add")
    net.named = nn.Identity()
    assert torch.equal(tau, Reference(net, x, ("stem", "named"), Options(step_size=0.1)).tau())


def test_split_points_are_found_again_where_a_layer_is_replaced() -> None:
    net, x = prepared(InPlaceResidual)
    detector = SandI(net, variant="Z")
    detector(x)
    net.norm1 = nn.Identity()
    tau = detector(x)[1]
    assert "norm1" not in detector.split_names
    assert torch.equal(tau, SandI(net, variant="Z")(x)[1])


def test_a_kernel_that_is_a_vector_does_not_count_channels() -> None:
    """As in efficient channel attention: a convolution over the channels, and a gate of what it returns."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 5, padding=2, bias=False)
            self.gate = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            pooled = x.mean((2, 3)).unsqueeze(1)
            return x * self.gate(self.conv(pooled)).transpose(1, 2).unsqueeze(-1)

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Gate(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4)
    )
    net = net.double().eval()
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    detector = SandI(net, variant="Z")
    densities = detector.densities(x)
    assert list(densities) == ["0", "2.conv", "3"] and densities["2.conv"].shape == (3, 1)
    for split, expected in Reference(net, x, ("0", "3"), Options("Z")).densities().items():
        torch.testing.assert_close(densities[split], expected, rtol=1e-12, atol=0)
