"""Networks by name: how to build one, and what images it takes."""

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

from .cifar import CifarResNet, WideResNet
from .errors import SourceError
from .imagenet import BitResNet, ImageNetResNet
from .mobilenet import MobileNetV2

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in 0..1, by channel."""
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
class Network:
    """An architecture: what papers call it, a function of the number of classes, and the input it was trained on.

    Without an input, that is the data set's.
    """

    title: str
    make: Callable[[int], nn.Module]
    input: Input | None


def _cifar(blocks: tuple[int, ...]) -> Callable[[int], nn.Module]:
    return lambda classes: CifarResNet(blocks, classes=classes)


def _thin(depth: int) -> Network:
    """He et al.'s for CIFAR; the public weights were trained on images normalised as ImageNet's are."""
    blocks = ((depth - 2) // 6,) * 3
    return Network(
        f"ResNet-{depth} (3 stages, option A shortcuts)",
        lambda classes: CifarResNet(blocks, (16, 32, 64), classes, padded=True),
        replace(SMALL, normalisation=IMAGENET),
    )


NETWORKS: dict[str, Network] = {
    "resnet18_32x32": Network("ResNet-18 for 32 pixels", _cifar((2, 2, 2, 2)), SMALL),
    "resnet34": Network("ResNet-34 for 32 pixels", _cifar((3, 4, 6, 3)), SMALL),
    "wrn40-2": Network("WRN-40-2", lambda classes: WideResNet(40, 2, classes=classes), SMALL),
    **{f"resnet{depth}": _thin(depth) for depth in (20, 32, 44, 56, 110)},
    "resnet50": Network("ResNet-50", lambda classes: ImageNetResNet((3, 4, 6, 3), classes=classes), LARGE),
    # The input of the weights that OOD papers share, fine-tuned by Huang and Li (MOS, CVPR 2021).
    "bit-s-r101x1": Network(
        "BiT-S-R101x1",
        lambda classes: BitResNet((3, 4, 23, 3), classes=classes),
        Input((480, 480), 480, ((0.5,) * 3, (0.5,) * 3)),
    ),
    "mobilenet_v2": Network(
        "MobileNetV2 (batch norms folded)", MobileNetV2, Input(256, 224, ((128 / 255,) * 3, (128 / 255,) * 3))
    ),
}
PREFIXES = ("openood:NAME", "torchvision:NAME")
DOWNLOAD = "DEFAULT"
"""Stands for torchvision's own weights, which are downloaded."""


def network(name: str) -> Network:
    """The network of a name in ``NETWORKS``, of OpenOOD's or of torchvision's; SourceError if there is none."""
    family, _, rest = name.rpartition(":")
    if family == "openood":
        return _openood(rest)
    if family == "torchvision":
        return _torchvision(rest)
    if name not in NETWORKS:
        raise SourceError(f"No network is called {name!r}; there are {', '.join((*NETWORKS, *PREFIXES))}.")
    return NETWORKS[name]


def _openood(name: str) -> Network:
    """The network that ``--network.name`` of OpenOOD's main.py gives, whose name may tell the size of its input."""
    get_network = _imported("openood.networks.utils").get_network

    def make(classes: int) -> nn.Module:
        # On the CPU: OpenOOD would put it on a GPU, and the benchmark does that itself.
        config = SimpleNamespace(name=name, num_classes=classes, pretrained=False, num_gpus=0)
        try:
            net: nn.Module = get_network(config)
        except Exception as error:
            raise SourceError(f"OpenOOD makes no network {name!r}: {type(error).__name__}: {error}.") from error
        return net

    size = re.search(r"_(\d+)x\1$", name)
    if size is None:
        return Network(f"OpenOOD's {name}", make, None)
    crop = int(size[1])
    return Network(f"OpenOOD's {name}", make, Input(256 if crop == 224 else crop, crop))


def _torchvision(name: str) -> Network:
    models = _imported("torchvision.models")
    if name not in models.list_models(models):  # the classifiers among them
        raise SourceError(f"torchvision has no classifier {name!r}; its list_models(torchvision.models) names them.")
    return Network(f"torchvision's {name}", lambda classes: models.get_model(name, num_classes=classes), LARGE)


def downloaded(name: str) -> tuple[nn.Module, Network]:
    """Torchvision's network with torchvision's best weights, which are downloaded if need be, and what it is."""
    weights = default_weights(name)
    net: nn.Module = _imported("torchvision.models").get_model(name.rpartition(":")[2], weights=weights)
    return net, replace(network(name), input=input_of(weights))


def default_weights(name: str) -> Any:
    """Torchvision's best weights, by name: nothing is downloaded yet."""
    family, _, rest = name.rpartition(":")
    if family != "torchvision":
        raise SourceError(f"--checkpoint {DOWNLOAD} is for --network torchvision:NAME, not {name}.")
    network(name)
    return _imported("torchvision.models").get_model_weights(rest).DEFAULT


def input_of(weights: Any) -> Input:
    """The input of torchvision's ``weights`` of a classifier."""
    preset = weights.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    return Input(resize, crop, (tuple(preset.mean), tuple(preset.std)), preset.interpolation.value)


def _imported(module: str) -> Any:
    if module.startswith("openood."):
        from openood_sandi import register

        register()  # stand-ins for packages that OpenOOD imports and no network needs
        home = os.environ.get("OPENOOD_HOME")
        if home and home not in sys.path:
            sys.path.append(home)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        remedy = {
            "openood": "install OpenOOD, or let OPENOOD_HOME name a checkout",
            "torchvision": "pip install torchvision",
        }[package]
        raise SourceError(f"{package} cannot be imported ({error}): {remedy}.") from error


def on_meta(classes: int) -> list[tuple[str, nn.Module]]:
    """Every network of ``NETWORKS``, without memory for its weights."""
    with torch.device("meta"):
        return [(name, preset.make(classes)) for name, preset in NETWORKS.items()]
