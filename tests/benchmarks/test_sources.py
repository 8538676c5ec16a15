"""Where the comparison's images and networks come from: trees of files written here, and real data where it is."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.places import DATA

for module in ("matplotlib", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[test]"')


from comparison import digit_images, digits, sources, training
from comparison.suite import ImageSet, Suite
from networks import SourceError

real = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}; OPENOOD_SANDI_DATA=FOLDER names another place")


def load(*arguments: str, seed: int | None = None) -> Suite:
    parser = argparse.ArgumentParser()
    sources.add_arguments(parser)
    return sources.load(parser.parse_args(arguments), seed)


def write(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """CIFAR-10, with three of OpenOOD's OOD sets and one list that is in no protocol."""
    root = tmp_path / "data"
    lists = root / "benchmark_imglist/cifar10"
    lists.mkdir(parents=True)
    for number, (split, name) in enumerate(
        [
            ("train", "cifar10"),
            ("val", "cifar10"),
            ("test", "cifar10"),
            ("val", "tin"),
            ("test", "tin"),
            ("test", "svhn"),
            ("test", "texture"),
            ("test", "usps"),
        ]
    ):
        lines = []
        for image in range(4):
            file = f"{name}/{split}/{image}.png"
            # OpenOOD's own lists of OOD sets have other labels here and there
            lines.append(f"{file} {image if name in ('cifar10', 'usps') else -1}\n")
            folder = "images_largescale" if name == "texture" else "images_classic"
            write(root / folder / file, 10 * number + image)
        (lists / f"{split}_{name}.txt").write_text("".join(lines))
    return root


def cifar(root: Path, *arguments: str) -> Suite:
    arguments = ("--network", "resnet20", "--checkpoint", "random", *arguments)
    return load("--data", "cifar10", "--data-root", str(root), *arguments)


def names(sets: tuple[ImageSet, ...]) -> list[tuple[str, str]]:
    return [(images.name, images.group) for images in sets]


# ---------------------------------------------------------------- lists


def test_the_sets_of_a_protocol_that_are_there(root: Path) -> None:
    suite = cifar(root)
    assert names(suite.out_of_distribution) == [("tin", "near"), ("svhn", "far"), ("texture", "far")]
    images, labels = next(iter(suite.in_distribution.loader(3)))
    assert images.shape == (3, 3, 32, 32) and labels.tolist() == [0, 1, 2]
    for unknown in suite.out_of_distribution:
        (_, labels) = next(iter(unknown.loader(4)))
        assert labels.tolist() == [-1] * 4
    assert suite.training is not None and suite.validation is not None
    assert names((suite.training, *suite.validation)) == [
        ("train cifar10", "ID"),
        ("val cifar10", "ID"),
        ("val tin", "near"),
    ]
    left_out = "\n".join(suite.missing)
    for words in ("cifar100 (near-OOD): there is no list", "mnist (far-OOD)", "places365 (far-OOD)", "usps: not among"):
        assert words in left_out
    assert len(suite.missing) == 4 and suite.classes == 10 and not suite.network.training


def test_the_papers_protocol(root: Path) -> None:
    suite = cifar(root, "--protocol", "paper")
    assert names(suite.out_of_distribution) == [("svhn", "far"), ("tin", "near"), ("texture", "far")]
    assert [entry.partition(" ")[0] for entry in suite.missing] == ["lsun", "places365", "usps:"]


def test_sets_asked_for(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "pictures/deep/below.png", 99)
    suite = cifar(root, "--ood", "usps", "far:tin", f"near:mine={tmp_path / 'pictures'}", f"mnist={tmp_path}/pictures")
    sets = {images.name: images for images in suite.out_of_distribution}
    assert {name: images.group for name, images in sets.items()} == {
        "tin": "far",
        "svhn": "far",
        "texture": "far",
        "mnist": "far",
        "usps": "far",
        "mine": "near",
    }
    assert len(sets["mine"]) == len(sets["mnist"]) == 1
    assert sets["usps"].dataset[3][1] == -1, "whatever its list says"


def test_a_set_without_all_of_its_images_is_left_out(root: Path) -> None:
    lost = root / "images_classic/svhn/test/2.png"
    lost.unlink()
    suite = cifar(root)
    assert names(suite.out_of_distribution) == [("tin", "near"), ("texture", "far")]
    assert any(f"svhn (far-OOD): 1 of 4 images are missing, the first is {lost}" in entry for entry in suite.missing)
    (root / "benchmark_imglist/cifar10/val_tin.txt").unlink()
    validation = cifar(root).validation
    assert validation is not None and names(validation) == [("val cifar10", "ID")], "thresholds need no OOD images"
    (root / "images_classic/cifar10/val/0.png").unlink()
    assert cifar(root).validation is None
    with pytest.raises(SourceError, match=r"--ood svhn: 1 of 4 images"):
        cifar(root, "--ood", "svhn")


