"""Folders of images, for ``--data folders``."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from networks import SourceError
from networks.architecture import Input, Normalisation

from openood_sandi.runs import pictures

from .image_files import image_set
from .reading import AS_OPENOOD, Reading
from .suite import Group, ImageSet, digest


@dataclass(frozen=True)
class OodOption:
    """One value of ``--ood``: ``[near:|far:]NAME[=DIR]``."""

    name: str
    group: Group | None
    folder: Path | None

    @classmethod
    def parse(cls, text: str) -> OodOption:
        label, equals, folder = text.partition("=")
        before, colon, name = label.rpartition(":")
        if not name or (colon and before not in ("near", "far")) or (equals and not folder):
            raise argparse.ArgumentTypeError(f"{text!r} is not [near:|far:]NAME[=DIR]")
        group: Group | None = "near" if before == "near" else "far" if before == "far" else None
        return cls(name, group, Path(folder) if folder else None)


def classes_of(folder: Path, option: str = "--id") -> list[str]:
    """The names of the subfolders, one a class, in alphabetical order as torchvision's ImageFolder has them."""
    if not folder.is_dir():
        raise SourceError(f"{option} {folder} is no folder.")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not pictures.is_hidden(path.name))
    if len(names) < 2:
        raise SourceError(f"{option} {folder} has {len(names)} subfolders; expected one for each class.")
    return names


def indices(names: Sequence[str]) -> dict[str, int] | None:
    """The numbers that all names are, by name; None if they are not, or not all different."""
    numbers = {name: int(name) for name in names if name.isdecimal()}
    return numbers if len(set(numbers.values())) == len(names) else None


def numbered(names: Sequence[str], classes: int) -> tuple[dict[str, int], str]:
    """The class of each subfolder for a network of so many ``classes``, and a sentence that says how it was found.

    Raises:
        SourceError: the names neither are indices of the network's classes, nor as many as these.
    """
    numbers = indices(names)
    if numbers and max(numbers.values()) < classes:
        return numbers, f"Classes: {len(names)} folders, whose names are indices of the network's {classes} classes."
    if len(names) != classes:
        raise SourceError(
            f"The network has {classes} classes and the ID data {len(names)}; expected a folder for each class, or "
            f"folders named by indices from 0 to {classes - 1}."
        )
    order = "in alphabetical order, as torchvision's ImageFolder numbers them"
    return {name: number for number, name in enumerate(names)}, f"Classes: {classes} folders {order}."


def class_set(
    option: str,
    folder: Path,
    classes: Mapping[str, int],
    shape: Input,
    normalisation: Normalisation,
    reading: Reading,
) -> ImageSet:
    """The images in the subfolders of ``folder``, class by class; ``option`` named it.

    Raises:
        SourceError: a subfolder is none of ``classes``, or there is no image.
    """
    there = classes_of(folder, option)
    strange = [name for name in there if name not in classes]
    if strange:
        raise SourceError(f"{option} {folder} has the class {strange[0]!r}; known are {', '.join(classes)}.")
    found = {name: pictures.below(folder / name) for name in there}
    entries = [(f"{name}/{file}", classes[name]) for name, (files, _) in found.items() for file in files]
    if not entries:
        raise SourceError(
            f"There is no image ({', '.join(pictures.suffixes())}) in the subfolders of {option} {folder}."
        )
    others = sum((left for _, left in found.values()), Counter[str]())
    described = f"images in {folder}{_left_out(others)}"
    name = folder.resolve().name if option == "--id" else f"{option[2:]} {folder.resolve().name}"
    return image_set(name, "ID", folder, entries, shape, normalisation, described, reading)


def folder_set(
    name: str, group: Group, folder: Path, shape: Input, normalisation: Normalisation, reading: Reading = AS_OPENOOD
) -> ImageSet:
    """The images anywhere below ``folder``, in the order of their paths."""
    if not folder.is_dir():
        raise SourceError(f"--ood {name}: {folder} is no folder.")
    files, others = pictures.below(folder)
    entries = [(file, -1) for file in files]
    if not entries:
        raise SourceError(f"--ood {name}: there is no image ({', '.join(pictures.suffixes())}) below {folder}.")
    described = f"images below {folder}{_left_out(others)}"
    return image_set(name, group, folder, entries, shape, normalisation, described, reading)


def split(known: ImageSet, shares: Sequence[float]) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Of each class, the ``shares`` of its images for fitting and for validation, and the rest for the test.

    They are drawn by a hash of their names: the same files always go the same way.
    """
    by_class: dict[str, list[int]] = {}
    for place in sorted(range(len(known)), key=lambda place: hashlib.sha256(known.names[place].encode()).digest()):
        by_class.setdefault(known.names[place].partition("/")[0], []).append(place)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for name, places in by_class.items():
        first, second = (max(1, round(share * len(places))) for share in shares)
        if first + second >= len(places):
            raise SourceError(
                f"--split leaves no test image of {name!r}, which has {len(places)}; take smaller shares."
            )
        chosen = places[:first], places[first : first + second], places[first + second :]
        for part, some in zip(parts, chosen, strict=True):
            part.extend(some)

    def of(at: int, name: str) -> ImageSet:
        fingerprint = digest(known.fingerprint, f"part {at} of {tuple(shares)}")
        return replace(known.subset(sorted(parts[at])), name=name, fingerprint=fingerprint)

    return of(0, f"train {known.name}"), of(1, f"val {known.name}"), of(2, known.name)


def _left_out(others: Counter[str]) -> str:
    return f", left out: {pictures.in_words(others)}" if others else ""
