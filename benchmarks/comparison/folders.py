"""``--data folders``: any folders of images; also OOD sets of the other benchmarks."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from networks import SourceError
from networks.catalogue import Input, Normalisation

from .image_files import SUFFIXES, image_set
from .suite import Group, ImageSet


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


def classes_of(folder: Path) -> dict[str, int]:
    """The class of each subfolder: its name where all names are numbers, else its place in alphabetical order."""
    if not folder.is_dir():
        raise SourceError(f"--id {folder} is no folder.")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) < 2:
        raise SourceError(f"--id {folder} has {len(names)} subfolders; expected one for each class.")
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}
    return {name: number for number, name in enumerate(names)}


def id_set(folder: Path, classes: dict[str, int], shape: Input, normalisation: Normalisation) -> ImageSet:
    """The images in the subfolders of ``folder``, class by class."""
    entries = [(f"{name}/{file}", label) for name, label in classes.items() for file in _files(folder / name)]
    if not entries:
        raise SourceError(f"There is no image ({', '.join(SUFFIXES)}) in the subfolders of --id {folder}.")
    return image_set(folder.resolve().name, "ID", folder, entries, shape, normalisation, f"images in {folder}")


def folder_set(name: str, group: Group, folder: Path, shape: Input, normalisation: Normalisation) -> ImageSet:
    """The images anywhere below ``folder``, in the order of their paths."""
    if not folder.is_dir():
        raise SourceError(f"--ood {name}: {folder} is no folder.")
    entries = [(file, -1) for file in _files(folder)]
    if not entries:
        raise SourceError(f"--ood {name}: there is no image ({', '.join(SUFFIXES)}) below {folder}.")
    return image_set(name, group, folder, entries, shape, normalisation, f"images below {folder}")


def _files(folder: Path) -> list[str]:
    """Images below ``folder``, through links too, but none that is hidden."""
    found = [
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    return sorted(found)
