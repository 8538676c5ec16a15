"""What a run of OpenOOD's ``test_ood`` pipeline reads, looked for before it computes: lists, images, weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openood_sandi.plugin import cifar100

__all__ = ["require_files"]

#: At most so many images of a list are looked for, spread evenly over it.
_LOOKED_FOR = 100


@dataclass(frozen=True)
class _Source:
    """One loader of the run: its group (train, val, test, nearood, ...), its set's name there, and where it reads."""

    group: str
    name: str
    image_list: Path
    folder: Path

    def missing(self, reads_images: bool) -> tuple[str, Path] | None:
        """What of it is missing, in words, and the folder that it belongs into; None where nothing is."""
        if not self.image_list.is_file():
            return f"list        {self.image_list}", self.image_list.parents[1]
        image = _first_missing(self.image_list, self.folder) if reads_images else None
        if image is None:
            return None
        what = f"images      {self.folder / image}, and maybe others of {self.image_list}"
        return what, self.folder / Path(image).parts[0]


def require_files(config: Any, root: Path, run: str) -> None:
    """Check that every file which the run reads is there.

    Args:
        config: OpenOOD's configuration.
        root: the folder that its relative paths are relative to.
        run: what is running, in the message's words.

    Raises:
        SystemExit: the message names everything that is missing and where it is expected, OpenOOD's command that
            downloads it, and the setting that leaves it out, where one does.
    """
    sources = [*_sources(config, root)]
    found = {source: source.missing(_reads_images(source.group, config)) for source in sources}
    lacking = {source: missing for source, missing in found.items() if missing is not None}
    checkpoints = [file for file in _checkpoints(config.network) if not (root / file).is_file()]
    if not lacking and not checkpoints:
        return
    lines = [f"openood-sandi: {run} lacks", *(f"  {what}" for what, _ in lacking.values())]
    lines += [f"  checkpoint  {root / file} (--network.checkpoint {file})" for file in checkpoints]
    lines += _download(lacking, checkpoints)
    lines += _without(sources, lacking)
    lines += ["Files of your own: --network.checkpoint FILE, or --config YML ... for other data and networks."]
    raise SystemExit("\n".join(lines))


def _sources(config: Any, root: Path) -> Iterator[_Source]:
    for group in (config.dataset and config.dataset.split_names) or ():
        yield from _source(group, group, config.dataset[group], root)
    for group in (config.ood_dataset and config.ood_dataset.split_names) or ():
        settings = config.ood_dataset[group]
        if group == "val":
            yield from _source(group, group, settings, root)
        else:
            for name in settings.datasets:
                yield from _source(group, name, _known(name, group, settings), root)


def _source(group: str, name: str, settings: Any, root: Path) -> Iterator[_Source]:
    if settings.imglist_pth and settings.data_dir:
        yield _Source(group, name, root / settings.imglist_pth, root / settings.data_dir)


def _known(name: str, group: str, settings: Any) -> Any:
    if name not in settings:
        known = ", ".join(key for key in settings if key != "datasets")
        raise SystemExit(f"--ood_dataset.{group}.datasets: there is no set {name!r}. Did you mean: {known}?")
    return settings[name]


def _reads_images(group: str, config: Any) -> bool:
    # OpenOOD opens every list; training images are for methods with a set-up, which say so themselves
    return group != "train" and (group != "val" or bool(config.postprocessor.APS_mode))


def _first_missing(image_list: Path, folder: Path) -> str | None:
    """The first image of the list, of those looked for, that is not in ``folder``."""
    names = [line.split(" ", 1)[0] for line in image_list.read_text().splitlines() if line.strip()]
    for name in names[:: max(1, len(names) // _LOOKED_FOR)]:
        if not (folder / name).is_file():
            return name
    return None


def _checkpoints(network: Any) -> Iterator[str]:
    """Files that OpenOOD's ``get_network`` reads weights from."""
    if network and network.pretrained and network.name != "vit":
        files = network.checkpoint if isinstance(network.checkpoint, list) else [network.checkpoint]
        yield from (file for file in files if isinstance(file, str) and file != "none")
    if isinstance(network and network.backbone, dict):
        yield from _checkpoints(network.backbone)


def _download(lacking: dict[_Source, tuple[str, Path]], checkpoints: list[str]) -> list[str]:
    """OpenOOD's command for what it offers, and what keeps it from acting."""
    # test_svhn.txt: svhn
    names = list(dict.fromkeys(source.image_list.stem.partition("_")[2] for source in lacking))
    own_checkpoint = cifar100.CHECKPOINT in checkpoints
    contents = ["datasets"] * bool(names) + ["checkpoints"] * own_checkpoint
    if not contents:
        return []
    command = ["python scripts/download/download.py --contents", *contents]
    if names:
        command += ["--dataset_mode dataset --datasets", *names]
    if own_checkpoint:
        command += ["--checkpoints", cifar100.CHECKPOINT_DOWNLOAD]
    checkout = Path(sys.modules["openood"].__file__ or "").resolve().parents[1]
    lines = ["OpenOOD downloads it with", f"  cd {checkout}", "  pip install gdown"]
    lines += [f"  {' '.join(command)} --save_dir ./data ./results"]
    in_the_way = dict.fromkeys(folder for _, folder in lacking.values() if folder.is_dir() and os.listdir(folder))
    if in_the_way:
        lines += [
            "but skips a folder that is not empty, which these are; download into another --save_dir and add to them:"
        ]
        lines += [f"  {folder}" for folder in in_the_way]
    return lines


def _without(sources: list[_Source], lacking: dict[_Source, tuple[str, Path]]) -> list[str]:
    """The settings that leave out what is missing, where each group of OOD sets keeps one."""
    settings = []
    for group in dict.fromkeys(source.group for source in lacking):
        left = [source.name for source in sources if source.group == group and source not in lacking]
        if not left:  # OpenOOD needs this one
            return []
        settings.append(f"--ood_dataset.{group}.datasets [{','.join(left)}]")
    return ["To run without it:", f"  {' '.join(settings)}"] if settings else []
