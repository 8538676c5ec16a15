"""``python -m openood_sandi``: fit and score folders, against the calls from Python; what it refuses."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from openood_sandi import GradientShortCircuit, SandI, folder
from openood_sandi.command import main
from openood_sandi.image_input import IMAGENET, Input
from tests.helpers import tiny_suite
from tests.helpers.places import ROOT

TRANSFORM = ["--crop", "16", "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.3", "0.4"]
FACTORY = "from tests.helpers import tiny_suite\n\ndef network():\n    return tiny_suite.TinyResNet()\n\nnothing = 3\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two folders of images, a network's file and its weights."""
    (tmp_path / "mine.py").write_text(FACTORY)
    torch.save({"state_dict": tiny_suite.network().state_dict()}, tmp_path / "weights.pt")
    for name, count, seed in (("id/a", 30, 1), ("id/b", 30, 2), ("new", 6, 3)):
        (tmp_path / name).mkdir(parents=True)
        for number, image in enumerate(tiny_suite.images(count, seed, 5)):
            pixels = (image.sigmoid() * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{number:02d}.png")
    return tmp_path


def call(place: Path, *arguments: str, network: bool = True) -> int:
    of_network = ["--network", f"{place}/mine.py:network", "--checkpoint", f"{place}/weights.pt", *TRANSFORM]
    call, *others = arguments
    return main([call, *(of_network if network else []), "--device", "cpu", *others])


def transform(image: Any) -> Tensor:
    pixels = torch.tensor(np.asarray(image) / 255, dtype=torch.float32)
    return ((pixels - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])).permute(2, 0, 1)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_fit_and_score(place: Path) -> None:
    out, table = f"{place}/d.safetensors", place / "tables/new.csv"
    options = ["--method", "gsc", "--option", "mask_ratio=0.1", "--tpr", "0.9"]
    assert call(place, "fit", f"{place}/id", "--out", out, *options) == 0
    assert call(place, "score", f"{place}/new", "--detector", out, "--csv", str(table)) == 0

    detector = GradientShortCircuit(tiny_suite.network(), mask_ratio=0.1)
    detector.fit(folder(place / "id", transform), tpr=0.9)
    expected = detector.score(folder(place / "new", transform), progress=False)
    found = rows(table)
    assert [row["file"] for row in found] == [f"{place}/new/{number:02d}.png" for number in range(6)]
    assert [int(row["class"]) for row in found] == expected.pred.tolist()
    np.testing.assert_allclose([float(row["score"]) for row in found], expected.score, rtol=1e-5)
    assert [row["ood"] == "OOD" for row in found] == expected.ood.tolist()


