"""Networks by name: how to build one, what images it takes, and where the S&I paper splits it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from openood_sandi import named_networks
from openood_sandi.named_networks import FORMS, imported, input_of_torchvision, made

from . import SourceError
from .architecture import IMAGENET, Architecture, Input
from .cifar import CifarResNet, WideResNet
from .imagenet import BitResNet, MobileNetV2

NORMS = (nn.BatchNorm2d, nn.GroupNorm)


SMALL = Input(32, 32)
LARGE = Input(256, 224, IMAGENET)


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
        lambda classes: imported("torchvision.models").get_model("resnet50", num_classes=classes),
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
DOWNLOAD = "DEFAULT"
"""Stands for torchvision's or timm's own weights, which are downloaded."""


def architecture(name: str) -> Architecture:
    """The one of a name in ``ARCHITECTURES``, or in one of the package's ``FORMS``; SourceError if there is none."""
    if ":" not in name:
        if name not in ARCHITECTURES:
            raise SourceError(f"No network is called {name!r}; there are {', '.join((*ARCHITECTURES, *FORMS))}.")
        return ARCHITECTURES[name]
    found = named_networks.architecture(name)
    # weights from a file need not be torchvision's best, whose input may be larger
    shape = LARGE if name.startswith("torchvision:") else found.input
    return Architecture(found.title, found.make, shape, ready=found.ready)


def downloaded(name: str) -> tuple[nn.Module, Architecture, str]:
    """The network with its library's best weights, which are downloaded if need be, what it is, and their name."""
    if name.startswith("timm:"):
        timm = imported("timm")
        return made(timm.create_model, name[5:], pretrained=True), architecture(name), "timm's weights"
    weights = default_weights(name)
    net: nn.Module = imported("torchvision.models").get_model(name.rpartition(":")[2], weights=weights)
    return net, replace(architecture(name), input=input_of_torchvision(weights)), f"weights {weights}"


def default_weights(name: str) -> Any:
    """Torchvision's best weights, by name: nothing is downloaded yet."""
    if not name.startswith("torchvision:"):
        raise SourceError(f"--checkpoint {DOWNLOAD} is for --network torchvision:NAME, not {name}.")
    architecture(name)
    return imported("torchvision.models").get_model_weights(name.rpartition(":")[2]).DEFAULT


def on_meta(classes: int) -> list[tuple[str, nn.Module]]:
    """Every network of ``ARCHITECTURES``, without memory for its weights."""
    with torch.device("meta"):
        return [(name, preset.make(classes)) for name, preset in ARCHITECTURES.items()]
