"""From the command line to a :class:`Suite`: ``--data`` and all that goes with it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from networks import SourceError, catalogue

from . import digits, image_files
from .console import positive
from .image_files import OodOption
from .image_lists import ImageLists
from .protocols import BENCHMARKS, PROTOCOLS
from .suite import ImageSet, Suite, state_digest
from .trained_network import RANDOM, SEED, TrainedNetwork, checkpoint_beside, trained_network
from .training import default_cache


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
    names = ", ".join((*catalogue.ARCHITECTURES, *catalogue.PREFIXES))
    add("--network", metavar="NAME", help=f"one of {names}; default: OpenOOD's for the data")
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
        return digits.load(seed, options.cache)
    if options.data == "folders":
        return _from_folders(options, seed)
    return _from_lists(options, seed)


def _check(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""
    if options.data == "digits":
        for name in ("id", "ood", "network", "checkpoint", "size", "mean", "std"):
            if getattr(options, name):
                raise SourceError(f"--{name} goes with other --data than digits, which brings its own.")
    elif options.data == "folders":
        if options.id is None or not options.ood:
            raise SourceError("--data folders needs --id DIR and --ood NAME=DIR ...")
        for option in options.ood:
            if option.folder is None:
                raise SourceError(f"--ood {option.name}: --data folders needs NAME=DIR.")
    elif options.id is not None:
        raise SourceError(f"--id goes with --data folders; --data {options.data} brings its ID set.")
    names = [option.name for option in options.ood]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"--ood names {', '.join(twice)} more than once.")
    if (options.mean is None) != (options.std is None):
        raise SourceError("--mean and --std go together.")
    if len(options.seeds) > 1 and options.data != "digits" and options.checkpoint != RANDOM:
        if SEED not in (options.checkpoint or ""):
            raise SourceError(f"Several --seeds need a --checkpoint with {SEED} in it, which gives way to each.")


def _from_lists(options: argparse.Namespace, seed: int) -> Suite:
    benchmark = BENCHMARKS[options.data]
    name = options.network or benchmark.network
    checkpoint = options.checkpoint or checkpoint_beside(options.data_root, options.data, name)
    net = trained_network(options, name, checkpoint, seed, benchmark.classes, benchmark.input)
    lists = ImageLists(options.data, options.data_root, net.shape, net.normalisation)
    try:
        known = lists.in_distribution()
    except SourceError as error:
        raise SourceError(f"--data {options.data} needs its test images in --data-root: {error}.") from error
    unknown, missing = lists.out_of_distribution(options.protocol, options.ood)
    suite = _suite(options.data, net, PROTOCOLS[options.protocol], known, unknown)
    parts: dict[str, Any] = {}
    for what, read in (("training", lists.training), ("validation", lists.validation)):
        try:
            parts[what] = read()
        except SourceError as error:
            missing += (f"{what} images: {error}",)
    return replace(suite, **parts, missing=missing)


def _from_folders(options: argparse.Namespace, seed: int) -> Suite:
    if options.network is None or options.checkpoint is None:
        raise SourceError("--data folders needs --network NAME and --checkpoint FILE.")
    labels = image_files.classes_of(options.id)
    numbered = all(name.isdecimal() for name in labels)
    count = max(labels.values()) + 1
    # Numbered folders may be some of the network's classes; others have to be all of them, in order.
    net = trained_network(options, options.network, options.checkpoint, seed, count, None, or_more=numbered)
    known = image_files.id_set(options.id, labels, net.shape, net.normalisation)
    unknown = tuple(
        image_files.folder_set(option.name, option.group or "far", option.folder, net.shape, net.normalisation)
        for option in options.ood
    )
    missing = tuple(f"{what} images: --data folders has none" for what in ("training", "validation"))
    return replace(_suite("folders", net, "folders of images", known, unknown), missing=missing)


def _suite(data: str, net: TrainedNetwork, protocol: str, known: ImageSet, unknown: tuple[ImageSet, ...]) -> Suite:
    names = [images.name for images in (known, *unknown)]
    if len(set(names)) < len(names):
        raise SourceError(f"--ood {known.name} is called as the ID set is; it needs another name.")
    return Suite(
        name=data,
        network=net.network,
        network_name=net.name,
        network_description=f"{net.architecture.title}, {net.origin}",
        weights=state_digest(net.network),
        classes=net.classes,
        normalisation=net.normalisation,
        in_distribution=known,
        out_of_distribution=unknown,
        protocol=protocol,
        paper_splits=tuple(net.architecture.paper_splits(net.network)),
        paper_feature=net.architecture.paper_feature,
    )
