"""The comparison's images, protocols and networks against OpenOOD's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.places import DATA

for module in ("sklearn", "matplotlib"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[test]"')


from comparison import sources
from comparison.image_lists import BENCHMARKS as OURS
from comparison.suite import Suite
from networks import checkpoints

from tests.helpers import tiny


def load(*arguments: str) -> Suite:
    parser = argparse.ArgumentParser()
    sources.add_arguments(parser)
    return sources.load(parser.parse_args(arguments))


def same_images(ours: Any, theirs: Any, count: int) -> None:
    for index in range(count):
        image, label = ours[index]
        sample = theirs[index]
        assert torch.equal(image, sample["data"]) and int(label) == sample["label"]


def test_a_download_of_openoods_gives_its_images_and_network(checkout: Path) -> None:
    from openood.evaluation_api.datasets import get_id_ood_dataloader
    from openood.evaluation_api.preprocessor import get_default_preprocessor

    checkpoint = str(checkout / tiny.CHECKPOINT).replace("/s0/", "/s{seed}/")
    suite = load("--data", "cifar100", "--data-root", str(checkout / "data"), "--checkpoint", checkpoint)
    theirs = get_id_ood_dataloader("cifar100", str(checkout / "data"), get_default_preprocessor("cifar100"))
    assert suite.missing == () and suite.training is not None and suite.validation is not None
    same_images(suite.in_distribution.dataset, theirs["id"]["test"].dataset, tiny.IMAGES)
    same_images(suite.training.dataset, theirs["id"]["train"].dataset, tiny.IMAGES)
    same_images(suite.validation[0].dataset, theirs["id"]["val"].dataset, tiny.IMAGES)
    same_images(suite.validation[1].dataset, theirs["ood"]["val"].dataset, tiny.IMAGES)
    for group in ("near", "far"):
        sets = {images.name: images for images in suite.out_of_distribution if images.group == group}
        assert sets.keys() == theirs["ood"][group].keys()
        for name, images in sets.items():
            same_images(images.dataset, theirs["ood"][group][name].dataset, tiny.IMAGES)
    images, _ = next(iter(suite.in_distribution.loader(2)))
    with torch.no_grad():
        torch.testing.assert_close(suite.network(images), tiny.network()(images))


def test_protocols_are_openoods(checkout: Path) -> None:
    from openood.evaluation_api.datasets import DATA_INFO
    from openood.evaluation_api.preprocessor import default_preprocessing_dict

    for name, ours in OURS.items():
        theirs = DATA_INFO[name]
        assert ours.classes == theirs["num_classes"]
        assert [list(ours.near), list(ours.far)] == [theirs["ood"][group]["datasets"] for group in ("near", "far")]
        for group in ("near", "far"):
            for one in theirs["ood"][group]["datasets"]:
                assert theirs["ood"][group][one]["imglist_path"] == f"benchmark_imglist/{name}/test_{one}.txt"
        assert theirs["ood"]["val"]["imglist_path"] == f"benchmark_imglist/{name}/val_{ours.validation}.txt"
        preprocessing = default_preprocessing_dict[name]
        assert (ours.input.resize, ours.input.crop) == (preprocessing["pre_size"], preprocessing["img_size"])
        assert ours.input.normalisation is not None
        assert [list(part) for part in ours.input.normalisation] == preprocessing["normalization"]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}; OPENOOD_SANDI_DATA=FOLDER names another")
@pytest.mark.parametrize("data, network", [("cifar10", "resnet18_32x32"), ("imagenet", "resnet50")])
def test_real_images_are_openoods_bit_for_bit(checkout: Path, data: str, network: str) -> None:
    from openood.datasets.imglist_dataset import ImglistDataset
    from openood.evaluation_api.preprocessor import get_default_preprocessor

    root = DATA
    suite = load("--data", data, "--data-root", str(root), "--network", network, "--checkpoint", "random")
    preprocessor = get_default_preprocessor(data)
    for images in (suite.in_distribution, *suite.out_of_distribution):
        large = data == "imagenet" and images.name == "imagenet"
        theirs = ImglistDataset(
            name=images.name,
            imglist_pth=str(root / f"benchmark_imglist/{data}/test_{images.name}.txt"),
            data_dir=str(root / ("images_largescale" if large else "images_classic")),
            num_classes=suite.classes,
            preprocessor=preprocessor,
            data_aux_preprocessor=preprocessor,
        )
        assert len(images) == len(theirs)
        same_images(images.dataset, theirs, 20)


@pytest.mark.parametrize("name", ["wrn40-2", pytest.param("bit-s-r101x1", marks=pytest.mark.slow)])
def test_the_papers_networks_are_openoods(checkout: Path, name: str) -> None:
    from openood.networks.bit import KNOWN_MODELS
    from openood.networks.wrn import WideResNet

    theirs: nn.Module = WideResNet(40, 10, 2) if name == "wrn40-2" else KNOWN_MODELS["BiT-S-R101x1"](head_size=10)
    ours = sources.catalogue.ARCHITECTURES[name].make(10).eval()
    checkpoints.load(ours, theirs.state_dict(), Path("file"))
    images = torch.randn(1, 3, 32, 32) if name == "wrn40-2" else torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(images.double()), theirs.eval().double()(images.double()))


def test_networks_of_openoods_by_name(checkout: Path) -> None:
    root = str(checkout / "data")
    checkpoint = str(checkout / tiny.CHECKPOINT)
    arguments = ("--data", "cifar100", "--data-root", root, "--checkpoint", checkpoint)
    suite = load(*arguments, "--network", "openood:resnet18_32x32")
    assert type(suite.network).__module__ == "openood.networks.resnet18_32x32"
    ours = load(*arguments)
    assert suite.weights == ours.weights
    assert suite.in_distribution.fingerprint == ours.in_distribution.fingerprint
    lenet = load(*arguments[:4], "--checkpoint", "random", "--network", "openood:lenet", "--size", "32", "28")
    assert lenet.in_distribution.dataset[0][0].shape == (3, 28, 28) and lenet.normalisation == ours.normalisation
    with pytest.raises(sources.SourceError, match="OpenOOD makes no network 'resnet19'"):
        load(*arguments, "--network", "openood:resnet19")
