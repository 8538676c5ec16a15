"""Prototype Fusion against loops over images, layers and classes; where the stages of networks end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from openood_sandi.detectors.prototype_fusion import PrototypeFusion
from openood_sandi.engine.features import stages
from tests.helpers import networks, tiny_suite
from tests.helpers.surroundings import surroundings

STAGES = ("stage1", "stage2", "stage3")


@pytest.fixture
def net() -> nn.Module:
    return tiny_suite.network().double()


@pytest.fixture
def x() -> Tensor:
    return tiny_suite.images(9, 0, 5).double()


def training(batch_size: int = 16) -> list[tuple[Tensor, Tensor]]:
    images = tiny_suite.images(50, 1, 5).double()
    labels = torch.arange(50) % tiny_suite.CLASSES
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def in_loops(net: nn.Module, x: Tensor, layers: tuple[str, ...], batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """1 - affinity of each image, from the definition, in numbers."""

    def vectors(image: Tensor) -> dict[str, list[float]]:
        found, maps = {}, image[None]
        with torch.no_grad():
            for name in STAGES:
                maps = getattr(net, name)(maps)
                found[name] = unit([float(channel.mean()) for channel in maps[0]])
        return found

    def unit(vector: list[float]) -> list[float]:
        length = math.sqrt(sum(value * value for value in vector))
        return [value / length for value in vector]

    of_class: dict[int, list[dict[str, list[float]]]] = {}
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            of_class.setdefault(int(label), []).append(vectors(image))
    scores = []
    for image in x:
        mine, affinities = vectors(image), []
        for layer in layers:
            cosines = []
            for members in of_class.values():
                sums = [sum(values) for values in zip(*(member[layer] for member in members), strict=True)]
                cosines.append(sum(a * b for a, b in zip(mine[layer], unit(sums), strict=True)))
            affinities.append(max(cosines))
        scores.append(1 - sum(affinities) / len(affinities))
    return scores


@pytest.mark.parametrize("layers", ["last_3", "last_1", "stage1,stage3", ["stage2"]])
def test_against_loops(net: nn.Module, x: Tensor, layers: str | list[str]) -> None:
    names = {"last_3": STAGES, "last_1": STAGES[2:], "stage1,stage3": STAGES[::2]}.get(str(layers), ("stage2",))
    pred, score = PrototypeFusion(net, layers=layers).fit(training(), val=training())(x)
    torch.testing.assert_close(
        score, torch.tensor(in_loops(net, x, names, training()), dtype=torch.double), rtol=0, atol=1e-6
    )  # prototypes are kept in single precision
    assert torch.equal(pred, net(x).argmax(1))


def test_neither_batches_nor_scales_nor_ood_images_matter(net: nn.Module, x: Tensor) -> None:
    expected = PrototypeFusion(net).fit(training(), val=training())(x)[1]
    reordered = [(images.flip(0), labels.flip(0)) for images, labels in reversed(training(7))]
    unknown = (tiny_suite.images(8, 2, 9).double(), torch.full((8,), -1))
    torch.testing.assert_close(PrototypeFusion(net).fit([unknown, *reordered], val=training())(x)[1], expected)
    net.stage3.register_forward_hook(lambda _module, _arguments, output: 5 * output)
    torch.testing.assert_close(PrototypeFusion(net).fit(training(), val=training())(x)[1], expected)


def test_a_class_without_images_has_no_prototype(net: nn.Module, x: Tensor) -> None:
    one_image_a_class = [(x[:3], torch.tensor([0, 2, 5]))]
    detector = PrototypeFusion(net).fit(one_image_a_class, val=training())
    assert {len(prototypes) for prototypes in detector.prototypes.values()} == {3}
    torch.testing.assert_close(detector(x)[1][:3], torch.zeros(3, dtype=torch.double), rtol=0, atol=1e-6)
    assert (detector(x)[1][3:] > 1e-4).all()


def test_one_fit_serves_every_number_of_stages(net: nn.Module, x: Tensor) -> None:
    fitted = PrototypeFusion(net, layers="last_1").fit(training(), val=training()).prototypes
    again = PrototypeFusion(net, layers="last_3")
    again.prototypes = fitted
    assert torch.equal(again(x)[1], PrototypeFusion(net).fit(training(), val=training())(x)[1])


def test_the_network_is_left_as_found(net: nn.Module, x: Tensor) -> None:
    before = surroundings(net, x)
    PrototypeFusion(net).fit(training(), val=training())(x)
    assert surroundings(net, x) == before


def test_what_cannot_be_done_is_said(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="no prototypes: call fit first"):
        PrototypeFusion(net)(x)
    with pytest.raises(ValueError, match="this network has 3 stages"):
        PrototypeFusion(net, layers="last_4").fit(training(), val=training())
    with pytest.raises(ValueError, match="calls no module 'stage4'; did you mean stage"):
        PrototypeFusion(net, layers="stage4").fit(training(), val=training())
    with pytest.raises(ValueError, match="no training images"):
        PrototypeFusion(net).fit([], val=training())
    for layers in ("", [], [3]):
        with pytest.raises(ValueError, match="layers="):
            PrototypeFusion(net, layers=layers)


# --- where stages end -----------------------------------------------------------------------------------------------

ENDS = {
    "resnet18_32x32": ("layer2", "layer3", "layer4"),
    "resnet50": ("layer2", "layer3", "layer4"),
    "wrn": ("block1", "block2", "relu"),
    "densenet": ("block1", "block2", "relu"),  # relu: of the third block, after its last normalisation
    "vit_b_16": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"),
    "mobilenet_v3_small": ("features.3", "features.8", "features"),
    "shufflenet_v2_x0_5": ("stage2", "stage3", "conv5"),
    "googlenet": ("inception3b", "inception4e", "inception5b"),
    "convnext": ("features.1", "features.3", "features"),
}


@pytest.mark.parametrize(
    "case", [c for c in networks.OPENOOD + networks.TORCHVISION if c.name in ENDS], ids=lambda case: case.name
)
def test_stages_of_known_networks(case: networks.Case) -> None:
    size = 64 if case.name.startswith("mobilenet") else case.size  # room for five halvings
    assert stages(case.make().eval(), torch.randn(1, 3, size, size))[-3:] == ENDS[case.name]


def test_padding_is_no_stage() -> None:
    def halving(channels: int) -> nn.Module:
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, 4, 3, stride=2), nn.ReLU())

    net = nn.Sequential(nn.Conv2d(3, 4, 1), halving(4), halving(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert stages(net.eval(), torch.randn(1, 3, 20, 30)) == ("0", "1", "2")
