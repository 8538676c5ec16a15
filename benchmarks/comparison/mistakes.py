"""The images that a method gets most wrong, as pictures to embed in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import matplotlib
import numpy as np
import torch
from PIL import Image

from .attribution import Floats, attribution_maps, over_all_splits, pixels
from .evaluation import Outcome
from .suite import Suite

PALETTE = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
SMALL, LARGEST, MAP_SIDE = 64, 224, 56
"""Pixels: up to which side a picture is lossless, at most its side, and at most a map's."""
BATCH = 16


@dataclass(frozen=True)
class Mistake:
    """An image with what a method says of it: its place in a test set, its class, the predicted one, the score."""

    images: str
    at: int
    label: int
    """-1 if OOD."""
    pred: int
    score: float

    @property
    def place(self) -> tuple[str, int]:
        """The set's name, and where in the set the image is."""
        return self.images, self.at


@dataclass(frozen=True)
class Picture:
    """An image and its attribution map as addresses that hold the data; ``most`` is the map's largest value."""

    image: str
    map: str | None
    most: float | None


def worst(outcome: Outcome, suite: Suite, count: int) -> tuple[list[Mistake], list[Mistake]]:
    """``count`` ID images of the largest scores, and OOD images of the smallest ones of any set; the worst first."""
    known = _of_set(outcome, suite.in_distribution.name, count, largest=True)
    unknown = [one for s in suite.out_of_distribution for one in _of_set(outcome, s.name, count, largest=False)]
    return known, sorted(unknown, key=lambda mistake: mistake.score)[:count]


def _of_set(outcome: Outcome, name: str, count: int, largest: bool) -> list[Mistake]:
    scored = outcome.scored[name]
    order = np.argsort(-scored.scores if largest else scored.scores, kind="stable")[:count]
    return [
        Mistake(name, int(at), int(scored.labels[at]), int(scored.pred[at]), float(scored.scores[at])) for at in order
    ]


def class_names(outcome: Outcome, suite: Suite) -> dict[int, str]:
    """What classes are called: the folders of their ID images' files, where each class has one folder to itself."""
    images = suite.in_distribution
    pairs = zip(outcome.scored[images.name].labels.tolist(), images.names, strict=bool(images.names))
    folders = {(label, PurePath(name).parent.name) for label, name in pairs}
    names = dict(folders)
    alone = len(names) == len(folders) == len({*names.values()})
    return names if alone and all(names.values()) else {}


def pictures(
    places: Sequence[tuple[str, int]], suite: Suite, device: torch.device
) -> tuple[dict[tuple[str, int], Picture], str]:
    """The pictures of images by their places, and why they have no maps, empty if they have."""
    found: dict[tuple[str, int], Picture] = {}
    sets = {images.name: images.dataset for images in suite.test_sets}
    reason = ""
    for start in range(0, len(places), BATCH):
        some = places[start : start + BATCH]
        images = torch.stack([sets[name][at][0] for name, at in some])
        maps: Floats | list[None] = [None] * len(some)
        if not reason:
            try:
                maps = over_all_splits(attribution_maps(suite, images, device))
            except Exception as error:  # whatever the network is, the report has its pictures
                reason = f"{type(error).__name__}: {error}"
        drawn = zip(some, pixels(suite, images), maps, strict=True)
        found |= {place: _picture(image, attribution) for place, image, attribution in drawn}
    return found, reason


def _picture(image: Floats, attribution: Floats | None) -> Picture:
    shown = Image.fromarray((image * 255).round().astype(np.uint8))
    if max(shown.size) > SMALL:
        shown.thumbnail((LARGEST, LARGEST))
        address = _address(shown, "jpeg", quality=80)
    else:
        address = _address(shown, "png")
    if attribution is None:
        return Picture(address, None, None)
    most = max(float(attribution.max()), 1e-12)
    coloured = Image.fromarray((attribution / most * 255).round().clip(0, 255).astype(np.uint8))
    coloured.thumbnail((MAP_SIDE, MAP_SIDE))
    coloured = coloured.convert("P")
    coloured.putpalette(PALETTE.tobytes())
    return Picture(address, _address(coloured, "png"), most)


def _address(image: Image.Image, form: str, **options: int) -> str:
    """A data: URL."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
