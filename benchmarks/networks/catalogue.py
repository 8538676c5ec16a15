"""Networks by name: how to build one, what images it takes, and where the S&I paper splits it."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import SourceError, outside
from .architecture import IMAGENET, Architecture, Input
from .cifar import CifarResNet, WideResNet
from .imagenet import BitResNet, MobileNetV2
from .libraries import imported

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
PREFIXES = ("openood:NAME", "torchvision:NAME", "timm:NAME", "hf:DIR", "FILE.py:FACTORY")
DOWNLOAD = "DEFAULT"
"""Stands for torchvision's or timm's own weights, which are downloaded."""


def architecture(name: str) -> Architecture:
    """The one of a name in ``ARCHITECTURES``, or of one of ``PREFIXES``; SourceError if there is none."""
    family, _, rest = name.partition(":")
    families = {
        "openood": _openood,
        "torchvision": _torchvision,
        "timm": outside.timm_network,
        "hf": outside.hugging_face_network,
    }
    if rest and family in families:
        return families[family](rest)
    file, _, factory = name.rpartition(":")
    if file.endswith(".py"):
        return outside.own_network(file, factory)
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


def downloaded(name: str) -> tuple[nn.Module, Architecture, str]:
    """The network with its library's best weights, which are downloaded if need be, what it is, and their name."""
    if name.startswith("timm:"):
        return outside.timm_trained(name[5:]), architecture(name), "timm's weights"
    weights = default_weights(name)
    net: nn.Module = imported("torchvision.models").get_model(name.rpartition(":")[2], weights=weights)
    return net, replace(architecture(name), input=input_of(weights)), f"weights {weights}"


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


def on_meta(classes: int) -> list[tuple[str, nn.Module]]:
    """Every network of ``ARCHITECTURES``, without memory for its weights."""
    with torch.device("meta"):
        return [(name, preset.make(classes)) for name, preset in ARCHITECTURES.items()]
