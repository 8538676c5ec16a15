"""One image file to pixels in RGB, whatever its kind and state."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from networks import SourceError
from PIL import Image, ImageFile, ImageOps

from openood_sandi.runs import contents

Policy = Literal["stop", "skip", "grey"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
KINDS = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SUFFIXES = tuple(kind for kind in KINDS if kind in Image.registered_extensions())
"""What names of images end with: those of ``KINDS`` that this Pillow can read."""
GREY = (128, 128, 128)
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
FOR_NOW = (*MACHINE, errno.EIO, errno.EACCES, errno.ENOENT)
"""Trouble of the machine, and of one file on it, which another run may not have."""


@dataclass(frozen=True)
class Reading:
    """How files become pixels.

    Attributes:
        unreadable: what becomes of a damaged file. "stop" ends the run; "skip" leaves the image out; "grey" fills what
            it lacks, as OpenOOD has Pillow do, or all of it.
        exif: whether a picture is turned as its EXIF tag says; OpenOOD and torchvision take it as it is stored.
    """

    unreadable: Policy = "grey"
    exif: bool = False

    def read(self, path: Path) -> tuple[Image.Image, str | None]:
        """The image in RGB, and what is wrong with its file, None if nothing is.

        With "skip", a file that its disk does not give is as a damaged one, this time: the key of scores
        tells that nothing is known of its bytes, and the next run reads it again.

        Raises:
            SourceError: the file is damaged, and the policy is to stop.
            OSError: it cannot be read for a reason that may pass, and the policy is not to skip; or its bytes can be
                read all the same, so that the key would take them for scored.
        """
        try:
            return self._pixels(path, truncated=False), None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
            if isinstance(error, OSError) and error.errno in FOR_NOW:
                if error.errno in MACHINE or self.unreadable != "skip" or _gives_bytes(path):
                    raise
            damage = str(error) or type(error).__name__
        if self.unreadable == "stop":
            raise SourceError(
                f"{path} cannot be read as an image: {damage}. Replace it, or give --unreadable skip or grey."
            )
        try:
            return self._pixels(path, truncated=True), damage
        except Exception:  # nothing of it can be had, for whatever reason
            return Image.new("RGB", (1, 1), GREY), damage

    def _pixels(self, path: Path, truncated: bool) -> Image.Image:
        with _truncated_images(truncated), Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if self.exif else file
            return _eight_bits(image) if image.mode[0] in "IF" else image.convert("RGB")


AS_OPENOOD = Reading()


def _gives_bytes(path: Path) -> bool:
    try:
        contents.look(str(path))
    except OSError:
        return False
    return True


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of deep pixels in RGB: 0..65535 or, of floats, 0..1 scaled to 0..255, which Pillow would cut off."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("some of its pixels are NaN or infinite")
    largest = float(pixels.max(initial=0))
    if image.mode == "F":
        white = next((white for white in (1, 255, 65535) if largest <= white), largest)
    else:
        white = max(65535, largest)
    return Image.fromarray((pixels.clip(0) * (255 / white)).round().astype(np.uint8)).convert("RGB")


@contextmanager
def _truncated_images(allowed: bool) -> Iterator[None]:
    """Whether Pillow fills what a file lacks with grey; OpenOOD's modules turn that on for good."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