@pytest.mark.parametrize(
    "line, message",
    [
        ("cifar10/test/0.png 10", "line 2 .* has the label 10; expected 0 to 9"),
        ("cifar10/test/0.png", "line 2 .* expected a file and its label"),
        ("cifar10/test/9.png 1", "1 of 2 images are missing"),
    ],
)
def test_wrong_lists_are_refused(root: Path, line: str, message: str) -> None:
    (root / "benchmark_imglist/cifar10/test_cifar10.txt").write_text(f"cifar10/test/1.png 1\n{line}\n")
    with pytest.raises(SourceError, match=message):
        cifar(root)


def test_no_ood_set_at_all_is_refused(root: Path) -> None:
    for name in ("tin", "svhn", "texture"):
        (root / f"benchmark_imglist/cifar10/test_{name}.txt").unlink()
    with pytest.raises(SourceError) as caught:
        cifar(root)
    for words in ("cifar100 (near-OOD): there is no list", str(root), "There are lists of usps; --ood NAME"):
        assert words in str(caught.value)


def test_images_are_preprocessed_as_the_network_was_trained(root: Path) -> None:
    """By arithmetic on Pillow's resizing: of a CIFAR-sized image nothing is left to interpolate."""
    file = root / "images_classic/svhn/test/0.png"
    write(file, 5, size=(32, 32))
    pixels = torch.from_numpy(np.asarray(Image.open(file)).transpose(2, 0, 1) / 255)
    for network, mean, std in (
        ("resnet20", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # its own
        ("resnet18_32x32", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10's
    ):
        suite = cifar(root, "--network", network)
        images = next(images for images in suite.out_of_distribution if images.name == "svhn")
        expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(images.dataset[0][0], expected.float())
        assert suite.normalisation == (mean, std)
    suite = cifar(root, "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25", "--size", "64", "56")
    assert suite.out_of_distribution[1].dataset[0][0].shape == (3, 56, 56)
    assert suite.normalisation == ((0.5,) * 3, (0.25,) * 3)


# ---------------------------------------------------------------- fingerprints and limits


def test_a_fingerprint_tells_all_that_decides_the_scores(root: Path, tmp_path: Path) -> None:
    def svhn(*arguments: str, at: Path = root) -> str:
        return next(i.fingerprint for i in cifar(at, *arguments).out_of_distribution if i.name == "svhn")

    first = svhn()
    elsewhere = root.rename(tmp_path / "elsewhere")
    assert svhn(at=elsewhere) == first, "wherever the files are"
    assert svhn("--seeds", "1", at=elsewhere) == first, "whatever the weights"
    changed = [svhn("--network", "resnet18_32x32", at=elsewhere), svhn("--size", "64", "32", at=elsewhere)]
    file = elsewhere / "images_classic/svhn/test/0.png"
    write(file, 0, size=(50, 50))
    changed.append(svhn(at=elsewhere))
    path = elsewhere / "benchmark_imglist/cifar10/test_svhn.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    changed.append(svhn(at=elsewhere))
    assert len({first, *changed}) == 5
    weights = cifar(elsewhere).weights
    assert weights == cifar(elsewhere).weights and weights != cifar(elsewhere, "--seeds", "1").weights


def test_a_limit_keeps_images_of_all_parts_of_a_set(root: Path) -> None:
    suite = cifar(root)
    before = torch.get_rng_state()
    half = suite.limited(2)
    assert [label for _, label in half.in_distribution.dataset] == [0, 2]  # type: ignore[attr-defined]
    assert next(iter(half.in_distribution.loader(2, workers=1)))[1].tolist() == [0, 2]
    assert torch.equal(torch.get_rng_state(), before), "no random number is drawn"
    assert half.in_distribution.fingerprint != suite.in_distribution.fingerprint
    assert {len(images) for images in half.out_of_distribution} == {2}
    assert half.validation is not None and len(half.validation[1]) == 2
    assert half.training is suite.training
    assert suite.limited(4).in_distribution is suite.in_distribution
    assert suite.limited(None).in_distribution is suite.in_distribution
    assert suite.training is not None and half.training is suite.training
    fewer = suite.fitted_to(2)
    assert fewer.training is not None and len(fewer.training) == 2 and fewer.in_distribution is suite.in_distribution
    assert fewer.training.fingerprint != suite.training.fingerprint
    assert suite.fitted_to(None).training is suite.training


# ---------------------------------------------------------------- networks and checkpoints


def test_the_checkpoint_beside_the_data_is_found(root: Path) -> None:
    folder = root.parent / "checkpoints"
    folder.mkdir()
    net = sources.catalogue.ARCHITECTURES["resnet20"].make(10)
    torch.save(net.state_dict(), folder / "cifar10_resnet20.pt")
    suite = load("--data", "cifar10", "--data-root", str(root), "--network", "resnet20")
    assert torch.equal(suite.network.get_parameter("fc.weight"), net.get_parameter("fc.weight"))
    with pytest.raises(SourceError, match=r"No weights for resnet18_32x32.*There is cifar10_resnet20.pt"):
        load("--data", "cifar10", "--data-root", str(root))


def test_seeds_name_checkpoints(root: Path) -> None:
    expected = {}
    for seed in (3, 5):
        torch.manual_seed(seed)
        net = sources.catalogue.ARCHITECTURES["resnet20"].make(10)
        torch.save(net.state_dict(), root / f"s{seed}.pt")
        expected[seed] = net.get_parameter("conv1.weight")
    arguments = ["--data", "cifar10", "--data-root", str(root), "--network", "resnet20", "--seeds", "3", "5"]
    for seed in (3, 5):
        suite = load(*arguments, "--checkpoint", str(root / "s{seed}.pt"), seed=seed)
        assert torch.equal(suite.network.get_parameter("conv1.weight"), expected[seed])
    with pytest.raises(SourceError, match="Several --seeds"):
        load(*arguments, "--checkpoint", str(root / "s3.pt"))


def test_other_classes_than_the_data_are_refused(root: Path) -> None:
    torch.save(sources.catalogue.ARCHITECTURES["resnet20"].make(100).state_dict(), root / "hundred.pt")
    with pytest.raises(SourceError, match="has 100 classes and the ID data 10"):
        cifar(root, "--checkpoint", str(root / "hundred.pt"))


def test_the_papers_split_points_come_with_its_networks(root: Path) -> None:
    suite = cifar(root, "--network", "resnet34")
    assert len(suite.paper_splits) == 36 and set(suite.paper_splits) <= dict(suite.network.named_modules()).keys()
    assert cifar(root).paper_splits == ()


# ---------------------------------------------------------------- digits


def test_digits_hold_out_nothing_of_the_test_set(tmp_path: Path) -> None:
    suite = digits.load(0, tmp_path, training.Recipe(widths=(4, 4, 8), blocks=1, epochs=1))
    assert suite.training is not None and suite.validation is not None

    def images(one: ImageSet) -> set[bytes]:
        return {image.numpy().tobytes() for image, _ in one.dataset}  # type: ignore[attr-defined]

    tests = set().union(*(images(one) for one in (suite.in_distribution, *suite.out_of_distribution)))
    parts = [images(suite.training), *(images(one) for one in suite.validation)]
    assert [len(part) for part in parts] == [698, 200, 200]
    assert not tests & set().union(*parts) and not parts[0] & parts[1]
    (mean,), (std,) = suite.normalisation
    flat = digits.network_input(np.full((1, 8, 8), 8, dtype=np.uint8))
    torch.testing.assert_close(flat * std + mean, torch.full((1, 1, 16, 16), 8 / digit_images.LEVELS))


@pytest.mark.parametrize("option", ["--network=resnet20", "--checkpoint=random", "--ood=usps", "--id=."])
def test_digits_take_no_other_network_or_images(option: str) -> None:
    with pytest.raises(SourceError, match=r"goes with other --data|--data digits trains its own, one of smallresnet, "):
        load(option)


# ---------------------------------------------------------------- real images


@real
@pytest.mark.parametrize(
    "data, network, images, least",
    # Accuracies published beside the weights are 91.7, 93.4, 72.9 and 91 %.
    [
        ("cifar10", "resnet20", 200, 0.86),
        ("cifar10", "resnet56", 60, 0.85),
        ("cifar100", "resnet18_32x32", 60, 0.55),
        ("imagenet", "mobilenet_v2", 200, 0.72),
    ],
)
@pytest.mark.slow
def test_real_networks_know_real_images(data: str, network: str, images: int, least: float) -> None:
    suite = load("--data", data, "--data-root", str(DATA), "--network", network).limited(images)
    right = 0
    with torch.inference_mode():
        for batch, labels in suite.in_distribution.loader(30):
            right += int((suite.network(batch).argmax(dim=1) == labels).sum())
    assert right >= least * images


@real
def test_lists_of_real_data_are_disjoint() -> None:
    suite = load("--data", "cifar10", "--data-root", str(DATA), "--network", "resnet20")
    assert suite.validation is not None and suite.training is not None
    parts = (*suite.test_sets, suite.training, *suite.validation)
    chosen = {images.name: images.dataset.names for images in parts}  # type: ignore[attr-defined]
    assert all(names and len(set(names)) == len(names) for names in chosen.values())
    for one, other in itertools.combinations(("cifar10", "train cifar10", "val cifar10"), 2):
        assert not set(chosen[one]) & set(chosen[other])
    assert not set(chosen["tin"]) & set(chosen["val tin"])
    for images in parts:
        labels = {int(label) for label in images.dataset.labels}  # type: ignore[attr-defined]
        assert labels == (set(range(10)) if images.group == "ID" else {-1})
