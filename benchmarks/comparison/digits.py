"""``--data digits``: the embedded benchmark, which needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from . import digit_images
from .suite import ImageSet, Suite
from .training import Recipe, trained

RECIPE = Recipe()
INPUT_SIDE = 16  # pixels; room for three stages of 16, 8 and 4 pixels


def load(seed: int, cache: Path, recipe: Recipe = RECIPE) -> Suite:
    """Digits against letters (near-OOD), photographs and noise (far-OOD), all sets of the same size.

    ``seed`` is the network's: the images are the same for every seed.
    """
    digits = digit_images.digits()
    network = trained(network_input(digits.train_images), torch.from_numpy(digits.train_labels), recipe, seed, cache)
    count = len(digits.test_images)
    return Suite(
        name="digits",
        network=network,
        network_description=f"SmallResNet, {recipe}, trained on {len(digits.train_images)} digits",
        in_distribution=ImageSet(
            "digits",
            "ID",
            TensorDataset(network_input(digits.test_images), torch.from_numpy(digits.test_labels)),
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
    )


def network_input(images: digit_images.Images) -> Tensor:
    """(N, 8, 8) in 0..16 to (N, 1, 16, 16) float32: enlarged; training pixels have mean 0 and variance 1."""
    reference = digit_images.digits().train_images
    pixels = torch.from_numpy((images - reference.mean()) / reference.std()).float().unsqueeze(1)
    return F.interpolate(pixels, size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear", align_corners=False)


def _ood_set(name: str, group: Literal["near", "far"], images: digit_images.Images, description: str) -> ImageSet:
    labels = torch.full((len(images),), -1)
    return ImageSet(name, group, TensorDataset(network_input(images), labels), description)
