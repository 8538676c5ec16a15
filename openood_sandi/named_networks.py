"""A network from a name on a command line, its weights from a file, and what images it takes.

Names are those of libraries, of a folder that transformers has saved, or of a factory in the user's own file. Nothing
is downloaded.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from openood_sandi import weights
from openood_sandi.image_input import Input
from openood_sandi.weights import SourceError

__all__ = [
    "FORMS",
    "Architecture",
    "architecture",
    "imported",
    "input_of_torchvision",
    "made",
    "make_openood_importable",
    "named",
]

FORMS = ("torchvision:NAME", "timm:NAME", "openood:NAME", "hf:DIR", "FILE.py:FACTORY")

_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which transformers writes."""


@dataclass(frozen=True)
class Architecture:
    """What papers call a network, a function of the number of classes, and the input that it was trained on."""

    title: str
    make: Callable[[int], nn.Module]
    input: Input | None
    """None: it is not known, and that of the data set may do."""
    ready: bool = field(default=False, kw_only=True)
    """Whether ``make`` gives trained weights, if no checkpoint gives others."""


def named(name: str, checkpoint: Path | None) -> tuple[nn.Module, Input | None]:
    """The network in eval mode with the weights of ``checkpoint``, and its usual input if it is known.

    Raises:
        SourceError: there is no such network, or the weights cannot be read or do not fit.
    """
    found = architecture(name)
    if checkpoint is None:
        if not found.ready:
            raise SourceError(
                f"--network {name} needs --checkpoint FILE, its weights: torch's (weights only) or safetensors"
            )
        return found.make(1000).eval(), found.input
    state = weights.read(checkpoint)
    net = found.make(1000)
    classes = weights.classes(net, state)
    if classes not in (None, 1000):
        net = found.make(classes)
    weights.load(net, state, checkpoint)
    return net.eval(), found.input


