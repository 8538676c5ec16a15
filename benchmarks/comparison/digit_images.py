"""Images of the embedded benchmark: handwritten digits, and three out-of-distribution (OOD) sets.

All material ships inside scikit-learn and matplotlib; nothing is downloaded. Every image, in-distribution
(ID) or OOD, is 8x8 with the 17 grey levels 0..16 (0 is background), so that neither size, grey range nor
resampling tells the sets apart. All sets are fixed: they do not depend on the seed of a training run.

Source of the digits: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998, as
shipped by scikit-learn. There a digit is scaled to a 32x32 bitmap that it fills from top to bottom, and a
pixel is the number of ink dots in one 4x4 block; the letters are made the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

SIDE = 8  # pixels
LEVELS = 16  # the largest grey level
BLOCK = 4  # a pixel counts the ink dots of a BLOCK x BLOCK block

# Letters that a reader could take for a digit (B D G I J L O Q S Z, b g i j l o q s z), and those too wide to
# be told apart at this size (M W m w), are left out. Lower case is kept where it differs from its capital.
LETTERS = "ACEFHKNPRTUVXY" + "adefhknrty"
FONTS = tuple(f"DejaVu{face}.ttf" for face in ("Sans", "Sans-Oblique", "SansMono", "Serif", "Serif-Italic"))
VALIDATION_FONTS = tuple(f"STIXGeneral{face}.ttf" for face in ("", "Italic", "Bol", "BolIta"))
GLYPH_WIDTH = 6  # pixels; digits leave the outermost column on either side empty

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Digits:
    """A stratified half and half split. Images are (N, 8, 8) uint8 in 0..16, labels (N,) int64 in 0..9."""

    train_images: Images
    train_labels: npt.NDArray[np.int64]
    test_images: Images
    test_labels: npt.NDArray[np.int64]


@functools.cache
def digits() -> Digits:
    """The 1797 handwritten digits, split once and for all (the same writers occur in both halves)."""
    bunch = load_digits()
    train, test = train_test_split(np.arange(len(bunch.target)), test_size=0.5, stratify=bunch.target, random_state=0)
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    return Digits(images[train], labels[train], images[test], labels[test])


def letters(count: int, seed: int = 1, fonts: Sequence[str] = FONTS) -> Images:
    """Printed letters of random slant, turn and stroke, drawn as the digits were: (count, 8, 8) uint8."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [ImageFont.truetype(str(folder / name), size=96) for name in fonts]
    rng = np.random.default_rng(seed)
    # Whole rounds of the alphabet, each shuffled, so that any first n images hold the letters evenly.
    rounds = -(-count // len(LETTERS))
    order = np.concatenate([rng.permutation(list(LETTERS)) for _ in range(rounds)])[:count]
    return np.stack([_letter(str(letter), faces[rng.integers(len(faces))], rng) for letter in order])


def _letter(letter: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> Images:
    canvas = Image.new("L", (192, 192))
    pen = int(rng.integers(0, 7))  # widens a stroke of the font, to the spread of pens among the digits
    ImageDraw.Draw(canvas).text((96, 96), letter, fill=255, font=font, anchor="mm", stroke_width=pen)
    shear = rng.uniform(-0.25, 0.25)
    slanted = canvas.transform(
        canvas.size, Image.Transform.AFFINE, (1, shear, -96 * shear, 0, 1, 0), Image.Resampling.BILINEAR
    )
    turned = slanted.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    glyph = turned.crop(turned.getbbox())
    height = SIDE * BLOCK
    width = min(round(glyph.width * height / glyph.height), GLYPH_WIDTH * BLOCK)
    bitmap = np.zeros((height, height), dtype=bool)
    left = (height - width) // 2
    bitmap[:, left : left + width] = np.asarray(glyph.resize((width, height), Image.Resampling.BOX)) >= 128
    ink: Images = bitmap.reshape(SIDE, BLOCK, SIDE, BLOCK).sum(axis=(1, 3), dtype=np.uint8)
    return ink


def photo_patches(count: int, seed: int = 2) -> Images:
    """Square patches of 16 to 128 pixels from scikit-learn's two photographs: (count, 8, 8) uint8.

    Patches without visible content (clear sky, blurred background) are passed over.
    """
    photos = [Image.fromarray(photo).convert("L") for photo in load_sample_images().images]
    rng = np.random.default_rng(seed)
    patches: list[Images] = []
    while len(patches) < count:
        photo = photos[rng.integers(len(photos))]
        side = int(16 * 2 ** rng.uniform(0, 3))
        left, top = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
        square = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BOX)
        patch = np.rint(np.asarray(square, dtype=np.float64) * LEVELS / 255).astype(np.uint8)
        if np.ptp(patch) >= LEVELS // 4:
            patches.append(patch)
    return np.stack(patches)


def noise(count: int, seed: int = 3) -> Images:
    """Independent pixels with the grey levels of the training digits: (count, 8, 8) uint8.

    Brightness and contrast are those of the digits on average; only the arrangement is not.
    """
    return np.random.default_rng(seed).choice(digits().train_images.ravel(), size=(count, SIDE, SIDE))
