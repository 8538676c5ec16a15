"""The network that the command line asks for, with its weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from networks import SourceError, catalogue, checkpoints
from networks.catalogue import Architecture, Input, Normalisation
from torch import nn

RANDOM = "random"
"""Stands for weights that nobody trained."""
SEED = "{seed}"
"""In a checkpoint's path, gives way to the seed."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".npz")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in eval mode, and what it takes."""

    name: str
    network: nn.Module
    architecture: Architecture
    origin: str
    """Of its weights, in words."""
    classes: int
    shape: Input
    normalisation: Normalisation


def trained_network(
    options: argparse.Namespace,
    name: str,
    checkpoint: str,
    seed: int,
    classes: int,
    default: Input | None,
    or_more: bool = False,
) -> TrainedNetwork:
    """The network ``name`` for ``classes``, or more, ``or_more``, if its weights have more.

    ``checkpoint`` is a file, or ``RANDOM``, or ``catalogue.DOWNLOAD``. What of the input neither the user's options nor
    the network tell is that of ``default``, the data set's.
    """
    found = classes
    if checkpoint == catalogue.DOWNLOAD:
        net, preset = catalogue.downloaded(name)
        found = checkpoints.classes(net, net.state_dict()) or classes
        origin = f"weights {catalogue.default_weights(name)}"
    else:
        preset = catalogue.architecture(name)
        net = _seeded(preset, classes, seed)
        origin = f"random weights of seed {seed}"
        if checkpoint != RANDOM:
            path = Path(checkpoint.replace(SEED, str(seed)))
            state = checkpoints.read(path)
            found = checkpoints.classes(net, state) or classes
            net = net if found == classes else _seeded(preset, found, seed)
            checkpoints.load(net, state, path, lambda: catalogue.on_meta(found))
            origin = f"weights of {path.name}"
    if found < classes or (found > classes and not or_more):
        raise SourceError(f"The network has {found} classes and the ID data {classes}: {name}, {origin}.")
    return TrainedNetwork(name, net.eval(), preset, origin, found, *_input(options, name, preset.input, default))


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
