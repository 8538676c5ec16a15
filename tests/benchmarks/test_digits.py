"""The embedded benchmark: its images, and its network with the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


from comparison import digit_images, digits, sources, training
from comparison.console import Parser
from networks import SourceError

from openood_sandi import SandIC

QUICK = training.Recipe(widths=(4, 4, 8), blocks=1, epochs=1)
OOD_SETS: dict[str, Callable[..., digit_images.Images]] = {
    "letters": digit_images.letters,
    "photos": digit_images.photo_patches,
    "noise": digit_images.noise,
}


# ---------------------------------------------------------------- images


def test_digits_are_split_half_and_half_by_class_without_overlap() -> None:
    split = digit_images.digits()
    counts = np.bincount(split.train_labels), np.bincount(split.test_labels)
    assert sum(map(sum, counts)) == 1797 and np.abs(counts[0] - counts[1]).max() <= 1
    assert not _as_set(split.train_images) & _as_set(split.test_images)


@pytest.mark.parametrize("name", OOD_SETS)
def test_ood_images_are_deterministic_like_digits_in_form_and_none_is_a_digit(name: str) -> None:
    make, split = OOD_SETS[name], digit_images.digits()
    images = make(300)
    assert np.array_equal(images, make(300))
    assert not np.array_equal(images, make(300, seed=1000))
    assert images.shape == (300, 8, 8) and images.dtype == np.uint8 and images.max() <= 16
    assert len(_as_set(images)) > 295  # hardly a repetition
    assert not _as_set(images) & (_as_set(split.train_images) | _as_set(split.test_images))


@pytest.mark.parametrize("name", ["letters", "noise"])
def test_the_amount_of_ink_does_not_give_away(name: str) -> None:
    images, inked = OOD_SETS[name](899), digit_images.digits().test_images
    assert images.mean() == pytest.approx(inked.mean(), rel=0.05)
    assert np.mean(images == 0) == pytest.approx(np.mean(inked == 0), rel=0.05)
    assert np.mean(images == 16) == pytest.approx(np.mean(inked == 16), rel=0.05)


def test_letters_fill_the_height_and_leave_the_margins_as_digits_do() -> None:
    images = digit_images.letters(300)
    assert images[:, 0].any(axis=1).all() and images[:, -1].any(axis=1).all()
    assert not images[:, :, 0].any() and not images[:, :, -1].any()


def test_photo_patches_show_something() -> None:
    assert np.ptp(digit_images.photo_patches(300), axis=(1, 2)).min() >= 4


def test_network_input_is_enlarged_and_normalised() -> None:
    split = digit_images.digits()
    pixels = digits.network_input(split.train_images)
    assert pixels.shape == (898, 1, 16, 16) and pixels.dtype == torch.float32
    expected = (8 - split.train_images.mean()) / split.train_images.std()
    flat = digits.network_input(np.full((1, 8, 8), 8, dtype=np.uint8))
    torch.testing.assert_close(flat, torch.full((1, 1, 16, 16), float(expected)))


def _as_set(images: digit_images.Images) -> set[bytes]:
    return {image.tobytes() for image in images}


# ---------------------------------------------------------------- network and its cache


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    split = digit_images.digits()
    return digits.network_input(split.train_images[:128]), torch.from_numpy(split.train_labels[:128])


def test_the_number_of_threads_does_not_change_the_network(data: tuple[Tensor, Tensor]) -> None:
    one = training.train(*data, QUICK, 0)
    torch.set_num_threads(4)
    try:
        four = training.train(*data, QUICK, 0)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
    assert _same_weights(one, four)


def test_training_is_cached_and_leaves_the_random_state(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.get_rng_state()
    first = training.trained(*data, QUICK, 0, tmp_path)
    other_seed = training.trained(*data, QUICK, 1, tmp_path)
    monkeypatch.setattr(training, "train", None)  # from here on only the cache can answer
    again = training.trained(*data, QUICK, 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert _same_weights(first, again) and not _same_weights(first, other_seed)
    assert not again.training and all(p.requires_grad for p in again.parameters())
    images = data[0][:5]
    assert torch.equal(first(images), again(images))


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "other network", "not an archive"])
def test_a_damaged_cache_is_reported_and_replaced(data: tuple[Tensor, Tensor], tmp_path: Path, damage: str) -> None:
    good = training.trained(*data, QUICK, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    at = content.index(good.fc.weight.detach().numpy().tobytes())
    if damage == "other network":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    else:
        path.write_bytes(
            {
                "flipped bit": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
                "cut short": content[: len(content) // 2],
                "empty": b"",
                "not an archive": b"hello",
            }[damage]
        )
    with pytest.warns(UserWarning, match=f"{path.name} is unusable"):
        assert _same_weights(training.trained(*data, QUICK, 0, tmp_path), good)
    assert _same_weights(training.trained(*data, QUICK, 0, tmp_path), good)  # and no warning now
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_reported(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    with pytest.warns(UserWarning, match="Could not cache the network"):
        net = training.trained(*data, QUICK, 0, file)
    assert net(data[0]).shape == (128, 10)


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["silu_cnn", "vit"])
def test_networks_of_other_activations_are_trained_cached_and_read_by_s_and_i_c(
    data: tuple[Tensor, Tensor], tmp_path: Path, name: str
) -> None:
    recipe = replace(training.RECIPES[name], epochs=2)
    first = training.trained(*data, recipe, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(name) and not first.training
    assert _same_weights(training.trained(*data, recipe, 0, tmp_path), first)
    trained_for_longer = training.train(*data, replace(recipe, epochs=4), 0)
    losses = [F.cross_entropy(net(data[0]), data[1]).item() for net in (first, trained_for_longer)]
    assert losses[1] < losses[0] < 2.5
    detector = SandIC(first).fit([data])
    assert len(detector.split_names) == 3


def test_a_network_that_is_not_trained_on_digits_is_refused(tmp_path: Path) -> None:
    parser = Parser()
    sources.add_arguments(parser)
    with pytest.raises(SourceError, match="--network resnet50: --data digits trains its own, one of smallresnet"):
        sources.load(parser.parse_args(["--network", "resnet50", "--cache", str(tmp_path)]))
