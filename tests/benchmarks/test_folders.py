"""Files and folders as people have them: damaged, deep, turned, hidden; classes and splits; networks of their own."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

for module in ("matplotlib", "pandas", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


import pandas as pd
import side_by_side
from comparison import folders, reading, sources
from comparison.suite import Suite
from networks import SourceError, catalogue

from openood_sandi.runs import contents


def picture(path: Path, seed: int, size: int = 32, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path, **options)


def load(*arguments: str) -> Suite:
    parser = argparse.ArgumentParser()
    sources.add_arguments(parser)
    return sources.load(parser.parse_args(["--data", "folders", *arguments]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog", "emu")):
        for image in range(4):
            picture(tmp_path / "id" / name / f"{image}.png", 10 * number + image)
            picture(tmp_path / "train" / name / f"{image}.png", 100 + 10 * number + image)
    for image in range(4):
        picture(tmp_path / "ood" / f"{image}.jpg", 50 + image, 120, quality=95)
    return tmp_path


def arguments(data: Path) -> list[str]:
    sets = ["--id", str(data / "id"), "--ood", f"things={data / 'ood'}"]
    return [*sets, "--network", "resnet20", "--checkpoint", "random"]


# ---------------------------------------------------------------- files


def test_deep_pixels_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    kinds: dict[str, Any] = {
        "16.png": (ramp * 65535).astype(np.uint16),
        "32.tif": (ramp * 65535).astype(np.int32),
        "unit.tif": ramp.astype(np.float32),
        "byte.tif": (ramp * 255).astype(np.float32),
    }
    for name, pixels in kinds.items():
        Image.fromarray(pixels).save(tmp_path / name)
        image, damage = reading.AS_OPENOOD.read(tmp_path / name)
        assert damage is None and image.mode == "RGB"
        assert np.abs(np.asarray(image)[..., 1] - 255 * ramp).max() <= 1, name


def test_pixels_that_are_no_numbers_are_damage(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)).save(tmp_path / "nan.tif")
    assert "NaN" in str(reading.AS_OPENOOD.read(tmp_path / "nan.tif")[1])


def test_a_picture_is_turned_only_when_asked_to(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    picture(tmp_path / "a.png", 1, exif=tags)
    stored = np.asarray(reading.AS_OPENOOD.read(tmp_path / "a.png")[0])
    turned = np.asarray(reading.Reading(exif=True).read(tmp_path / "a.png")[0])
    assert np.array_equal(np.rot90(stored, -1), turned)


def test_trouble_that_may_pass_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", 1)

    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", failing)
    for policy in reading.POLICIES:
        with pytest.raises(OSError, match="Input/output"):
            reading.Reading(policy).read(tmp_path / "a.png")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_file_that_its_disk_does_not_give_is_skipped_and_read_again(
    number: int, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(call: Any) -> Any:
        def failing(path: Any, *rest: Any) -> Any:
            if str(path) == str(data / "ood/2.jpg"):
                raise OSError(number, os.strerror(number))
            return call(path, *rest)

        return failing

    def images(policy: str) -> set[int]:
        side_by_side.main(
            [
                *("--data", "folders", *arguments(data), "--methods", "msp", "--workers", "0", "--no-cost"),
                *("--no-pictures", "--cache", str(data / "cache"), "--out", str(data / "out"), "--unreadable", policy),
            ]
        )
        return set(pd.read_csv(data / "out/results.csv")["images"])

    with monkeypatch.context() as patch:
        patch.setattr(contents, "look", fails(contents.look))
        patch.setattr(Image, "open", fails(Image.open))
        for _ in range(2):
            assert images("skip") == {3}
            assert "1 of 4 images are damaged, left out: 2.jpg" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            images("stop")
        assert os.strerror(number) in capsys.readouterr().err
    assert images("skip") == {4}, "it was read again"


DAMAGES = {"cut": lambda raw: raw[: len(raw) // 2], "garbage": lambda raw: b"no image", "empty": lambda raw: b""}
#: Of the places, damages and policies any two come together once; an end and a gap are among the quick ones.
DAMAGED = [
    ("ood/2.jpg", "cut", "skip"),
    ("ood/2.jpg", "empty", "stop"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("ood/2.jpg", "garbage", "grey"),
            ("id/dog/1.png", "cut", "grey"),
            ("id/dog/1.png", "garbage", "stop"),
            ("id/dog/1.png", "empty", "skip"),
            ("train/cat/3.png", "cut", "stop"),
            ("train/cat/3.png", "garbage", "skip"),
            ("train/cat/3.png", "empty", "grey"),
        )
    ),
]


@pytest.mark.parametrize("where, damage, policy", DAMAGED)
def test_one_damaged_file_costs_no_method(
    data: Path, where: str, damage: str, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / where).write_bytes(DAMAGES[damage]((data / where).read_bytes()))
    chosen = ["msp", "react", "nci", "prototype_fusion", "sandi-z"]
    run = [
        *("--data", "folders", *arguments(data), "--train", str(data / "train"), "--val", str(data / "train")),
        *("--methods", *chosen, "--workers", "0", "--batch-size", "3", "--no-cost", "--no-pictures"),
        *("--cache", str(data / "cache"), "--out", str(data / "out"), "--unreadable", policy),
    ]
    if policy == "stop":
        with pytest.raises(SystemExit):
            side_by_side.main(run)
        assert Path(where).name in capsys.readouterr().err
        return
    assert side_by_side.main(run) == 0
    frame = pd.read_csv(data / "out/results.csv")
    assert set(frame["method"]) == set(chosen)
    assert set(frame["images"]) == ({3} if policy == "skip" and where.startswith("ood") else {4})
    record = json.loads((data / "out/results.json").read_text())
    named = [note for note in record["notes"] if "damaged" in note]
    scored = not where.startswith("train")
    assert len(named) == scored and all(Path(where).name in note and "1 of" in note for note in named)
    assert all(note in capsys.readouterr().out for note in named)
    counts = {images["name"]: images["images"] for images in record["sets"]}
    assert counts["id"] == (11 if policy == "skip" and where.startswith("id") else 12)


# ---------------------------------------------------------------- folders


def test_what_systems_leave_is_no_image_and_no_class(data: Path) -> None:
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        picture(data / "id" / folder / "0.png", 7)
        picture(data / "ood" / folder / "0.png", 7)
    assert folders.classes_of(data / "id") == ["cat", "dog", "emu"]
    assert len(load(*arguments(data)).out_of_distribution[0]) == 4


def test_files_of_other_kinds_are_counted_aloud(data: Path) -> None:
    for name in ("a.heic", "b.HEIC", "c"):
        (data / "ood" / name).write_text("")
    notes = load(*arguments(data)).notes
    assert any("left out: 1 without suffix, 2 .heic" in note for note in notes)


def test_links_in_circles_end(data: Path) -> None:
    (data / "ood/again").symlink_to(data / "ood")
    assert len(load(*arguments(data)).out_of_distribution[0]) == 4


@pytest.mark.parametrize(
    ("names", "classes", "numbers"),
    [
        (["0", "1", "10", "2"], 11, [0, 1, 10, 2]),
        (["1", "10", "2", "3"], 4, [0, 1, 2, 3]),  # "10" is no index of 4 classes
        (["cat", "dog"], 2, [0, 1]),
        (["0", "00"], 2, [0, 1]),  # one number twice
    ],
)
def test_classes_are_numbered_as_by_image_folder_unless_named_by_indices(
    names: list[str], classes: int, numbers: list[int]
) -> None:
    found, said = folders.numbered(names, classes)
    assert list(found.values()) == numbers
    assert ("indices" in said) != ("ImageFolder" in said)


@pytest.mark.parametrize(("names", "classes"), [(["cat", "dog"], 3), (["0", "3"], 3)])
def test_classes_that_are_not_the_networks_are_refused(names: list[str], classes: int) -> None:
    with pytest.raises(SourceError, match="3 classes and the ID data 2"):
        folders.numbered(names, classes)


def test_classes_are_those_of_the_training_images(data: Path) -> None:
    (data / "id/cat").rename(data / "cat")
    suite = load(*arguments(data), "--train", str(data / "train"))
    assert suite.classes == 3 and suite.in_distribution.dataset.labels.unique().tolist() == [1, 2]  # type: ignore[attr-defined]
    (data / "cat").rename(data / "id/ape")
    with pytest.raises(SourceError, match=r"--id .* has the class 'ape'"):
        load(*arguments(data), "--train", str(data / "train"))


def test_a_split_shares_no_image_and_misses_no_class(data: Path) -> None:
    suite = load(*arguments(data), "--split", "0.5", "0.25")
    assert suite.training and suite.validation
    parts = (suite.training, suite.validation[0], suite.in_distribution)
    assert [len(part) for part in parts] == [6, 3, 3]
    names = [set(part.names) for part in parts]
    assert len(set.union(*names)) == 12 and all(
        {n.split("/")[0] for n in part} == {"cat", "dog", "emu"} for part in names
    )
    again = load(*arguments(data), "--split", "0.5", "0.25")
    assert again.in_distribution.names == suite.in_distribution.names
    assert len({part.fingerprint for part in parts}) == 3
    for wrong in (["0.9"], ["0.5", "0.2", "0.1"], ["0.5", "0.5"], ["0.7", "0.2"]):
        with pytest.raises(SourceError, match="--split"):
            load(*arguments(data), "--split", *wrong)


# ---------------------------------------------------------------- networks


def test_a_factory_in_a_file(data: Path) -> None:
    (data / "layers.py").write_text("from torch import nn\nlast = nn.Linear\n")
    (data / "mine.py").write_text(
        "from torch import nn\nfrom layers import last\n"
        "def sized(classes): return nn.Sequential(nn.Flatten(), last(3 * 64, classes))\n"
        "def fixed(): return sized(5)\n"
    )
    given = [*arguments(data)[:4], "--size", "8", "8", "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    suite = load(*given, "--network", f"{data / 'mine.py'}:sized")
    assert suite.classes == 3 and "own weights" in suite.network_description
    with pytest.raises(SourceError, match="5 classes and the ID data 3"):
        load(*given, "--network", f"{data / 'mine.py'}:fixed")
    with pytest.raises(SourceError, match="no function 'none'"):
        load(*given, "--network", f"{data / 'mine.py'}:none")
    with pytest.raises(SourceError, match="does not take images of 9 pixels"):
        load(*given, "--network", f"{data / 'mine.py'}:sized", "--size", "9", "9")


def test_a_network_of_timm_takes_its_own_input(data: Path) -> None:
    pytest.importorskip("timm")
    suite = load(*arguments(data)[:4], "--network", "timm:mobilenetv3_small_050", "--checkpoint", "random")
    settings = sys.modules["timm"].get_pretrained_cfg("mobilenetv3_small_050")
    assert suite.classes == 3 and suite.normalisation == (settings.mean, settings.std)
    assert suite.in_distribution.dataset[0][0].shape == settings.input_size
    with pytest.raises(SourceError, match="Did you mean mobilenetv3_small_0"):
        catalogue.architecture("timm:mobilenetv3_small_05")


def test_a_saved_network_of_transformers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.last(x.mean((2, 3))))

    library: Any = ModuleType("transformers")
    library.AutoModelForImageClassification = SimpleNamespace(from_pretrained=lambda *_, **__: Classifier())
    monkeypatch.setitem(sys.modules, "transformers", library)
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24}, "resample": 3}
    (data / "config.json").write_text("{}")
    (data / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1] * 3}))
    suite = load(*arguments(data)[:4], "--network", f"hf:{data}")
    assert suite.classes == 3 and suite.normalisation == ((0.1,) * 3, (0.5,) * 3)
    assert suite.in_distribution.dataset[0][0].shape == (3, 24, 24)
    shape = catalogue.architecture(f"hf:{data}").input
    assert shape is not None and (shape.resize, shape.interpolation) == (40, "bicubic")
