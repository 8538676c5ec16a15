"""The protocol that ``python main.py --postprocessor NAME`` runs when it is given no ``--config``.

OpenOOD's CIFAR-100 benchmark with its ``resnet18_32x32``: near-OOD CIFAR-10 and TinyImageNet, far-OOD MNIST,
SVHN, Textures and Places365.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Files under the checkout's ``configs/``, as in OpenOOD's own ``scripts/ood/``.
CONFIGS = (
    "datasets/cifar100/cifar100.yml",
    "datasets/cifar100/cifar100_ood.yml",
    "networks/resnet18_32x32.yml",
    "pipelines/test/test_ood.yml",
    "preprocessors/base_preprocessor.yml",
)

#: Where OpenOOD's ``download.py`` puts the first of its three CIFAR-100 networks.
CHECKPOINT = "results/cifar100_resnet18_32x32_base_e100_lr0.1_default/s0/best.ckpt"
CHECKPOINT_DOWNLOAD = "cifar100_res18_v1.5"

#: At most so many images of a list are looked for, spread evenly over it.
_LOOKED_FOR = 100


def overrides() -> list[str]:
    """The protocol's ``--key value`` arguments: the checkpoint, no question on stdin, CPU where need be."""
    import torch

    gpus = [] if torch.cuda.device_count() else ["--num_gpus", "0"]
    return ["--network.checkpoint", CHECKPOINT, "--merge_option", "merge", *gpus]


def require_files(config: Any, checkout: Path) -> None:
    """Check that every file the protocol reads is there, before anything is computed.

    Args:
        config: OpenOOD's configuration, whose relative paths are relative to ``checkout``.
        checkout: the OpenOOD checkout.

    Raises:
        SystemExit: the message names everything that is missing, where it is expected and OpenOOD's download
            command.
    """
    missing: list[str] = []
    datasets: dict[str, None] = {}  # an ordered set
    in_the_way: dict[Path, None] = {}  # folders that download.py would not fill, as they are not empty
    for split, source in _sources(config):
        image_list = checkout / source.imglist_pth
        if not image_list.is_file():
            missing.append(f"list        {image_list}")
            in_the_way[image_list.parents[1]] = None
        elif _reads_images(split, config):
            folder = checkout / source.data_dir
            image = _first_missing(image_list, folder)
            if image is None:
                continue
            missing.append(f"images      {folder / image}, and maybe others of {image_list}")
            in_the_way[folder / Path(image).parts[0]] = None
        else:
            continue
        datasets[image_list.stem.partition("_")[2]] = None  # test_svhn.txt: svhn
    checkpoint = checkout / config.network.checkpoint
    if not checkpoint.is_file():
        missing.append(f"checkpoint  {checkpoint}")
    if missing:
        full = [str(folder) for folder in in_the_way if folder.is_dir() and os.listdir(folder)]
        raise SystemExit(_message(missing, list(datasets), not checkpoint.is_file(), full, checkout))


def _sources(config: Any) -> Iterator[tuple[str, Any]]:
    """(split's name, its configuration with ``imglist_pth`` and ``data_dir``) of every loader of the run."""
    for split in config.dataset.split_names:
        yield split, config.dataset[split]
    for split in config.ood_dataset.split_names:
        group = config.ood_dataset[split]
        if split == "val":
            yield split, group
        else:
            for name in group.datasets:
                yield split, group[name]


def _reads_images(split: str, config: Any) -> bool:
    # OpenOOD opens every list; training images are for methods with a set-up, which say so themselves
    return split != "train" and (split != "val" or bool(config.postprocessor.APS_mode))


def _first_missing(image_list: Path, folder: Path) -> str | None:
    """The first image of the list, of those looked for, that is not in ``folder``."""
    names = [line.split(" ", 1)[0] for line in image_list.read_text().splitlines() if line.strip()]
    for name in names[:: max(1, len(names) // _LOOKED_FOR)]:
        if not (folder / name).is_file():
            return name
    return None


def _message(
    missing: list[str], datasets: list[str], no_checkpoint: bool, in_the_way: list[str], checkout: Path
) -> str:
    contents = ["datasets"] * bool(datasets) + ["checkpoints"] * no_checkpoint
    command = ["python scripts/download/download.py --contents", *contents]
    if datasets:
        command += ["--dataset_mode dataset --datasets", *datasets]
    if no_checkpoint:
        command += ["--checkpoints", CHECKPOINT_DOWNLOAD]
    command += ["--save_dir ./data ./results"]
    lines = ["openood-sandi: without --config this command runs OpenOOD's CIFAR-100 protocol, which lacks"]
    lines += [f"  {line}" for line in missing]
    lines += [
        "OpenOOD downloads it with",
        f"  cd {checkout}",
        "  pip install gdown",
        f"  {' '.join(command)}",
    ]
    if in_the_way:
        lines += [
            "but skips a folder that is not empty, so remove first:",
            *(f"  {path}" for path in in_the_way),
        ]
    lines += ["Files of your own: --network.checkpoint FILE, or --config YML ... for other data and networks."]
    return "\n".join(lines)
