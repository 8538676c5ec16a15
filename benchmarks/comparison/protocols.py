"""Which OOD sets belong to which ID set: OpenOOD's near and far sets, and those of the S&I paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from networks.catalogue import LARGE, SMALL, Input


@dataclass(frozen=True)
class Benchmark:
    """An ID set with its OOD sets, by the names that OpenOOD's image lists have.

    Attributes:
        near, far: OpenOOD 1.5's groups (Zhang et al., "OpenOOD v1.5", 2023).
        paper: the S&I paper's sets, which are GAIA's. Groups are OpenOOD's, as the paper has none.
        validation: the OOD set that OpenOOD searches options on.
        input: OpenOOD's preprocessing of test images, which its networks were trained for.
        network: OpenOOD's network for it.
    """

    classes: int
    near: tuple[str, ...]
    far: tuple[str, ...]
    paper: tuple[str, ...]
    validation: str
    input: Input
    network: str

    def sets(self, protocol: Protocol) -> dict[str, Literal["near", "far"]]:
        """The protocol's sets and their groups."""
        return {name: self.group(name) for name in (self.paper if protocol == "paper" else (*self.near, *self.far))}

    def group(self, name: str) -> Literal["near", "far"]:
        return "near" if name in self.near else "far"


Protocol = Literal["openood", "paper"]
PROTOCOLS: dict[Protocol, str] = {
    "openood": "OpenOOD's near and far sets",
    "paper": "the S&I paper's sets, by OpenOOD's image lists",
}

CIFAR10 = Benchmark(
    classes=10,
    near=("cifar100", "tin"),
    far=("mnist", "svhn", "texture", "places365"),
    paper=("svhn", "lsun", "tin", "places365", "texture"),
    validation="tin",
    input=replace(SMALL, normalisation=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    network="resnet18_32x32",
)
BENCHMARKS = {
    "cifar10": CIFAR10,
    "cifar100": replace(
        CIFAR10,
        classes=100,
        near=("cifar10", "tin"),
        input=replace(SMALL, normalisation=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    ),
    "imagenet": Benchmark(
        classes=1000,
        near=("ssb_hard", "ninco"),
        far=("inaturalist", "textures", "openimage_o"),
        paper=("inaturalist", "textures", "sun", "places"),
        validation="openimage_o",
        input=LARGE,
        network="resnet50",
    ),
}

TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet-1k",
    "inaturalist": "iNaturalist",
    "lsun": "LSUN",
    "mnist": "MNIST",
    "ninco": "NINCO",
    "openimage_o": "OpenImage-O",
    "places": "Places",
    "places365": "Places365",
    "ssb_hard": "SSB-hard",
    "sun": "SUN",
    "svhn": "SVHN",
    "texture": "Textures (DTD)",
    "textures": "Textures (DTD)",
    "tin": "TinyImageNet",
}
