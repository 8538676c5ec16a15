"""From the command line to a :class:`Suite`: ``--data`` and all that goes with it, the network with its weights too."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from networks import SourceError, catalogue, checkpoints
from networks.architecture import Architecture, Input, Normalisation
from torch import nn

from openood_sandi.named_networks import FORMS

from . import digits, folders
from .console import number, positive
from .folders import OodOption
from .image_lists import BENCHMARKS, PROTOCOLS, ImageLists
from .reading import AS_OPENOOD, POLICIES, Reading
from .suite import Suite, state_digest
from .training import RECIPES, Recipe, default_cache

RANDOM = "random"
"""Stands for weights that nobody trained."""
SEED = "{seed}"
"""In a checkpoint's path, gives way to the seed."""
SPLIT = (0.5, 0.2)
"""Shares for training and for validation of ``--split``."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".npz")


def trained_network(
    options: argparse.Namespace, name: str, checkpoint: str | None, seed: int, classes: int, default: Input | None
) -> tuple[dict[str, Any], Input]:
    """What a suite tells of the network ``name``, and its input.

    It has as many classes as its weights, or ``classes`` where these do not tell. ``checkpoint`` is a file, or
    ``RANDOM``, or ``catalogue.DOWNLOAD``, or None for a network that comes with its own weights. What of the input
    neither the user's options nor the network tell is that of ``default``, the data set's.
    """
    preset = catalogue.architecture(name)
    if checkpoint == catalogue.DOWNLOAD:
        net, preset, origin = catalogue.downloaded(name)
    else:
        net, origin = _seeded(preset, classes, seed), f"random weights of seed {seed}"
        if preset.ready and checkpoint in (None, RANDOM):
            origin = f"its own weights, from seed {seed}"
        elif checkpoint not in (None, RANDOM):
            path = Path(checkpoint.replace(SEED, str(seed)))
            state = checkpoints.read(path)
            found = checkpoints.classes(net, state) or classes
            net = net if found == classes else _seeded(preset, found, seed)
            checkpoints.load(net, state, path, lambda: catalogue.on_meta(found))
            origin = f"weights of {path.name}"
    shape, normalisation = _input(options, name, preset.input, default)
    told = {
        "network": net.eval(),
        "network_name": name,
        "network_description": f"{preset.title}, {origin}",
        "weights": state_digest(net),
        "classes": _outputs(net, name, shape),
        "normalisation": normalisation,
        "paper_splits": tuple(preset.paper_splits(net)),
        "paper_feature": preset.paper_feature,
    }
    return told, shape


def _outputs(net: nn.Module, name: str, shape: Input) -> int:
    """How many classes the network tells apart, of one image in its size."""
    try:
        with torch.no_grad():
            logits = net(torch.zeros(1, 3, shape.crop, shape.crop))
    except Exception as error:  # a network of the user's own may fail in any way
        raise SourceError(
            f"{name} does not take images of {shape.crop} pixels (--size): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise SourceError(f"{name} gives no logits (images, classes), but {getattr(logits, 'shape', type(logits))}.")
    return logits.shape[1]


def _input(
    options: argparse.Namespace, name: str, own: Input | None, default: Input | None
) -> tuple[Input, Normalisation]:
    shape = own or default
    if options.size is not None:
        shape = Input(*options.size) if shape is None else replace(shape, resize=options.size[0], crop=options.size[1])
    if shape is None:
        raise SourceError(f"{name} has no size of input of its own: --size gives that of its training.")
    normalisation = shape.normalisation or (default.normalisation if default else None)
    if options.mean is not None:
        normalisation = tuple(options.mean), tuple(options.std)
    if normalisation is None:
        raise SourceError(f"{name} has no normalisation of its own: --mean and --std give that of its training.")
    return shape, normalisation


def _seeded(architecture: Architecture, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and no GPU's
        return architecture.make(classes)


def checkpoint_beside(data_root: Path, data: str, name: str) -> str:
    """The checkpoint beside the data root whose name tells data and network."""
    folder = data_root.resolve().parent / "checkpoints"
    stem = f"{data}_{name.rpartition(':')[2]}"
    there = sorted(path.name for path in folder.glob(f"{data}_*") if path.suffix in SUFFIXES)
    for suffix in SUFFIXES:
        if f"{stem}{suffix}" in there:
            return str(folder / f"{stem}{suffix}")
    hint = f" There is {', '.join(there)}, for other networks." if there else ""
    raise SourceError(
        f"No weights for {name}: --checkpoint names a file of them; {folder / stem}{SUFFIXES[0]} would be found.{hint}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`load` reads."""
    add = parser.add_argument_group("data and network").add_argument
    data = "in-distribution (ID) data, and what goes with it; default: %(default)s, which is embedded"
    add("--data", choices=("digits", *BENCHMARKS, "folders"), default="digits", help=data)
    root = "OpenOOD's data folder, with benchmark_imglist and images_*; default: %(default)s"
    add("--data-root", type=Path, default=Path("data"), metavar="DIR", help=root)
    protocol = "whose OOD sets for cifar10, cifar100 and imagenet: OpenOOD's near and far, or the paper's; "
    add("--protocol", choices=tuple(PROTOCOLS), default="openood", help=protocol + "default: %(default)s")
    add("--id", type=Path, metavar="DIR", help="for --data folders: ID images, in a subfolder for each class")
    ood = "further OOD sets: all images below DIR, or OpenOOD's list test_NAME.txt; default: far"
    add("--ood", nargs="+", type=OodOption.parse, default=[], metavar="[near:|far:]NAME[=DIR]", help=ood)
    add("--train", type=Path, metavar="DIR", help="the same of images to fit on, which some methods need")
    add("--val", type=Path, metavar="DIR", help="the same of images to set thresholds by; no test image among them")
    shares = f"without --train: fit on these shares of the ID images of each class; alone: {SPLIT[0]} {SPLIT[1]}"
    share = number(float, 0.0)
    add("--split", nargs="*", type=share, metavar="SHARE", help=f"{shares}. TRAIN and VAL; the rest is the test set")
    bad = "damaged image files: stop the run, skip the image, or have what is missing grey; default: %(default)s, "
    add("--unreadable", choices=POLICIES, default=AS_OPENOOD.unreadable, help=bad + "which is OpenOOD's way")
    turned = "turn pictures as their EXIF tags say; default: as they are stored, which is OpenOOD's way"
    add("--exif", action="store_true", help=turned)
    names = ", ".join((*catalogue.ARCHITECTURES, *FORMS))
    add(
        "--network",
        metavar="NAME",
        help=f"one of {names}; default: OpenOOD's for the data. Of digits: {', '.join(RECIPES)}",
    )
    weights = f"weights (torch, safetensors or npz), in which {SEED} gives way to the seed; or {catalogue.DOWNLOAD}, "
    weights += f"torchvision's own, which are downloaded; or {RANDOM}; default: DATA_NETWORK.pt or the like in "
    add("--checkpoint", metavar="FILE", help=weights + "DATA_ROOT/../checkpoints")
    for option, what in (("--mean", "mean"), ("--std", "standard deviation")):
        pixels = f"{what} of pixels in 0..1 in the network's training; default: the network's, or the data's"
        add(option, nargs=3, type=float, metavar=("R", "G", "B"), help=pixels)
    size = "pixels of an image's shorter side, and of the square at its centre; default: the network's"
    add("--size", nargs=2, type=positive, metavar=("RESIZE", "CROP"), help=size)
    seeds = "a network for each; default: 0. Of digits they are trained, of other data read"
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help=seeds)
    add("--cache", type=Path, default=default_cache(), help="keeps trained networks; default: %(default)s")


