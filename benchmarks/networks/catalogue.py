"""Networks by name: how to build one, what images it takes, and where the S&I paper splits it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import SourceError
from .cifar import CifarResNet, WideResNet
from .imagenet import BitResNet, MobileNetV2

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in 0..1, by channel."""
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMS = (nn.BatchNorm2d, nn.GroupNorm)


@dataclass(frozen=True)
class Input:
    """What a network takes: an image resized, cropped at its centre, and normalised."""

    resize: int | tuple[int, int]
    """Pixels of the shorter side; or height and width, which squeezes the image."""
    crop: int
    """Pixels of either side."""
    normalisation: Normalisation | None = None
    """None: that of the data set trained on."""
    interpolation: str = "bilinear"


SMALL = Input(32, 32)
LARGE = Input(256, 224, IMAGENET)


@dataclass(frozen=True)
class Architecture:
    """What papers call a network, a function of the number of classes, and the input that it was trained on."""

    title: str
    make: Callable[[int], nn.Module]
    input: Input | None
    """None: the data set's."""
    paper_splits: Callable[[nn.Module], list[str]] = lambda _: []
    """Modules of such a network where the S&I paper splits it; none where it says nothing of its kind."""
    paper_feature: str | None = None
    """The paper's F of Eq. 12, by module name."""


def norms(net: nn.Module, prefix: str = "") -> list[str]:
    """The normalisation layers, in order of definition."""
    return [name for name, module in net.named_modules() if isinstance(module, NORMS) and name.startswith(prefix)]


def _first_and_blocks(net: nn.Module) -> list[str]:
    """The first convolution, and every normalisation layer of the blocks: 36 in ResNet-34."""
    return ["conv1", *(name for name in norms(net) if name != "bn1")]


def _cifar(title: str, *blocks: int) -> Architecture:
    return Architecture(title, lambda classes: CifarResNet(blocks, classes=classes), SMALL, _first_and_blocks)


def _thin(depth: int) -> Architecture:
    """He et al.'s for CIFAR; the public weights were trained on images normalised as ImageNet's are."""
    blocks = ((depth - 2) // 6,) * 3
    return Architecture(
        f"ResNet-{depth} (3 stages, option A shortcuts)",
        lambda classes: CifarResNet(blocks, (16, 32, 64), classes, padded=True),
        replace(SMALL, normalisation=IMAGENET),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18_32x32": _cifar("ResNet-18 for 32 pixels", 2, 2, 2, 2),
    "resnet34": _cifar("ResNet-34 for 32 pixels", 3, 4, 6, 3),
    "wrn40-2": Architecture(
        "WRN-40-2",
        lambda classes: WideResNet(40, 2, classes=classes),
        SMALL,
        lambda net: [*norms(net), "avgpool"],
    ),
    **{f"resnet{depth}": _thin(depth) for depth in (20, 32, 44, 56, 110)},
    "resnet50": Architecture(
        "ResNet-50",
        lambda classes: _torchvision("resnet50").make(classes),
        LARGE,
        lambda net: norms(net, "layer4."),  # the paper's choice on BiT, carried over
        "layer4",
    ),
    # The input of the weights that OOD papers share, fine-tuned by Huang and Li (MOS, CVPR 2021).
    "bit-s-r101x1": Architecture(
        "BiT-S-R101x1",
        lambda classes: BitResNet((3, 4, 23, 3), classes=classes),
        Input((480, 480), 480, ((0.5,) * 3, (0.5,) * 3)),
        lambda net: norms(net, "body.block4."),
        "before_head",
    ),
    "mobilenet_v2": Architecture(
        "MobileNetV2 (batch norms folded)", MobileNetV2, Input(256, 224, ((128 / 255,) * 3, (128 / 255,) * 3))
    ),
}
PREFIXES = ("openood:NAME", "torchvision:NAME")
DOWNLOAD = "DEFAULT"
"""Stands for torchvision's own weights, which are downloaded."""


def architecture(name: str) -> Architecture:
    """The one of a name in ``ARCHITECTURES``, of OpenOOD's or of torchvision's; SourceError if there is none."""
    family, _, rest = name.rpartition(":")
    if family in ("openood", "torchvision"):
        return _openood(rest) if family == "openood" else _torchvision(rest)
    if name not in ARCHITECTURES:
        raise SourceError(f"No network is called {name!r}; there are {', '.join((*ARCHITECTURES, *PREFIXES))}.")
    return ARCHITECTURES[name]


def _openood(name: str) -> Architecture:
    """The network that ``--network.name`` of OpenOOD's main.py gives, whose name may tell the size of its input."""
    get_network = imported("openood.networks.utils").get_network

    def make(classes: int) -> nn.Module:
        # On the CPU: OpenOOD would put it on a GPU, and the benchmark does that itself.
        config = SimpleNamespace(name=name, num_classes=classes, pretrained=False, num_gpus=0)
        try:
            net: nn.Module = get_network(config)
        except Exception as error:
            raise SourceError(f"OpenOOD makes no network {name!r}: {type(error).__name__}: {error}.") from error
        return net

    size = re.search(r"_(\d+)x\1$", name)
    crop = int(size[1]) if size else 0
    return Architecture(f"OpenOOD's {name}", make, Input(256 if crop == 224 else crop, crop) if size else None)


def _torchvision(name: str) -> Architecture:
    models = imported("torchvision.models")
    if name not in models.list_models(models):  # the classifiers among them
        raise SourceError(f"torchvision has no classifier {name!r}; its list_models(torchvision.models) names them.")
    return Architecture(f"torchvision's {name}", lambda classes: models.get_model(name, num_classes=classes), LARGE)


def downloaded(name: str) -> tuple[nn.Module, Architecture, Any]:
    """Torchvision's network with its best weights, which are downloaded if need be, what it is, and their name."""
    weights = default_weights(name)
    net: nn.Module = imported("torchvision.models").get_model(name.rpartition(":")[2], weights=weights)
    return net, replace(architecture(name), input=input_of(weights)), weights


def default_weights(name: str) -> Any:
    """Torchvision's best weights, by name: nothing is downloaded yet."""
    if not name.startswith("torchvision:"):
        raise SourceError(f"--checkpoint {DOWNLOAD} is for --network torchvision:NAME, not {name}.")
    architecture(name)
    return imported("torchvision.models").get_model_weights(name.rpartition(":")[2]).DEFAULT


def input_of(weights: Any) -> Input:
    """The input of torchvision's ``weights`` of a classifier."""
    preset = weights.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    return Input(resize, crop, (tuple(preset.mean), tuple(preset.std)), preset.interpolation.value)


def imported(module: str) -> Any:
    """A module of OpenOOD or torchvision; SourceError if there is none."""
    package = module.partition(".")[0]
    try:
        if package == "openood":
            openood_importable()
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "let OPENOOD_HOME name a checkout, or " if package == "openood" else ""
        raise SourceError(f"{package} cannot be imported ({error}): {remedy}pip install it.") from error


def openood_importable() -> None:
    """Let a checkout that ``$OPENOOD_HOME`` names be imported, without the packages that no benchmark needs of it."""
    from openood_sandi import register

    register()
    home = os.environ.get("OPENOOD_HOME")
    if home and home not in sys.path:
        sys.path.append(home)  # last: a checkout has a package "tests" of its own


def on_meta(classes: int) -> list[tuple[str, nn.Module]]:
    """Every network of ``ARCHITECTURES``, without memory for its weights."""
    with torch.device("meta"):
        return [(name, preset.make(classes)) for name, preset in ARCHITECTURES.items()]
