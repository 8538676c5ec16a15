"""Detectors in files: round trips, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openood_sandi import Detector, GradientShortCircuit, PrototypeFusion, SandI, SandIC
from openood_sandi.detectors import saved
from openood_sandi.detectors.gaia import GAIA
from tests.helpers import tiny_suite

DETECTORS: list[Any] = [
    (SandI, {"variant": "A", "splits": ["stage3.*"], "steps": 3}),
    (SandI, {}),
    (SandIC, {"gate": 1.0, "stages": "last_2"}),
    (GAIA, {"attribution": "cross_entropy"}),
    (GradientShortCircuit, {"mask_ratio": 0.2, "score": "msp"}),
    (PrototypeFusion, {"layers": "last_2"}),
    (PrototypeFusion, {"layers": "stage3,stage1"}),
]


@pytest.fixture
def net() -> nn.Module:
    return tiny_suite.network()


@pytest.fixture
def x() -> Tensor:
    return tiny_suite.images(60, 3, 5)


def fitted(kind: type[Detector], net: nn.Module, x: Tensor, **options: Any) -> Detector:
    return kind(net, **options).fit([(x, torch.arange(60) % tiny_suite.CLASSES)], val=x)


@pytest.mark.parametrize(("kind", "options"), DETECTORS)
def test_round_trip(
    kind: type[Detector], options: dict[str, Any], net: nn.Module, x: Tensor, tmp_path: Path, caplog: Any
) -> None:
    detector = fitted(kind, net, x, **options)
    detector.save(tmp_path / "folder/detector.safetensors")
    caplog.clear()
    again = kind.load(str(tmp_path / "folder/detector.safetensors"), nn.DataParallel(tiny_suite.network()))
    assert caplog.text == ""
    assert repr(again) == repr(detector) and again.threshold == detector.threshold
    for found, expected in zip(again(x[:7]), detector(x[:7]), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(again.is_ood(x), detector.is_ood(x))
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "folder/detector.safetensors").read_bytes()


def test_another_network_is_refused(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "detector.safetensors"
    fitted(GradientShortCircuit, net, x).save(file)
    for name in ("head.weight", "stage1.bn1.running_mean"):
        net = tiny_suite.network()
        net.state_dict()[name].flatten()[3].mul_(1.001)
        with pytest.raises(ValueError, match="a network of the same shape with other weights"):
            GradientShortCircuit.load(file, net)
    net = tiny_suite.network()
    with pytest.raises(ValueError, match="other weights"):
        GradientShortCircuit.load(file, net.double())
    net.head = nn.Linear(32, 9)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \[7, 32\] there and \[9, 32\] here"):
        GradientShortCircuit.load(file, net)
    del net.head
    with pytest.raises(ValueError, match=r"'head.weight' has shape \[7, 32\] there and none here"):
        GradientShortCircuit.load(file, net)


def test_a_network_that_computes_otherwise_is_warned_of(net: nn.Module, x: Tensor, tmp_path: Path, caplog: Any) -> None:
    """The same weights in another function, as another version of torch may make of them."""
    fitted(GradientShortCircuit, net, x).save(tmp_path / "d")
    with torch.no_grad():
        before = GradientShortCircuit(net)(probe := saved_probe())[1]
        net.stage3.register_forward_hook(lambda _, __, output: output * 1.01)
        after = GradientShortCircuit(net)(probe)[1]
    GradientShortCircuit.load(tmp_path / "d", net)
    size = float(((after - before) / before).abs().max())
    assert f"differ from those at saving by up to {size:.2g} of their size" in caplog.text


def saved_probe() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_other_splits_are_refused(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    """The same weights in a network that splits elsewhere: a module that is not called any more."""
    fitted(SandI, net, x).save(tmp_path / "d")
    net.stage3.bn2.forward = lambda x: nn.functional.batch_norm(x, torch.zeros(32), torch.ones(32))
    net.stage3.bn2.__class__ = type("Other", (nn.Module,), {})
    with pytest.raises(ValueError, match=r"of a detector that split the network at .*fit again"):
        SandI.load(tmp_path / "d", net)


def test_wrong_and_damaged_files(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    file, bad = tmp_path / "detector.safetensors", tmp_path / "bad.safetensors"
    fitted(PrototypeFusion, net, x).save(file)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=r"holds a PrototypeFusion: use PrototypeFusion.load, not SandI.load"):
        SandI.load(file, net)
    with pytest.raises(FileNotFoundError):
        SandI.load(tmp_path / "absent", net)
    with pytest.raises(OSError, match="directory"):
        SandI.load(tmp_path, net)
    for damaged in (b"", content[:7], content[:200], content[:-1], b"GIF89a" * 100):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            PrototypeFusion.load(bad, net)
    bad.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])  # one bit of a prototype or a score
    with pytest.raises(ValueError, match="is damaged: its content is not what was saved"):
        PrototypeFusion.load(bad, net)
    bad.write_bytes(content.replace(b"last_3", b"last_2"))
    with pytest.raises(ValueError, match="is damaged: its content is not what was saved"):
        PrototypeFusion.load(bad, net)
    save_file(load_file(file), bad)
    with pytest.raises(ValueError, match="is a safetensors file of something else"):
        PrototypeFusion.load(bad, net)
    save_file(load_file(file), bad, {"openood-sandi": json.dumps({"format": "openood-sandi detector 9"})})
    with pytest.raises(ValueError, match="says 'openood-sandi detector 9'; expected 'openood-sandi detector 1'"):
        PrototypeFusion.load(bad, net)


def test_nothing_to_save(net: nn.Module, tmp_path: Path) -> None:
    detector = SandI(net)
    with pytest.raises(RuntimeError, match="nothing to save yet: call fit first, or set threshold"):
        detector.save(tmp_path / "d")
    detector.threshold = 1.0
    with pytest.raises(RuntimeError, match="has not seen an image"):
        detector.save(tmp_path / "d")
    detector(tiny_suite.images(2, 0, 5))
    detector.save(tmp_path / "d")
    assert SandI.load(tmp_path / "d", net).threshold == 1.0


def test_what_a_file_says(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    fitted(SandI, net, x, epsilon=0.5).save(tmp_path / "d")
    about = saved.read(tmp_path / "d").about
    assert about["detector"] == "SandI" and about["options"]["epsilon"] == 0.5 and about["image"] == [3, 16, 16]
    assert about["network"]["shapes"]["head.bias"] == [7] and len(about["splits"]) == 6
    json.dumps(about)