def load(options: argparse.Namespace, seed: int | None = None) -> Suite:
    """What the options ask for, with the network of ``seed``; by default the first of ``options.seeds``.

    Raises SourceError where it cannot be had.
    """
    _check(options)
    seed = options.seeds[0] if seed is None else seed
    if options.data == "digits":
        return digits.load(seed, options.cache, _recipe(options.network))
    suite = _from_folders(options, seed) if options.data == "folders" else _from_lists(options, seed)
    known = suite.in_distribution.name
    if known in [images.name for images in suite.out_of_distribution]:
        raise SourceError(f"--ood {known} is called as the ID set is; it needs another name.")
    return suite


def _check(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""
    if options.data == "digits":
        for name in ("id", "train", "val", "split", "exif", "ood", "checkpoint", "size", "mean", "std"):
            if getattr(options, name) not in (None, [], False):
                raise SourceError(f"--{name} goes with other --data than digits, which brings its own.")
    elif options.data == "folders":
        if options.id is None or not options.ood:
            raise SourceError("--data folders needs --id DIR and --ood NAME=DIR ...")
        for option in options.ood:
            if option.folder is None:
                raise SourceError(f"--ood {option.name}: --data folders needs NAME=DIR.")
        if options.split is not None and (options.train or options.val):
            raise SourceError("--split takes images to fit on from --id; it does not go with --train or --val.")
    else:
        for name in ("id", "train", "val", "split"):
            if getattr(options, name) is not None:
                raise SourceError(f"--{name} goes with --data folders; --data {options.data} brings its ID sets.")
    names = [option.name for option in options.ood]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"--ood names {', '.join(twice)} more than once.")
    if (options.mean is None) != (options.std is None):
        raise SourceError("--mean and --std go together.")
    if len(options.seeds) > 1 and options.data != "digits" and options.checkpoint != RANDOM:
        if SEED not in (options.checkpoint or ""):
            raise SourceError(f"Several --seeds need a --checkpoint with {SEED} in it, which gives way to each.")