def test_prototypes_and_safetensors_and_val(place: Path, capsys: Any) -> None:
    save_file(tiny_suite.network().state_dict(), place / "weights.safetensors")
    network = ["--network", f"{place}/mine.py:network", "--checkpoint", f"{place}/weights.safetensors", *TRANSFORM]
    out = f"{place}/d.safetensors"
    fit = ["fit", f"{place}/id", "--val", f"{place}/new", "--method", "prototype_fusion", "--option", "layers=last_2"]
    assert main([*fit, "--out", out, *network]) == 0
    assert "prototypes={stage1: (2, 8), stage2: (2, 16), stage3: (2, 32)}" in capsys.readouterr().err
    assert main(["score", f"{place}/new", "--detector", out, *network]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "file,class,score,ood" and len(printed.out.splitlines()) == 7
    assert "0 of 6 images are OOD" in printed.err  # the threshold is the largest of these


def test_id_images_lost_are_told_beside_what_is_promised(place: Path, capsys: Any) -> None:
    out, test = f"{place}/d.safetensors", place / "test"
    test.mkdir()
    for file in [*sorted((place / "id/a").iterdir())[:8], *sorted((place / "new").iterdir())[:2]]:
        (test / f"{file.parent.name}{file.name}").write_bytes(file.read_bytes())
    fit = ["fit", f"{place}/id", "--method", "gsc", "--tpr", "0.8", "--out", out]
    assert call(place, *fit) == 0
    assert "ID images" not in capsys.readouterr().err
    assert call(place, *fit, "--test", f"{test}") == 0
    detector = GradientShortCircuit(tiny_suite.network()).fit(folder(place / "id", transform), tpr=0.8)
    lost = int(detector.score(folder(test, transform), progress=False).ood.sum())
    assert 0 < lost < 10
    told = f"{lost} of 10 ID images are taken for OOD: {lost}0.0% lost, where the threshold promises 20.0%"
    assert told in capsys.readouterr().err
    assert call(place, "score", f"{test}", "--detector", out, "--id", "--csv", f"{place}/t.csv") == 0
    assert told in capsys.readouterr().err
    assert call(place, "score", f"{test}", "--detector", out, "--csv", f"{place}/t.csv") == 0
    assert capsys.readouterr().err.strip().endswith(f"{lost} of 10 images are OOD")


def test_unreadable_files_stop_or_are_skipped_by_name(place: Path, capsys: Any, caplog: Any) -> None:
    out, table = f"{place}/d.safetensors", place / "new.csv"
    for name in ("id/a/07.png", "new/02.png"):
        (place / name).write_bytes((place / name).read_bytes()[:50])
    fit = ["fit", f"{place}/id", "--method", "gsc", "--out", out]
    score = ["score", f"{place}/new", "--detector", out, "--csv", str(table)]
    assert call(place, *fit) == 2 and "07.png" in capsys.readouterr().err
    assert call(place, *fit, "--unreadable", "skip") == 0
    assert "1 of 60 images cannot be read and were left out" in caplog.text and "07.png" in caplog.text
    assert call(place, *score) == 2 and "02.png" in capsys.readouterr().err
    assert call(place, *score, "--unreadable", "skip") == 0 and "02.png" in caplog.text
    assert [Path(row["file"]).name for row in rows(table)] == ["00.png", "01.png", "03.png", "04.png", "05.png"]


def test_heat_maps(place: Path, capsys: Any) -> None:
    out = f"{place}/d.safetensors"
    assert call(place, "fit", f"{place}/id", "--out", out, "--option", "steps=1") == 0
    assert call(place, "score", f"{place}/new", "--detector", out, "--heat-maps", f"{place}/maps") == 0
    assert sorted(file.name for file in (place / "maps").iterdir()) == [f"{number:02d}.png.png" for number in range(6)]
    detector = SandI(tiny_suite.network(), steps=1)
    image = transform(Image.open(place / "new/04.png"))
    maps = detector.explain(image[None])
    resized = [torch.nn.functional.interpolate(m.abs()[:, None], size=(16, 16), mode="bilinear") for m in maps.values()]
    total = sum(magnitude / magnitude.max() for magnitude in resized)[0, 0]
    found = np.asarray(Image.open(place / "maps/04.png.png"))
    np.testing.assert_allclose(found, (total / total.max() * 255).detach().numpy(), atol=1.1)

    assert call(place, "fit", f"{place}/id", "--method", "gsc", "--out", out) == 0
    assert call(place, "score", f"{place}/new", "--detector", out, "--heat-maps", f"{place}/maps") == 2
    assert "--heat-maps: a GradientShortCircuit has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "ID", "--out", "D", "--method", "sandy"], "no detector is called 'sandy'; there are sandi, "),
        (["fit", "ID", "--out", "D", "--option", "stepz=2"], "--option stepz=2: expected NAME=VALUE with NAME one of"),
        (["fit", "ID", "--out", "D", "--option", "steps"], "--option steps: expected NAME=VALUE"),
        (["fit", "ID", "--out", "D", "--option", "steps=two"], "steps='two': expected a whole number"),
        (["fit", "ID", "--out", "D", "--option", "splitting=no"], "splitting='no': expected True or False"),
        (["fit", "ID", "--out", "D", "--tpr", "2"], "tpr=2.0: expected a share"),
        (["fit", "ID/absent", "--out", "D"], "is no folder; expected one with images"),
        (["fit", "ID"], "the following arguments are required: --out"),
        (["score", "ID", "--detector", "absent"], "No such file"),
        (["score", "ID", "--detector", "mine.py"], "damaged"),
        (["look", "ID"], "invalid choice: 'look'"),
    ],
)
def test_what_is_refused(
    place: Path, arguments: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert call(place, *(argument.replace("ID", "id") for argument in arguments)) == 2
    error, usage = capsys.readouterr().err.strip().split("\nusage: ")
    assert message in error and "\n" not in usage


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (["--network", "resnet18"], "expected torchvision:NAME, timm:NAME, openood:NAME, hf:DIR or FILE.py:FACTORY"),
        (["--network", "torchvision:resnet18"], "needs --checkpoint FILE"),
        (["--network", "torchvision:resnet9000", "--checkpoint", "weights.pt"], "no classifier 'resnet9000'"),
        (["--network", "timm:resnet9000", "--checkpoint", "weights.pt"], "timm has no network 'resnet9000'"),
        (["--network", "torchvision:resnet18", "--checkpoint", "weights.pt"], "do not fit the network"),
        (["--network", "torchvision:resnet18", "--checkpoint", "absent.pt"], "absent.pt does not exist"),
        (["--network", "absent.py:network"], "absent.py; --network FILE.py:FACTORY names a Python file"),
        (["--network", "mine.py:net"], "has no function 'net'"),
        (["--network", "mine.py:nothing"], "has no function 'nothing'"),
        (["--network", "mine.py:network"], "give --resize, --crop, --mean, --std"),
    ],
)
def test_networks_that_are_refused(
    place: Path, network: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert call(place, "fit", "id", "--out", "d", *network, network=False) == 2
    assert message in capsys.readouterr().err


def test_another_transform_is_refused(place: Path, capsys: Any) -> None:
    out = f"{place}/d.safetensors"
    assert call(place, "fit", f"{place}/id", "--method", "gsc", "--out", out) == 0
    assert call(place, "score", f"{place}/new", "--detector", out, "--mean", "0", "0", "0") == 2
    assert "give the same --resize, --crop, --mean and --std" in capsys.readouterr().err


def test_a_network_of_torchvisions_with_other_classes(place: Path) -> None:
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = resnet18(num_classes=5).eval()
    torch.save(net.state_dict(), place / "r18.pt")
    network = ["--network", "torchvision:resnet18", "--checkpoint", f"{place}/r18.pt", "--resize", "40", "--crop", "32"]
    out, table = f"{place}/d.safetensors", place / "t.csv"
    assert call(place, "fit", f"{place}/new", "--method", "gsc", "--out", out, *network, network=False) == 0
    arguments = ["score", f"{place}/new", "--detector", out, "--csv", str(table)]
    assert call(place, *arguments, *network, network=False) == 0
    imagenet = Input(40, 32, IMAGENET)
    expected = GradientShortCircuit(net).score(folder(place / "new", imagenet), progress=False)
    np.testing.assert_allclose([float(row["score"]) for row in rows(table)], expected.score, rtol=1e-4)


def test_the_transform_is_torchvisions() -> None:
    from torchvision import transforms

    rng = np.random.default_rng(0)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    stages = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(mean, std)]
    for size in ((64, 64), (50, 91, 3), (33, 20)):
        image = Image.fromarray(rng.integers(0, 256, (*size[:2], 3), dtype=np.uint8))
        found, expected = Input(40, 32, (mean, std))(image), transforms.Compose(stages)(image)
        assert found.shape == (3, 32, 32)
        torch.testing.assert_close(found, expected)


def test_as_a_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "openood_sandi", "fit"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and run.stderr.startswith("openood-sandi: error: the following arguments are required")
    assert "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 2
