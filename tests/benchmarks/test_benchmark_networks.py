"""The benchmarks' networks against other implementations, and what becomes of checkpoints."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import SourceError, catalogue, checkpoints
from networks.cifar import CifarResNet, WideResNet
from networks.imagenet import BitResNet
from PIL import Image
from torch import Tensor, nn

from openood_sandi.named_networks import input_of_torchvision
from tests.helpers import parity_networks
from tests.helpers.places import CHECKPOINTS


def lively(net: nn.Module) -> nn.Module:
    """The network in eval mode with norms that do something."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "gn.weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1:
                tensor.normal_(std=0.3)
    return net.eval()


def same_logits(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# ---------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", ["resnet34", "wrn40-2", "bit"])
def test_the_papers_networks_are_those_of_the_parity_data(name: str) -> None:
    """In names of weights too, but for the last layer of ResNet-34, which is renamed."""
    make: Callable[[], nn.Module] = {
        "resnet34": lambda: CifarResNet((3, 4, 6, 3), (8, 8, 16, 16), classes=10),
        "wrn40-2": lambda: WideResNet(40, 2, base=4, classes=10),
        "bit": lambda: BitResNet((1, 1, 2, 1), base=32, classes=10),
    }[name]
    torch.manual_seed(0)
    state = lively(make()).state_dict()
    weights = {key.replace("fc.", "linear.") if name == "resnet34" else key: w for key, w in state.items()}
    theirs = {
        "resnet34": parity_networks.ResNet,
        "wrn40-2": parity_networks.WideResNet,
        "bit": lambda weights: parity_networks.BiT(weights, groups=32),
    }[name](weights)
    theirs.load_state_dict(weights)
    ours = make().eval()
    checkpoints.load(ours, weights, Path("file"))
    same_logits(ours, theirs.eval(), torch.randn(2, 3, 32, 32))


def test_mobilenet_v2_is_the_network_that_came_with_its_weights() -> None:
    folder = CHECKPOINTS
    if not (folder / "mobilenet_v2.py").is_file():
        pytest.skip(
            f"needs {folder}/mobilenet_v2.py; OPENOOD_SANDI_DATA=FOLDER names another place, with checkpoints beside it"
        )
    spec = importlib.util.spec_from_file_location("mobilenet_v2", folder / "mobilenet_v2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights = folder / "imagenet_mobilenet_v2.npz"
    ours = catalogue.ARCHITECTURES["mobilenet_v2"].make(1000).eval()
    checkpoints.load(ours, checkpoints.read(weights), weights)
    same_logits(ours, module.MobileNetV2(weights).eval(), torch.rand(2, 3, 64, 64) * 2 - 1)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet18_32x32", 11_220_132),
        ("resnet34", 21_328_292),
        ("wrn40-2", 2_255_156),
        # 0.27 and 0.85 million for 10 classes, table 6 of He et al.
        ("resnet20", 269_722 + 90 * 65),
        ("resnet56", 853_018 + 90 * 65),
        ("resnet110", 1_727_962 + 90 * 65),
        ("bit-s-r101x1", 44_541_480 - 900 * 2049),
        ("resnet50", 25_557_032 - 900 * 2049),
    ],
)
def test_networks_have_their_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        net = catalogue.ARCHITECTURES[name].make(100)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


