"""``--data cifar10``, ``cifar100``, ``imagenet``: image lists in the layout of OpenOOD's download.

Below the root, ``benchmark_imglist/ID/SPLIT_SET.txt`` holds a line "file label" for each image; files are named below
``images_classic`` or ``images_largescale``. Which OOD sets belong to which ID set, OpenOOD or the S&I paper says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from networks import SourceError
from networks.architecture import Input, Normalisation
from networks.catalogue import LARGE, SMALL

from .folders import OodOption, folder_set
from .image_files import image_set
from .reading import AS_OPENOOD, Reading
from .suite import Group, ImageSet


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
IMAGES = ("images_classic", "images_largescale")


@dataclass(frozen=True)
class ImageLists:
    """The lists of ID data set ``data`` under ``root``, for a network of a given input.

    Every method raises SourceError where there is no such list, or not all of its images.
    """

    data: str
    root: Path
    shape: Input
    normalisation: Normalisation
    reading: Reading = AS_OPENOOD

    def in_distribution(self) -> ImageSet:
        """The ID test images."""
        return self._read("test", self.data, "ID")

    def training(self) -> ImageSet:
        """The ID training images, preprocessed as test images are."""
        return self._read("train", self.data, "ID")

    def validation(self) -> tuple[ImageSet, ...]:
        """The ID images to set thresholds by, and the OOD images that OpenOOD searches options on, where there are."""
        unknown = BENCHMARKS[self.data].validation
        known = self._read("val", self.data, "ID")
        try:
            return known, self._read("val", unknown, BENCHMARKS[self.data].group(unknown))
        except SourceError:
            return (known,)

    def out_of_distribution(
        self, protocol: Protocol, asked: list[OodOption]
    ) -> tuple[tuple[ImageSet, ...], tuple[str, ...]]:
        """The sets of ``protocol`` that are there and those ``asked`` for, and what was left out and why.

        Raises SourceError if a set asked for is not there, or none at all.
        """
        benchmark = BENCHMARKS[self.data]
        wanted: dict[str, Group] = {**benchmark.sets(protocol)}
        for option in asked:
            wanted[option.name] = option.group or wanted.get(option.name) or benchmark.group(option.name)
        options = {option.name: option for option in asked}
        found, missing = [], []
        pixels = self.shape, self.normalisation, self.reading
        for name, group in wanted.items():
            folder = options[name].folder if name in options else None
            try:
                if folder is None:
                    found.append(self._read("test", name, group))
                else:
                    found.append(folder_set(name, group, folder, *pixels))
            except SourceError as error:
                if name in options:
                    raise SourceError(f"--ood {name}: {error}.") from error
                missing.append(f"{name} ({group}-OOD): {error}")
        names = {path.stem.removeprefix("test_") for path in self._folder.glob("test_*.txt")}
        others = ", ".join(sorted(names - {*wanted, self.data}))
        if not found:
            hint = f"\nThere are lists of {others}; --ood NAME ... takes them." if others else ""
            raise SourceError(f"None of {PROTOCOLS[protocol]} is there:\n  " + "\n  ".join(missing) + hint)
        if others:
            missing.append(f"{others}: not among {PROTOCOLS[protocol]}; --ood NAME ... adds a list")
        return tuple(found), tuple(missing)

    @property
    def _folder(self) -> Path:
        return self.root / "benchmark_imglist" / self.data

    def _read(self, split: str, name: str, group: Group) -> ImageSet:
        path = self._folder / f"{split}_{name}.txt"
        if not path.is_file():
            raise SourceError(f"there is no list {path}")
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [self._entry(line, f"line {number} of {path}", group) for number, line in enumerate(lines, 1)]
        if not entries:
            raise SourceError(f"the list {path} is empty")
        first, _ = entries[0]
        folder = next((folder for folder in IMAGES if (self.root / folder / first).is_file()), None)
        if folder is None:
            raise SourceError(f"the first image of {path}, {first}, is not in {' or '.join(IMAGES)} of {self.root}")
        shown = name if split == "test" else f"{split} {name}"
        description = f"OpenOOD's list {self.data}/{path.name}"
        pixels = self.shape, self.normalisation
        return image_set(shown, group, self.root / folder, entries, *pixels, description, self.reading)

    def _entry(self, line: str, place: str, group: Group) -> tuple[str, int]:
        file, _, text = line.partition(" ")
        try:
            label = int(text)
        except ValueError:
            raise SourceError(f"{place} is {line!r}; expected a file and its label") from None
        classes = BENCHMARKS[self.data].classes
        if group == "ID" and not 0 <= label < classes:
            raise SourceError(f"{place} has the label {label}; expected 0 to {classes - 1}")
        return file, label if group == "ID" else -1