def _recipe(name: str | None) -> Recipe:
    """How a network for the digits is trained."""
    if name not in (None, *RECIPES):
        raise SourceError(f"--network {name}: --data digits trains its own, one of {', '.join(RECIPES)}.")
    return RECIPES[name or "smallresnet"]


def _from_lists(options: argparse.Namespace, seed: int) -> Suite:
    benchmark = BENCHMARKS[options.data]
    name = options.network or benchmark.network
    checkpoint = options.checkpoint
    if checkpoint is None and not catalogue.architecture(name).ready:
        checkpoint = checkpoint_beside(options.data_root, options.data, name)
    network, shape = trained_network(options, name, checkpoint, seed, benchmark.classes, benchmark.input)
    if network["classes"] != benchmark.classes:
        found = f"The network has {network['classes']} classes and the ID data {benchmark.classes}"
        raise SourceError(f"{found}: {network['network_description']}.")
    lists = ImageLists(options.data, options.data_root, shape, network["normalisation"], _reading(options))
    try:
        known = lists.in_distribution()
    except SourceError as error:
        raise SourceError(f"--data {options.data} needs its test images in --data-root: {error}.") from error
    unknown, missing = lists.out_of_distribution(options.protocol, options.ood)
    for what, read in (("training", lists.training), ("validation", lists.validation)):
        try:
            network[what] = read()
        except SourceError as error:
            missing += (f"{what} images: {error}",)
    told = {"protocol": PROTOCOLS[options.protocol], "missing": missing, **network}
    return Suite(options.data, in_distribution=known, out_of_distribution=unknown, **told)


def _from_folders(options: argparse.Namespace, seed: int) -> Suite:
    if options.network is None:
        raise SourceError("--data folders needs --network NAME.")
    if options.checkpoint is None and not catalogue.architecture(options.network).ready:
        raise SourceError(f"--data folders needs --checkpoint FILE for --network {options.network}.")
    names = folders.classes_of(*((options.train, "--train") if options.train else (options.id, "--id")))
    numbers = folders.indices(names)
    count = max(numbers.values()) + 1 if numbers else len(names)
    network, shape = trained_network(options, options.network, options.checkpoint, seed, count, None)
    classes, note = folders.numbered(names, network["classes"])
    pixels = shape, network["normalisation"], _reading(options)
    unknown = [folders.folder_set(one.name, one.group or "far", one.folder, *pixels) for one in options.ood]
    read = {
        name: folders.class_set(f"--{name}", folder, classes, *pixels)
        for name in ("id", "train", "val")
        if (folder := getattr(options, name))
    }
    if options.split is not None:
        read["train"], read["val"], read["id"] = folders.split(read["id"], _shares(options.split))
    missing = {"train": "training images: --train DIR or --split", "val": "validation images: --val DIR or --split"}
    left_out = (f"{images.name}: {images.description}" for images in (*read.values(), *unknown))
    return Suite(
        "folders",
        in_distribution=read["id"],
        out_of_distribution=tuple(unknown),
        training=read.get("train"),
        validation=(read["val"],) if "val" in read else None,
        protocol="folders of images",
        missing=tuple(sentence for name, sentence in missing.items() if name not in read),
        notes=(note, *(sentence for sentence in left_out if "left out" in sentence)),
        **network,
    )


def _shares(given: list[float]) -> tuple[float, float]:
    """Of ``--split``: for training and for validation."""
    if len(given) > 2 or sum(given) >= 1:
        raise SourceError(f"--split {' '.join(map(str, given))}: expected up to two shares of less than 1 in all.")
    train, val = (*given, *SPLIT[len(given) :])
    return train, val


def _reading(options: argparse.Namespace) -> Reading:
    return Reading(options.unreadable, options.exif)
