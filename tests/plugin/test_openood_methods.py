"""Methods of the comparison that run OpenOOD's code: bit for bit what OpenOOD's Evaluator gives, on any network."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

for module in ("pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


from comparison.methods import available, with_openood, with_pytorch_ood
from comparison.methods.baselines import BASELINES
from comparison.methods.network import NetworkParts
from comparison.suite import ImageSet, Suite, digest

from tests.helpers import tiny, tiny_suite

TRAINING_IMAGES = 52  # KNN looks for the 50th neighbour
CPU = torch.device("cpu")


class Plain(nn.Module):
    """A classifier without anything that OpenOOD asks of its networks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.wrapped = net

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x)


@pytest.fixture(scope="module")
def world(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tree of images for the Evaluator, OpenOOD's settings without and with its search, and a network."""
    from openood.networks.resnet18_32x32 import BasicBlock, ResNet18_32x32

    root = tmp_path_factory.mktemp("methods")
    tiny.write_images(root)
    more_training_images(root)
    for name in ("configs", "searching"):
        shutil.copytree(checkout / "configs/postprocessors", root / name / "postprocessors")
    for file in (root / "configs/postprocessors").glob("*.yml"):
        file.write_text(file.read_text().replace("APS_mode: True", "APS_mode: False"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ResNet18_32x32(BasicBlock, [1, 1, 1, 1], num_classes=100).eval()
        net.fc.weight.data.mul_(20)  # the classes of random weights are all alike
    return SimpleNamespace(root=root, net=net)


def more_training_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(TRAINING_IMAGES):
        path = Path("cifar100/more", f"{number}.png")
        (root / "data/images_classic" / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(root / "data/images_classic" / path)
        lines.append(f"{path} {number}\n")
    (root / "data/benchmark_imglist/cifar100/train_cifar100.txt").write_text("".join(lines))


def evaluator(world: SimpleNamespace, name: str, configs: str = "configs") -> Any:
    """OpenOOD's Evaluator, its postprocessor set up and, if so configured, its options searched."""
    from openood.evaluation_api import Evaluator

    folders = {"data_root": str(world.root / "data"), "config_root": str(world.root / configs)}
    return Evaluator(world.net, id_name="cifar100", postprocessor_name=name, **folders, batch_size=30, num_workers=0)


def suite(evaluation: Any, net: nn.Module) -> Suite:
    """The images that the Evaluator has read."""
    loaders = evaluation.dataloader_dict
    known, ood = loaders["id"], loaders["ood"]
    return Suite(
        name="cifar100",
        network=net,
        network_name="resnet",
        network_description="",
        weights="",
        classes=100,
        normalisation=(tiny.MEAN, tiny.STD),
        in_distribution=images("cifar100", "ID", known["test"]),
        out_of_distribution=(images("svhn", "far", ood["far"]["svhn"]),),
        training=images("train", "ID", known["train"]),
        validation=(images("val", "ID", known["val"]), images("tin", "near", ood["val"])),
    )


def images(name: str, group: Any, loader: Any) -> ImageSet:
    batches = list(loader)
    data, labels = (torch.cat([batch[key] for batch in batches]) for key in ("data", "label"))
    return ImageSet(name, group, TensorDataset(data, labels), "", digest(data, labels))


def own_inference(evaluation: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """The Evaluator's classes and confidences of a known and an unknown set."""
    loaders = evaluation.dataloader_dict
    sets = (loaders["id"]["test"], loaders["ood"]["far"]["svhn"])
    return [evaluation.postprocessor.inference(evaluation.net, loader, progress=False)[:2] for loader in sets]


def scored(scorer: Callable[[Tensor], tuple[Tensor, Tensor]], data: Suite) -> list[tuple[np.ndarray, np.ndarray]]:
    """Classes and negative scores, by ``scorer``, of the sets of :func:`own_inference`."""
    found = []
    for part in (data.in_distribution, *data.out_of_distribution):
        batch, _ = next(iter(part.loader(30)))
        pred, score = scorer(batch)
        found.append((pred.numpy(), -score.numpy()))
    return found


#: Those that are fitted take seconds each; KNN stays among the quick ones.
FITTED = {"vim", "fdbd", "nci"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in FITTED else []) for name in BASELINES]
)
def test_same_bits_as_the_evaluator(world: SimpleNamespace, name: str) -> None:
    evaluation = evaluator(world, name)
    expected = own_inference(evaluation)
    world.net.zero_grad()  # what OpenOOD leaves there
    before = {key: value.clone() for key, value in world.net.state_dict().items()}
    for net in (world.net, Plain(world.net)):
        data = suite(evaluation, net)
        method = available(data)[0][name]
        assert method.source == "OpenOOD"
        for (pred, conf), (own_pred, own_conf) in zip(scored(method.build(data, CPU, 30), data), expected, strict=True):
            np.testing.assert_array_equal(pred, own_pred)
            np.testing.assert_array_equal(conf, own_conf)
            assert np.isfinite(conf).all() and len(set(conf.tolist())) == len(conf)
    # the network is left as found
    assert all(torch.equal(value, before[key]) for key, value in world.net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in world.net.parameters())


@pytest.mark.parametrize("name", ["odin", "react", "gen", "nci"])
@pytest.mark.slow
def test_search_chooses_what_the_evaluator_chooses(world: SimpleNamespace, name: str) -> None:
    evaluation = evaluator(world, name, "searching")
    chosen = evaluation.postprocessor.get_hyperparam()
    data = suite(evaluation, Plain(world.net))
    method = available(data)[0][f"{name}-search"]
    scorer = method.build(data, CPU, 30)
    assert list(scorer.chosen.values()) == (chosen if isinstance(chosen, list) else [chosen])
    assert set(scorer.chosen) == set(BASELINES[name].options)
    for (_, conf), (_, own_conf) in zip(scored(scorer, data), own_inference(evaluation), strict=True):
        np.testing.assert_array_equal(conf, own_conf)


def test_search_for_this_packages_own(world: SimpleNamespace) -> None:
    data = suite(evaluator(world, "msp"), world.net)
    scorer = available(data)[0]["gsc-search"].build(data, CPU, 30)
    best, auroc = (scorer.chosen["layer"], scorer.chosen["mask_ratio"]), {}
    for layer, ratio in itertools.product(("auto", "last_stage"), (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)):
        from openood_sandi.detectors.gsc import GradientShortCircuit

        assert data.validation is not None
        known, unknown = (
            GradientShortCircuit(world.net, mask_ratio=ratio, layer=layer)(next(iter(part.loader(30)))[0])[1]
            for part in data.validation
        )
        auroc[layer, ratio] = float((unknown[:, None] > known).double().mean())
    assert auroc[best] == max(auroc.values())
    assert best == next(setting for setting, value in auroc.items() if value == auroc[best])


def test_what_needs_no_linear_last_layer_takes_any_network(checkout: Path) -> None:
    network = nn.Sequential(tiny_suite.network(), nn.LogSoftmax(1)).eval()
    data = tiny_suite.suite(network=network)
    found, absent = available(data)
    names = {"msp", "odin", "ebo", "mls", "gen", "gen-search", "odin-search"}
    assert names <= found.keys() and {"ash", "ash-search", "rankfeat"} <= absent.keys()
    batch, _ = next(iter(data.in_distribution.loader(100)))
    for name in names:
        pred, score = found[name].build(data, CPU, 30)(batch)
        assert found[name].source == "OpenOOD" and score.isfinite().all()
        assert torch.equal(pred, network(batch).argmax(1))


# What pytorch-ood's confidence (-score) is of OpenOOD's; a missing name says that they are the same.
RELATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gradnorm": lambda conf: conf / tiny_suite.CLASSES,  # a mean over classes, not a sum
    "gen": lambda conf: conf / tiny_suite.CLASSES,
    "fdbd": lambda conf: conf / (tiny_suite.CLASSES - 1),
    "knn": lambda conf: -np.sqrt(-conf),  # a distance, not its square
}


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "rankfeat"])
def test_pytorch_ood_means_the_same(checkout: Path, name: str) -> None:
    pytest.importorskip("pytorch_ood", reason='pytorch-ood is missing; supply it by pip install -e ".[bench]"')
    data = tiny_suite.suite()
    ours, theirs = (
        scored(library.offer(data, NetworkParts(data))[0][name].build(data, CPU, 30), data)
        for library in (with_pytorch_ood, with_openood)
    )
    for (pred, conf), (own_pred, own_conf) in zip(ours, theirs, strict=True):
        if name not in ("react", "scale", "ash"):  # OpenOOD predicts with the modified features
            np.testing.assert_array_equal(pred, own_pred)
        rtol = 1e-3 if name == "vim" else 1e-5  # eigenvectors in single precision
        np.testing.assert_allclose(conf, RELATIONS.get(name, np.asarray)(own_conf), rtol=rtol, atol=rtol)


def test_options_are_those_of_openoods_files(checkout: Path) -> None:
    from openood.utils.config import Config

    for name, baseline in BASELINES.items():
        settings = Config(str(checkout / f"configs/postprocessors/{name}.yml")).postprocessor
        assert dict(settings.postprocessor_args or {}) == dict(baseline.options)
        sweep = dict(settings.postprocessor_sweep or {})
        if name != "ebo":  # there is nothing to choose from
            assert list(sweep.values()) == [list(values) for values in baseline.sweep.values()]