def architecture(name: str) -> Architecture:
    """The network of a name in one of ``FORMS``.

    Raises:
        SourceError: there is none, or its library is not installed.
    """
    family, _, rest = name.partition(":")
    if rest and family in _FAMILIES:
        return _FAMILIES[family](rest)
    file, _, factory = name.rpartition(":")
    if not file.endswith(".py"):
        raise SourceError(f"--network {name}: expected {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    return _own(file, factory)


# ---------------------------------------------------------------------- libraries


def imported(module: str) -> Any:
    """A module of a library; of OpenOOD, from the checkout that ``$OPENOOD_HOME`` names, if any.

    Raises:
        SourceError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        if package == "openood":
            make_openood_importable()
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "let OPENOOD_HOME name a checkout, or " if package == "openood" else ""
        raise SourceError(f"{package} cannot be imported ({error}): {remedy}pip install it") from error


def make_openood_importable() -> None:
    """Let a checkout that ``$OPENOOD_HOME`` names be imported, without the packages that scoring needs none of."""
    from openood_sandi import register

    register()
    home = os.environ.get("OPENOOD_HOME")
    if home and home not in sys.path:
        sys.path.append(home)  # last: a checkout has a package "tests" of its own


def _torchvision(name: str) -> Architecture:
    models = imported("torchvision.models")
    if name not in models.list_models(models):  # the classifiers among them
        raise SourceError(f"torchvision has no classifier {name!r}; torchvision.models.list_models() names them")
    shape = input_of_torchvision(models.get_model_weights(name).DEFAULT)
    return Architecture(f"torchvision's {name}", lambda classes: models.get_model(name, num_classes=classes), shape)


def input_of_torchvision(weights: Any) -> Input:
    """The input of torchvision's ``weights`` of a classifier."""
    preset = weights.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    return Input(resize, crop, (tuple(preset.mean), tuple(preset.std)), preset.interpolation.value)


def _timm(name: str) -> Architecture:
    """With or without a tag of weights; the input is that of these."""
    timm = imported("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SourceError(f"timm has no network {name!r}.{hint} timm.list_models() names them")
    settings = timm.get_pretrained_cfg(name)
    crop = settings.input_size[1]
    resize = crop if settings.crop_mode == "squash" else int(crop / settings.crop_pct)
    way = settings.interpolation if settings.interpolation in _RESAMPLING.values() else "bilinear"
    squeezed = (resize, resize) if settings.crop_mode == "squash" else resize
    shape = Input(squeezed, crop, (tuple(settings.mean), tuple(settings.std)), way)
    return Architecture(f"timm's {name}", lambda classes: made(timm.create_model, name, num_classes=classes), shape)


def _openood(name: str) -> Architecture:
    """The network that ``--network.name`` of OpenOOD's main.py gives, whose name may tell the size of its input."""
    get_network = imported("openood.networks.utils").get_network

    def make(classes: int) -> nn.Module:
        # on the CPU: OpenOOD would put it on a GPU, which is the caller's business
        config = SimpleNamespace(name=name, num_classes=classes, pretrained=False, num_gpus=0)
        try:
            net: nn.Module = get_network(config)
        except Exception as error:
            raise SourceError(f"OpenOOD makes no network {name!r}: {type(error).__name__}: {error}") from error
        return net

    size = re.search(r"_(\d+)x\1$", name)
    crop = int(size[1]) if size else 0
    return Architecture(f"OpenOOD's {name}", make, Input(256 if crop == 224 else crop, crop) if size else None)


# ---------------------------------------------------------------------- transformers


class _Logits(nn.Module):
    """A network of transformers' that returns its logits (B, classes) and nothing around them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def _hugging_face(folder: str) -> Architecture:
    """The image classifier that transformers' ``save_pretrained`` wrote to ``folder``."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise SourceError(f"hf:{folder} has no config.json; expected a folder that save_pretrained has written")
    load = imported("transformers").AutoModelForImageClassification.from_pretrained
    make = functools.partial(made, load, folder, local_files_only=True)
    title = f"{path.resolve().name}, by transformers"
    return Architecture(title, lambda _: _Logits(make()), _processed(path), ready=True)


def _processed(folder: Path) -> Input | None:
    """The input that ``preprocessor_config.json`` tells of; None without it."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    told = json.loads(file.read_text(encoding="utf-8"))
    size, crop = told.get("size", 224), told.get("crop_size")
    side = crop if crop is not None and told.get("do_center_crop", True) else size
    crop = side if isinstance(side, int) else side.get("height", side.get("shortest_edge", 224))
    shorter = size if isinstance(size, int) else size.get("shortest_edge")
    if "crop_pct" in told and shorter is not None:
        shorter = int(shorter / told["crop_pct"])
    resize = (size["height"], size["width"]) if shorter is None else shorter
    pixels = tuple(told.get("image_mean", (0.5,) * 3)), tuple(told.get("image_std", (0.5,) * 3))
    return Input(resize, crop, pixels, _RESAMPLING.get(told.get("resample", 2), "bilinear"))


# ---------------------------------------------------------------------- the user's own


def _own(file: str, factory: str) -> Architecture:
    """What ``factory`` in the Python file gives, called with the number of classes if it takes one."""
    make = getattr(_module(Path(file).resolve()), factory, None)
    if not callable(make):
        raise SourceError(f"{file} has no function {factory!r}, which --network {file}:{factory} asks for")

    def network(classes: int) -> nn.Module:
        return made(make, *([classes] if _takes_one(make) else []))

    return Architecture(f"{factory} of {Path(file).name}", network, None, ready=True)


def _takes_one(make: Any) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty for p in inspect.signature(make).parameters.values())


@functools.cache
def _module(path: Path) -> Any:
    """The file as a module, beside which it may import others."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SourceError(f"there is no file {path}; --network FILE.py:FACTORY names a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may fail in any way
        raise SourceError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def made(make: Any, *arguments: Any, **named: Any) -> nn.Module:
    """The network that a library's or the user's ``make`` gives.

    Raises:
        SourceError: it fails, or gives something else.
    """
    try:
        net = make(*arguments, **named)
    except Exception as error:  # what a library or the user's code raises
        raise SourceError(f"the network cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise SourceError(f"the network's factory gives a {type(net).__name__}, expected a torch.nn.Module")
    return net


_FAMILIES: dict[str, Callable[[str], Architecture]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "openood": _openood,
    "hf": _hugging_face,
}
