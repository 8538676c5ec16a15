"""One image file to pixels in RGB, whatever its kind and state."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from networks import SourceError
from PIL import Image, ImageFile, ImageOps

from openood_sandi.runs import contents, pictures

Policy = Literal["stop", "skip", "grey"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
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
            pixels: Image.Image = pictures.rgb(image)
            return pixels


AS_OPENOOD = Reading()


def _gives_bytes(path: Path) -> bool:
    try:
        contents.look(str(path))
    except OSError:
        return False
    return True


@contextmanager
def _truncated_images(allowed: bool) -> Iterator[None]:
    """Whether Pillow fills what a file lacks with grey; OpenOOD's modules turn that on for good."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
