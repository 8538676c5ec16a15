"""Networks from elsewhere: timm's by name, a folder that transformers has saved, a factory in the user's own file."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import SourceError
from .architecture import Architecture, Input
from .libraries import imported

RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which transformers writes."""


def timm_network(name: str) -> Architecture:
    """timm's ``name``, with or without a tag of weights, and the input that these were trained on."""
    timm = imported("timm")
    _require_known(timm, name)
    settings = timm.get_pretrained_cfg(name)
    crop = settings.input_size[1]
    resize = crop if settings.crop_mode == "squash" else int(crop / settings.crop_pct)
    way = settings.interpolation if settings.interpolation in RESAMPLING.values() else "bilinear"
    squeezed = (resize, resize) if settings.crop_mode == "squash" else resize
    shape = Input(squeezed, crop, (tuple(settings.mean), tuple(settings.std)), way)
    return Architecture(f"timm's {name}", lambda classes: _made(timm.create_model, name, num_classes=classes), shape)


def timm_trained(name: str) -> nn.Module:
    """timm's ``name`` with its weights, which are downloaded if need be."""
    timm = imported("timm")
    _require_known(timm, name)
    return _made(timm.create_model, name, pretrained=True)


def _require_known(timm: Any, name: str) -> None:
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SourceError(f"timm has no network {name!r}.{hint} Its list_models() names them.")


class Logits(nn.Module):
    """A network of transformers' that returns its logits (B, classes) and nothing around them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def hugging_face_network(folder: str) -> Architecture:
    """The image classifier that transformers' ``save_pretrained`` wrote to ``folder``; nothing is downloaded."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise SourceError(f"hf:{folder} has no config.json; expected a folder that save_pretrained has written.")
    load = imported("transformers").AutoModelForImageClassification.from_pretrained
    make = functools.partial(_made, load, folder, local_files_only=True)
    title = f"{path.resolve().name}, by transformers"
    return Architecture(title, lambda _: Logits(make()), _processed(path), ready=True)


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
    return Input(resize, crop, pixels, RESAMPLING.get(told.get("resample", 2), "bilinear"))


def own_network(file: str, factory: str) -> Architecture:
    """What ``factory`` in the Python file gives, called with the number of classes if it takes one."""
    make = getattr(_module(Path(file).resolve()), factory, None)
    if not callable(make):
        raise SourceError(f"{file} has no function {factory!r}, which --network {file}:{factory} asks for.")

    def network(classes: int) -> nn.Module:
        return _made(make, *([classes] if _takes_one(make) else []))

    return Architecture(f"{factory} of {Path(file).name}", network, None, ready=True)


def _takes_one(make: Any) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty for p in inspect.signature(make).parameters.values())


@functools.cache
def _module(path: Path) -> Any:
    """The file as a module, beside which it may import others."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SourceError(f"{path} does not exist; --network FILE.py:FACTORY names a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may fail in any way
        raise SourceError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    return module


def _made(make: Any, *arguments: Any, **named: Any) -> nn.Module:
    try:
        net = make(*arguments, **named)
    except Exception as error:  # what a library or the user's code raises
        raise SourceError(f"The network cannot be made: {type(error).__name__}: {error}.") from error
    if not isinstance(net, nn.Module):
        raise SourceError(f"The network's factory gives a {type(net).__name__}; expected a torch.nn.Module.")
    return net
