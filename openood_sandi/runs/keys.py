"""Digests of what decides a score: the network, the images and the code, for the keys of the score cache.

Each is a SHA-256 in hexadecimal. A digest may change without need (a comment in a source file), but never stay while
scores change: what cannot be described for certain has none, and then nothing is cached.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
import os
import sys
from collections.abc import Mapping, Set
from importlib import metadata
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

__all__ = ["Indescribable", "arithmetic", "code", "images", "network", "score_key", "state"]

#: Packages that :func:`code` tells by their versions, and the names that these are installed under.
_VERSIONED = {"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow"}
#: What every module has beside weights, submodules and hooks.
_BOOKKEEPING = {*vars(nn.Module())} - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Indescribable(ValueError):
    """Something that may decide scores cannot be described; the message names it."""


def score_key(
    method: str, options: Mapping[str, object], net: nn.Module, dataset: Any, **others: object
) -> dict[str, object]:
    """What decides a method's scores of a data set, for :func:`openood_sandi.score_dataset`, which adds this package's
    code, the order of the images, device and arithmetic.

    Args:
        method: its name.
        options: its options.
        net: the classifier.
        dataset: the images, as :func:`images` takes them.
        others: whatever else decides, such as JSON takes: what the method was fitted to, other people's versions.

    Raises:
        Indescribable: the network or the images cannot be told from others.
    """
    shown = {name: repr(value) for name, value in sorted(options.items())}
    return {"method": method, "options": shown, "network": network(net), "images": images(dataset), **others}


def network(net: nn.Module) -> str:
    """Digest of a network: parameters and buffers by name, shape, dtype and bytes; every module's class, source file,
    other attributes and hooks.

    Raises:
        Indescribable: an attribute or a hook is of an unknown kind.
    """
    digest = hashlib.sha256()
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    for name, module in net.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING}
        hooks = [list(getattr(module, kind).values()) for kind in _HOOKS]
        digest.update(repr((name, _class(type(module)), _described(own), _described(hooks))).encode())
    return digest.hexdigest()


def images(dataset: Any) -> str:
    """Digest of the images of a map-style data set, in order, with labels and preprocessing, without reading them.

    - A data set with a string ``fingerprint`` is taken at its word.
    - OpenOOD's ``ImglistDataset``: its list's lines; size and time of change of every file; all of its attributes, the
      preprocessor among them, except names of folders: the same files elsewhere are the same images.
    - ``TensorDataset``: the tensors. ``Subset``: indices and data set.

    Raises:
        Indescribable: it is of another kind, or its preprocessor is.
    """
    return hashlib.sha256(repr(_dataset(dataset)).encode()).hexdigest()


def state(values: Mapping[str, object]) -> str:
    """Digest of named values: numbers, strings, tensors, containers and objects of them.

    Raises:
        Indescribable: one is of another kind.
    """
    return hashlib.sha256(repr(_described(values)).encode()).hexdigest()


@functools.cache
def code() -> str:
    """Digest of this package's source files and of the versions of Python, torch and what reads images."""
    digest = hashlib.sha256(sys.version.encode())
    for name in _VERSIONED.values():
        digest.update(f"{name} {_version(name)}\n".encode())
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(
            f"{file.relative_to(package).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def arithmetic(device: torch.device) -> list[object]:
    """Switches of torch's that change the bits of results on ``device``."""
    try:
        autocast = torch.is_autocast_enabled(device.type)
    except TypeError:  # before torch 2.4
        autocast = torch.is_autocast_enabled() if device.type == "cuda" else torch.is_autocast_cpu_enabled()
    tf32 = torch.backends.cudnn.allow_tf32
    return [autocast, tf32, torch.get_float32_matmul_precision(), str(torch.get_default_dtype())]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _dataset(dataset: Any) -> object:
    if isinstance(getattr(dataset, "fingerprint", None), str):
        return dataset.fingerprint
    if isinstance(dataset, Subset):
        return "subset", [int(index) for index in dataset.indices], _dataset(dataset.dataset)
    if type(dataset) is TensorDataset:
        return "tensors", [_described(tensor) for tensor in dataset.tensors]
    if type(dataset).__name__ == "ImglistDataset":
        own = {name: value for name, value in vars(dataset).items() if name not in ("imglist", "data_dir", "name")}
        files = [_file(dataset.data_dir, line) for line in dataset.imglist]
        return "list", _class(type(dataset)), dataset.imglist, files, _described(own)
    raise Indescribable(f"the images of a {type(dataset).__qualname__} cannot be told from others without reading them")


def _file(folder: str, line: str) -> tuple[int, int] | None:
    try:
        found = os.stat(os.path.join(folder, line.strip("\n").split(" ", 1)[0]))
    except (OSError, ValueError):  # it cannot be read now; if it can later, that is a change
        return None
    return found.st_size, found.st_mtime_ns


def _described(value: Any, inside: tuple[int, ...] = ()) -> object:
    """``value`` in plain terms, whose ``repr`` is the same in another process if and only if the value is."""
    if isinstance(value, enum.Enum):
        return _class(type(value)), value.name
    if value is None or isinstance(value, (bool, int, str, bytes, PurePath, torch.dtype, torch.device)):
        return value
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value
    if id(value) in inside:
        raise Indescribable(f"a {type(value).__qualname__} contains itself")
    inside = (*inside, id(value))

    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_described(item, inside) for item in value]
    if isinstance(value, Set):
        return type(value).__name__, sorted((_described(item, inside) for item in value), key=repr)
    if isinstance(value, Mapping):
        items = [(_described(name, inside), _described(item, inside)) for name, item in value.items()]
        return _class(type(value)), sorted(items, key=repr)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        tensor = torch.as_tensor(value)
        return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest()
    if isinstance(value, type):
        return _class(value)
    if isinstance(value, functools.partial):
        return "partial", _described([value.func, value.args, value.keywords], inside)
    if isinstance(value, MethodType):
        return "method", value.__func__.__qualname__, _described(value.__self__, inside)
    if isinstance(value, BuiltinFunctionType):
        return value.__module__, value.__qualname__
    if isinstance(value, FunctionType):
        enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
        bound = _described([enclosed, value.__defaults__, value.__kwdefaults__], inside)
        return value.__module__, value.__qualname__, _source(value.__module__), bound
    if hasattr(value, "__dict__"):
        return _class(type(value)), _described(vars(value), inside)
    raise Indescribable(f"a {type(value).__qualname__} cannot be told from others of its kind")


def _class(kind: type) -> object:
    return kind.__module__, kind.__qualname__, [_source(base.__module__) for base in kind.__mro__]


@functools.cache
def _source(module: str) -> str:
    """Digest of a module's file, unless :func:`code` tells it by its version."""
    if module.partition(".")[0] in (*_VERSIONED, *sys.stdlib_module_names):
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not os.path.isfile(file):
        raise Indescribable(f"{module} has no source file")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
