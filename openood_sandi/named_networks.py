"""A network from a name on a command line, its weights from a file, and how its images are transformed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openood_sandi import weights
from openood_sandi.weights import SourceError

__all__ = ["FORMS", "Transform", "named"]

FORMS = "torchvision:NAME, timm:NAME, openood:NAME or FILE.py:FACTORY"

Make = Callable[[int], nn.Module]
"""A number of classes to a network."""


@dataclass(frozen=True)
class Transform:
    """An image of Pillow's in RGB to a tensor (3, crop, crop): resized, cropped at its centre, normalised."""

    resize: int
    """Pixels of the shorter side."""
    crop: int
    """Pixels of either side."""
    mean: tuple[float, ...]
    """Of pixels in 0..1, by channel."""
    std: tuple[float, ...]
    """Likewise."""

    def __call__(self, image: Any) -> Tensor:
        from PIL import Image

        shorter = min(image.size)
        size = tuple(self.resize * side // shorter for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - self.crop) / 2) for side in size)  # as torchvision rounds
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)), dtype=np.float32) / 255
        normalised = (torch.from_numpy(pixels) - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normalised.permute(2, 0, 1).contiguous()


def named(name: str, checkpoint: Path | None) -> tuple[nn.Module, Transform | None]:
    """The network in eval mode with the weights of ``checkpoint``, and its usual transform if it is known.

    Raises:
        SourceError: there is no such network, or the weights cannot be read or do not fit.
    """
    family, _, rest = name.rpartition(":")
    if family.endswith(".py"):
        net, transform = _of_file(Path(family), rest), None
        if checkpoint is not None:
            weights.load(net, weights.read(checkpoint), checkpoint)
        return net.eval(), transform
    if family not in _FAMILIES or not rest:
        raise SourceError(f"--network {name}: expected {FORMS}")
    if checkpoint is None:
        raise SourceError(
            f"--network {name} needs --checkpoint FILE, its weights: torch's (weights only) or safetensors"
        )
    make, transform = _FAMILIES[family](rest)
    state = weights.read(checkpoint)
    net = make(1000)
    classes = weights.classes(net, state)
    if classes not in (None, 1000):
        net = make(classes)
    weights.load(net, state, checkpoint)
    return net.eval(), transform


def _of_file(file: Path, factory: str) -> nn.Module:
    if not file.is_file():
        raise SourceError(f"--network {file}:{factory}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    spec.loader.exec_module(module)
    if not callable(getattr(module, factory, None)):
        raise SourceError(f"--network {file}:{factory}: {file} has no function {factory!r} that returns a network")
    net = getattr(module, factory)()
    if not isinstance(net, nn.Module):
        raise SourceError(f"--network {file}:{factory}: it returns {type(net).__name__}, expected a torch.nn.Module")
    return net


def _torchvision(name: str) -> tuple[Make, Transform | None]:
    models = _imported("torchvision.models", "torchvision")
    if name not in models.list_models(models):
        raise SourceError(f"torchvision has no classifier {name!r}; torchvision.models.list_models() names them")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    transform = Transform(resize, crop, tuple(preset.mean), tuple(preset.std))
    return lambda classes: models.get_model(name, num_classes=classes), transform


def _timm(name: str) -> tuple[Make, Transform | None]:
    timm = _imported("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise SourceError(f"timm has no model {name!r}; timm.list_models() names them")
    of_timm = timm.create_model(name, pretrained=False).pretrained_cfg
    crop = of_timm["input_size"][-1]
    transform = Transform(round(crop / of_timm["crop_pct"]), crop, tuple(of_timm["mean"]), tuple(of_timm["std"]))
    return lambda classes: timm.create_model(name, pretrained=False, num_classes=classes), transform


def _openood(name: str) -> tuple[Make, Transform | None]:
    from openood_sandi import register

    register()
    home = os.environ.get("OPENOOD_HOME")
    if home and home not in sys.path:
        sys.path.append(home)  # last: a checkout has a package "tests" of its own
    get_network = _imported("openood.networks.utils", "openood").get_network

    def make(classes: int) -> nn.Module:
        config = SimpleNamespace(name=name, num_classes=classes, pretrained=False, num_gpus=0)
        try:
            net: nn.Module = get_network(config)
        except Exception as error:
            raise SourceError(f"OpenOOD makes no network {name!r}: {type(error).__name__}: {error}") from error
        return net

    size = re.search(r"_(\d+)x\1$", name)
    return make, None if size is None else Transform(int(size[1]), int(size[1]), (), ())


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        more = "let OPENOOD_HOME name a checkout, or " if package == "openood" else ""
        raise SourceError(f"{package} cannot be imported ({error}): {more}pip install it") from error


_FAMILIES: dict[str, Callable[[str], tuple[Make, Transform | None]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "openood": _openood,
}
