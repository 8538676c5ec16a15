"""``--data digits``: the embedded benchmark, which needs no download."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from . import digit_images
from .suite import Group, ImageSet, Suite, digest, state_digest
from .training import Recipe, trained

RECIPE = Recipe()
INPUT_SIDE = 16  # pixels; room for three stages of 16, 8 and 4 pixels
VALIDATION = 200  # of the 898 training digits


def load(seed: int, cache: Path, recipe: Recipe = RECIPE) -> Suite:
    """Digits against letters (near-OOD), photographs and noise (far-OOD), all sets of the same size.

    ``seed`` is the network's: the images are the same for every seed.
    """
    digits = digit_images.digits()
    images, labels = network_input(digits.train_images), torch.from_numpy(digits.train_labels)
    network = trained(images, labels, recipe, seed, cache)
    count = len(digits.test_images)
    mean, std = _grey_statistics()
    return Suite(
        name="digits",
        network=network,
        network_name="smallresnet",
        network_description=f"SmallResNet, {recipe}, trained on {len(images)} digits from seed {seed}",
        weights=state_digest(network),
        classes=10,
        normalisation=((mean / digit_images.LEVELS,), (std / digit_images.LEVELS,)),
        in_distribution=_image_set(
            "digits",
            "ID",
            network_input(digits.test_images),
            torch.from_numpy(digits.test_labels),
            "scikit-learn's handwritten digits, the half that was not trained on",
        ),
        out_of_distribution=(
            _ood_set(
                "letters",
                "near",
                digit_images.letters(count),
                "printed letters unlike any digit, made as the digits were and with the same amount of ink",
            ),
            _ood_set(
                "photos",
                "far",
                digit_images.photo_patches(count),
                "grey patches of scikit-learn's two sample photographs",
            ),
            _ood_set(
                "noise",
                "far",
                digit_images.noise(count),
                "independent pixels with the grey levels of the digits",
            ),
        ),
        # The two are disjoint, lest a nearest neighbour of a validation image be the image itself.
        training=_image_set("train digits", "ID", images[VALIDATION:], labels[VALIDATION:], "digits trained on"),
        validation=(
            _image_set(
                "val digits",
                "ID",
                images[:VALIDATION],
                labels[:VALIDATION],
                "digits that were trained on, as every digit outside the test set was: the network knows them too well",
            ),
            _ood_set(
                "val letters",
                "near",
                digit_images.letters(VALIDATION, seed=4, fonts=digit_images.VALIDATION_FONTS),
                "printed letters, as the test set's but from another family of fonts",
            ),
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


def _ood_set(name: str, group: Group, images: digit_images.Images, description: str) -> ImageSet:
    return _image_set(name, group, network_input(images), torch.full((len(images),), -1), description)


def _image_set(name: str, group: Group, images: Tensor, labels: Tensor, description: str) -> ImageSet:
    return ImageSet(name, group, TensorDataset(images, labels), description, digest(images, labels))