def test_torchvisions_weights_bring_their_input() -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is missing: pip install torchvision")
    assert transforms is not None
    pixels = np.random.default_rng(0).integers(0, 256, (250, 333, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name in ("resnet50", "swin_t", "efficientnet_b3"):  # bilinear, bicubic, other sizes
        weights = catalogue.default_weights(f"torchvision:{name}")
        shape = input_of_torchvision(weights)
        assert torch.equal(shape(image), weights.transforms()(image))


@pytest.mark.parametrize(
    "name",
    ["resnet19", "torchvision:resnet19", "openood:resnet19", "timm:resnet5", "hf:nowhere", "nowhere.py:make"],
)
def test_unknown_networks_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match=r"resnet19|openood|nowhere|timm has no network 'resnet5'"):
        catalogue.architecture(name).make(10)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return lively(CifarResNet((1, 1), (4, 8), classes=5))


def saved(folder: Path, form: str, state: Mapping[str, Tensor]) -> Path:
    """The state as people store it."""
    path = folder / f"weights.{form.split()[-1]}"
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is missing: pip install safetensors")
        from safetensors.torch import save_file

        save_file(dict(state), path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    elif form.startswith("nested"):
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif form.startswith("counted"):
        torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, path)
    else:
        torch.save(dict(state), path)
    return path


@pytest.mark.parametrize("form", ["plain pt", "nested ckpt", "counted pth", "safetensors", "npz"])
def test_checkpoints_of_every_form_load(net: nn.Module, tmp_path: Path, form: str) -> None:
    path = saved(tmp_path, form, net.state_dict())
    other = CifarResNet((1, 1), (4, 8), classes=5).eval()
    state = checkpoints.read(path)
    assert checkpoints.classes(other, state) == 5
    checkpoints.load(other, state, path)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(images), net(images))


def test_half_precision_becomes_single(net: nn.Module, tmp_path: Path) -> None:
    path = saved(tmp_path, "pt", {name: tensor.half() for name, tensor in net.state_dict().items()})
    other = CifarResNet((1, 1), (4, 8), classes=5)
    checkpoints.load(other, checkpoints.read(path), path)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    torch.testing.assert_close(other.fc.weight, net.get_parameter("fc.weight"), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_weights_of_another_network_are_refused_and_recognised(tmp_path: Path) -> None:
    state = catalogue.ARCHITECTURES["resnet20"].make(10).state_dict()
    path = saved(tmp_path, "pt", state)
    with pytest.raises(SourceError) as caught:
        checkpoints.load(
            catalogue.ARCHITECTURES["resnet56"].make(10), checkpoints.read(path), path, lambda: catalogue.on_meta(10)
        )
    assert str(path) in str(caught.value) and "those of resnet20." in str(caught.value)
    assert "missing: layer1.3.conv1.weight" in str(caught.value)
    with pytest.raises(SourceError) as caught:
        checkpoints.load(CifarResNet((3, 3, 3), (16, 32, 96), 10, padded=True), state, path)
    assert "layer3.0.conv1.weight (64, 32, 3, 3) instead of (96, 32, 3, 3)" in str(caught.value)


@pytest.mark.parametrize("content", ["nothing", "text", "network", "list", "options", "objects"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("file.npz" if content == "objects" else "file.pt")
    if content == "text":
        path.write_text("hello")
    elif content == "network":
        torch.save(nn.Linear(2, 2), path)  # pickled code, which must not run
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    elif content == "options":
        torch.save({"optimizer": {"lr": 0.1}}, path)
    elif content == "objects":
        np.savez(path, w=np.array([argparse.Namespace()], dtype=object))
    with pytest.raises(SourceError, match=path.name):
        checkpoints.read(path)


def test_weights_of_efficientnet_lite0_by_other_names_are_put_where_they_belong(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("tf_efficientnet_lite0").eval()
    parts = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    blocks = [name for name, module in net.named_modules() if type(module).__name__.endswith(("Conv", "Residual"))]
    numbers = {name: f"_blocks.{number}" for number, name in enumerate(blocks)}
    separable = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    inverted = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    inverted |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}

    def by_other_names(name: str) -> str:
        module, _, tensor = name.rpartition(".")
        block, _, part = module.rpartition(".")
        if not block:
            return f"{parts[part]}.{tensor}"
        return f"{numbers[block]}.{(separable if block == 'blocks.0.0' else inverted)[part]}.{tensor}"

    state = {by_other_names(name): tensor for name, tensor in net.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    other = timm.create_model("tf_efficientnet_lite0").eval()
    checkpoints.load(other, checkpoints.read(path), path)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in net.state_dict().items())
    torch.save({name: tensor for name, tensor in state.items() if "_blocks.3." not in name}, path)
    with pytest.raises(SourceError, match="expected those of EfficientNet-Lite0"):
        checkpoints.read(path)
