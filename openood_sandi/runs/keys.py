"""Digests of what decides a score: the network, the images and the code, for the keys of the score cache.

Each is a SHA-256 in hexadecimal. A digest may change without need (a comment in a source file), but never stay while
scores change: what cannot be described for certain has none, and then nothing is cached. It does not depend on the
process: on what was imported first, the seed of Python's hashes, the folder that code or images are in, or whether a
class was typed in a notebook or in a script.

Beyond it are names that code makes up when it runs (``getattr(module, text)``), what a module that a function imports
when it is first called has been given since, the order of a plain dict, and random numbers: for these there is the
canary.

Images in files are told here by name, label and preprocessing. What is in the files is looked at while they are
decoded, and the cache keeps it with the scores: :mod:`openood_sandi.runs.contents`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Subset, TensorDataset

from openood_sandi.runs import replaced, settings
from openood_sandi.runs import sources as modules
from openood_sandi.runs.contents import files_of, remembered
from openood_sandi.runs.described import Indescribable, digest

__all__ = ["Indescribable", "arithmetic", "code", "contents", "images", "network", "score_key", "sources", "state"]

arithmetic = settings.arithmetic
#: Attributes of an ``ImglistDataset`` that say where the images are, or what people call them.
_PLACES = ("data_dir", "name")


def score_key(
    method: str, options: Mapping[str, object], net: nn.Module, dataset: Any, **others: object
) -> dict[str, object]:
    """What decides a method's scores of a data set, for :func:`openood_sandi.score_dataset`, which adds this package's
    code, the order of the images, the loader's ``collate_fn``, device and arithmetic.

    Args:
        method: its name.
        options: its options.
        net: the classifier.
        dataset: the images, as :func:`images` takes them.
        others: whatever else decides, such as JSON takes: what the method was fitted to, other people's versions.

    Raises:
        Indescribable: the network or the images cannot be told from others.
    """
    shown = {name: _shown(value) for name, value in sorted(options.items())}
    return {"method": method, "options": shown, "network": network(net), "images": images(dataset), **others}


def network(net: nn.Module) -> str:
    """Digest of a network: parameters and buffers by name, shape, dtype and bytes; every module's class with its code
    and all that this needs, other attributes, and hooks of every kind, those of all networks too.

    Raises:
        Indescribable: an attribute or a hook is of an unknown kind.
    """
    return digest(net, settings.global_hooks(), replaced.functions())


def images(dataset: Any) -> str:
    """Digest of the images of a map-style data set, in order, with labels and preprocessing, without reading files.

    - A data set with a string ``fingerprint`` is taken at its word.
    - One whose items are files, as :func:`openood_sandi.runs.contents.files_of` knows them (OpenOOD's
      ``ImglistDataset``, torchvision's ``ImageFolder``, any with ``files``): all attributes, with names below the
      folder that the files are in: the same files elsewhere are the same images.
    - ``TensorDataset``: the tensors. ``Subset``: indices and data set.

    Raises:
        Indescribable: it is of another kind, or its preprocessing is.
    """
    return digest(_dataset(dataset), replaced.functions())


def contents(dataset: Any, folder: str | os.PathLike[str], *others: object) -> str:
    """Digest of ``others`` and of what is in the files that the items of a data set are, all of which are read.

    Of a file that cannot be read it tells just that: it is another digest once the file can be.

    Args:
        dataset: without files only ``others`` tell.
        folder: where it is remembered what is in them, so that the next time costs one look at each.
    """
    found = remembered(files_of(dataset) or [], Path(folder))
    return digest(*others, found["low"], found["high"])


def sources(*names: str) -> str:
    """Digest of the source files of modules and of all that they import, libraries by version."""
    return digest(modules.closure(names))


def state(values: Mapping[str, object]) -> str:
    """Digest of named values: numbers, strings, tensors, functions, classes, networks, containers and objects of them.

    Raises:
        Indescribable: one is of another kind.
    """
    return digest(dict(values))


def code() -> str:
    """Digest of this package's source files and of the versions of Python, torch and what reads images."""
    return digest(sys.version, [(name, modules.version(name)) for name in modules.ALWAYS], modules.package_files())


def _shown(value: object) -> str:
    """In words what is plain, else its digest: the ``repr`` of an object may be its address."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    several = isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value)
    return repr(value) if plain or several else digest(value)


def _dataset(dataset: Any) -> object:
    if isinstance(getattr(dataset, "fingerprint", None), str):
        return dataset.fingerprint
    if isinstance(dataset, Subset):
        return "subset", type(dataset), [int(index) for index in dataset.indices], _dataset(dataset.dataset)
    if type(dataset) is TensorDataset:
        return "tensors", list(dataset.tensors)
    files = files_of(dataset)
    if files is None:
        raise Indescribable(
            f"the images of a {type(dataset).__qualname__} cannot be told from others without reading them; give it "
            "`files`, the path of every item in order, or `fingerprint`, a string that stands for the images"
        )
    folder = _folder(dataset, files)
    own = {name: value for name, value in vars(dataset).items() if name not in _PLACES}
    below = {place: _below(value, folder) for place, value in {id(value): value for value in own.values()}.items()}
    own = {name: below[id(value)] for name, value in own.items()}  # torchvision has one list of images by two names
    return "files", type(dataset), _below(files, folder), own


def _folder(dataset: Any, files: list[str]) -> str:
    """The folder that the data set was given, or else the one that all files are in; with a separator at its end."""
    given = getattr(dataset, "data_dir", None) or getattr(dataset, "root", None)
    folder = os.fspath(given) if given else os.path.commonpath({os.path.dirname(file) for file in files} or {""})
    return os.path.join(folder, "")


def _below(value: Any, folder: str) -> Any:
    """``value`` with names of files as they are below ``folder``; rows, as (file, class), column by column."""
    if type(value) in (list, tuple):
        kinds = {*map(type, value)}
        if kinds == {int}:
            return value
        if kinds == {tuple} and {*map(len, value)} == {2}:  # of 100,000 images, three times as quick as row by row
            return "pairs", [_below([*column], folder) for column in zip(*value, strict=True)]
        return type(value)([_below(item, folder) for item in value])
    if not isinstance(value, (str, os.PathLike)):
        return value
    text = os.fspath(value)
    if not text.startswith(folder):
        return "<folder>" if text == folder[:-1] else value
    return "<folder>" + text[len(folder) :]  # what is in it is kept with its scores, and is not to be looked at here
