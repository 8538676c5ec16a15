"""The comparison's images in folders of people's own: their classes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

for module in ("matplotlib", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[test]"')


from comparison import sources
from comparison.suite import Suite
from networks import SourceError

from tests.benchmarks.test_sources import load, names, write


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog", "emu")):
        write(tmp_path / f"animals/{name}/a.png", number)
        write(tmp_path / f"animals/{name}/b.JPG", 10 + number)
    (tmp_path / "animals/cat/notes.txt").write_text("no image")
    (tmp_path / "animals/cat/._a.png").write_text("what macOS leaves")
    write(tmp_path / "elsewhere/deep/a.png", 20)
    (tmp_path / "things").mkdir()
    (tmp_path / "things/link").symlink_to(tmp_path / "elsewhere")
    return tmp_path


def from_folders(pictures: Path, *arguments: str) -> Suite:
    return load(
        *("--data", "folders", "--id", str(pictures / "animals"), "--ood", f"things={pictures / 'things'}"),
        *("--network", "resnet20", "--checkpoint", "random", *arguments),
    )


def test_folders_of_images(pictures: Path) -> None:
    suite = from_folders(pictures)
    assert suite.classes == 3 and suite.network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    _, labels = next(iter(suite.in_distribution.loader(10)))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert names((suite.in_distribution, *suite.out_of_distribution)) == [("animals", "ID"), ("things", "far")]
    assert suite.training is None and suite.validation is None and len(suite.missing) == 2
    assert "ImageFolder" in suite.notes[0] and "1 .txt" in suite.notes[1]


def test_numbered_folders_are_some_of_the_networks_classes(pictures: Path) -> None:
    net = sources.catalogue.ARCHITECTURES["resnet20"].make(8)
    torch.save(net.state_dict(), pictures / "eight.pt")
    with pytest.raises(SourceError, match="has 8 classes and the ID data 3"):
        from_folders(pictures, "--checkpoint", str(pictures / "eight.pt"))
    for name, number in (("cat", "5"), ("dog", "0"), ("emu", "7")):
        (pictures / "animals" / name).rename(pictures / "animals" / number)
    suite = from_folders(pictures, "--checkpoint", str(pictures / "eight.pt"))
    _, labels = next(iter(suite.in_distribution.loader(10)))
    assert suite.classes == 8 and sorted(labels.tolist()) == [0, 0, 5, 5, 7, 7]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--id", "nowhere"], "nowhere is no folder"),
        (["--id", "elsewhere/deep"], "has 0 subfolders"),
        (["--ood", "animals=things"], "called as the ID set"),
        (["--ood", "things=things", "things=animals"], "things more than once"),
        (["--ood", "none=animals/cat/empty"], "none: .*empty is no folder"),
        (["--ood", "tin"], "needs NAME=DIR"),
        (["--network", "resnet18_32x32"], "--mean and --std"),
        (["--mean", "0", "0", "0"], "--mean and --std go together"),
    ],
)
def test_wrong_folders_are_refused(
    pictures: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    with pytest.raises(SourceError, match=message):
        from_folders(pictures, *arguments)
