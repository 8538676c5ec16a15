"""``--data digits``: the embedded benchmark, which needs no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from . import digit_images
from .suite import Group, ImageSet, Suite, digest, state_digest
from .training import RECIPES, Recipe, trained

TITLES = {"smallresnet": "SmallResNet", "silu_cnn": "a CNN of SiLU", "vit": "a small vision transformer of GELU"}
INPUT_SIDE = 16  # pixels; room for three stages of 16, 8 and 4 pixels
VALIDATION = 200  # of the 898 training digits


def load(seed: int, cache: Path, recipe: Recipe = RECIPES["smallresnet"]) -> Suite:
    """Digits against letters (near-OOD), photographs and noise (far-OOD), all sets of the same size.

    ``seed`` is the network's: the images are the same for every seed.
    """
    digits = digit_images.digits()
    images, labels = network_input(digits.train_images), torch.from_numpy(digits.train_labels)
    network = trained(images, labels, recipe, seed, cache)
    count = len(digits.test_images)
    mean, std = _grey_statistics()
    known = "scikit-learn's handwritten digits, the half that was not trained on"
    near = "printed letters unlike any digit, made as the digits were and with the same amount of ink"
    photos = "grey patches of scikit-learn's two sample photographs"
    noise = "independent pixels with the grey levels of the digits"
    seen = "digits that were trained on, as every digit outside the test set was: the network knows them too well"
    other_letters = digit_images.letters(VALIDATION, seed=4, fonts=digit_images.VALIDATION_FONTS)
    other_fonts = "printed letters, as the test set's but from another family of fonts"
    return Suite(
        name="digits",
        network=network,
        network_name=recipe.name,
        network_description=f"{TITLES[recipe.name]}, {len(images)} digits, seed {seed}: {recipe.in_words}",
        weights=state_digest(network),
        classes=10,
        normalisation=((mean / digit_images.LEVELS,), (std / digit_images.LEVELS,)),
        in_distribution=_id_set("digits", network_input(digits.test_images), digits.test_labels, known),
        out_of_distribution=(
            _ood_set("letters", "near", digit_images.letters(count), near),
            _ood_set("photos", "far", digit_images.photo_patches(count), photos),
            _ood_set("noise", "far", digit_images.noise(count), noise),
        ),
        # The two are disjoint, lest a nearest neighbour of a validation image be the image itself.
        training=_id_set("train digits", images[VALIDATION:], labels[VALIDATION:], "digits trained on"),
        validation=(
            _id_set("val digits", images[:VALIDATION], labels[:VALIDATION], seen),
            _ood_set("val letters", "near", other_letters, other_fonts),
        ),
        protocol="own",
    )


def network_input(images: digit_images.Images) -> Tensor:
    """(N, 8, 8) in 0..16 to (N, 1, 16, 16) float32: enlarged; training pixels have mean 0 and variance 1."""
    mean, std = _grey_statistics()
    pixels = torch.from_numpy((images - mean) / std).float().unsqueeze(1)
    return F.interpolate(pixels, size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear", align_corners=False)


def _grey_statistics() -> tuple[float, float]:
    reference = digit_images.digits().train_images
    return float(reference.mean()), float(reference.std())


def _id_set(name: str, images: Tensor, labels: Tensor | npt.NDArray[np.int64], description: str) -> ImageSet:
    labels = torch.as_tensor(labels)
    return ImageSet(name, "ID", TensorDataset(images, labels), description, digest(images, labels))


def _ood_set(name: str, group: Group, images: digit_images.Images, description: str) -> ImageSet:
    inputs, labels = network_input(images), torch.full((len(images),), -1)
    return ImageSet(name, group, TensorDataset(inputs, labels), description, digest(inputs, labels))
