"""Folders of pictures as people have them, and pictures of every depth."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openood_sandi import folder
from openood_sandi.runs import pictures
from openood_sandi.runs.loaders import Folder
from openood_sandi.runs.unreadable import UnreadableImage


def pixels(image: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def picture(path: Path, mode: str = "RGB", colour: Any = 77) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), colour).save(path)


def test_what_systems_leave_is_no_picture_and_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/1.PNG", "Ünïcode/2.jpeg", "cat/.hidden.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png"):
        picture(tmp_path / name)
    (tmp_path / "cat/like.png").mkdir()  # a folder
    (tmp_path / "cat/labels.txt").write_text("no picture")
    found = Folder(tmp_path, pixels)
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == ["cat/1.PNG", "Ünïcode/2.jpeg"]
    assert found.classes == ["cat", "Ünïcode"] and found.labels == [0, 1]
    assert "left out, as they are no images: 1 .txt" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are made here as POSIX does it")
def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    picture(tmp_path / "there/a.png")
    (tmp_path / "here/b").mkdir(parents=True)
    (tmp_path / "here/b/linked").symlink_to(tmp_path / "there")
    (tmp_path / "here/b/circle").symlink_to(tmp_path / "here")
    assert pictures.below(tmp_path / "here") == (["b/linked/a.png"], Counter())


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are made here as POSIX does it")
@pytest.mark.parametrize("kind", ["a pipe", "No such file"])
def test_what_is_called_as_a_picture_and_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    picture(tmp_path / "a.png")
    if kind == "a pipe":
        os.mkfifo(tmp_path / "b.png")
    else:
        (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    from openood_sandi.runs.score import score_dataset

    with pytest.raises(UnreadableImage, match=rf"b\.png.* cannot be read \(.*{kind}"):
        score_dataset(lambda x: (x[:, 0, 0, 0], x[:, 0, 0, 0]), folder(tmp_path, pixels), "cpu", progress=False)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("I;16", 30_000, 30_000 * 255 / 65535),  # Pillow alone would say 255
        ("F", 0.25, 0.25 * 255),
        ("L", 77, 77),
        ("1", 1, 255),
        ("LA", (77, 0), 77),
        ("RGBA", (77, 77, 77, 3), 77),
        ("CMYK", (178, 178, 178, 0), 77),
        ("P", 3, None),
    ],
)
def test_pixels_of_every_mode(mode: str, colour: Any, expected: float | None) -> None:
    image = Image.new(mode, (2, 2), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [77, 77, 77])
    found = np.asarray(pictures.rgb(image))
    assert found.shape == (2, 2, 3)
    np.testing.assert_allclose(found, 77 if expected is None else expected, atol=1)
