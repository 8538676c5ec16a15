"""``cache_dir`` and ``unreadable`` with OpenOOD's own data sets."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from openood_sandi.runs.score import score_dataset
from openood_sandi.runs.unreadable import UnreadableImage
from tests.helpers import tiny
from tests.helpers.loaders import as_bytes
from tests.plugin.test_evaluator import config

LINES = [f"cifar10/test/{number}.png -1\n" for number in range(tiny.IMAGES)] + [
    f"svhn/test/{number}.png {number}\n" for number in range(tiny.IMAGES)
]


#: Batches that are scored again where all are known: the first, and one drawn at random.
CANARY = 2


def replace_pixels(file: Path) -> None:
    """Another image of as many bytes, with the same dates as far as they can be set."""
    before = file.stat()
    with Image.open(file) as image:
        pixels, mode = 255 - np.asarray(image), image.mode
    Image.fromarray(pixels, mode).save(file)
    content = file.read_bytes()
    file.write_bytes(content.ljust(before.st_size, b"\0")[: max(before.st_size, len(content))])


@pytest.fixture
def folder(checkout: Path, tmp_path: Path) -> Path:
    """Images of two sets, and their list, that a test may damage."""
    for line in LINES:
        name = line.split()[0]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((checkout / "data/images_classic" / name).read_bytes())
    (tmp_path / "list.txt").write_text("".join(LINES))
    return tmp_path


def loader(folder: Path, batch_size: int = 1) -> DataLoader[Any]:
    from openood.datasets.imglist_dataset import ImglistDataset
    from openood.evaluation_api.preprocessor import get_default_preprocessor

    preprocessor = get_default_preprocessor("cifar100")
    dataset = ImglistDataset("mixed", str(folder / "list.txt"), str(folder), 100, preprocessor, preprocessor)
    return DataLoader(dataset, batch_size=batch_size)


def score(folder: Path, monkeypatch: pytest.MonkeyPatch, net: Any = None, **options: Any) -> tuple[Any, int]:
    """Results of GAIA, and how many batches its detector saw."""
    from openood_sandi import postprocessor

    seen = []

    def counting(scorer: Any, *args: Any, **kwargs: Any) -> Any:
        return score_dataset(lambda images: seen.append(len(images)) or scorer(images), *args, **kwargs)

    monkeypatch.setattr(postprocessor, "score_dataset", counting)
    batch_size = options.pop("batch_size", 1)
    gaia = postprocessor.GAIAPostprocessor(config(options.pop("checkout"), "gaia", splits="last_stage", **options))
    return gaia.inference(net or tiny.network(), loader(folder, batch_size), progress=False), len(seen)


@pytest.mark.slow
def test_what_decides_scores_decides_what_is_scored_again(
    checkout: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def again(net: Any = None, **options: Any) -> tuple[Any, int]:
        caplog.clear()
        options = {"checkout": checkout, "cache_dir": str(folder / "cache"), **options}
        return score(folder, monkeypatch, net, **options)

    plain, _ = score(folder, monkeypatch, checkout=checkout)
    first, count = again()
    assert as_bytes(first) == as_bytes(plain) and count == len(LINES)
    second, count = again()
    assert as_bytes(second) == as_bytes(plain) and count <= CANARY

    other = tiny.network()
    with torch.no_grad():
        other.fc.bias[0] += 1
    assert again(other)[1] == len(LINES) and "has other network" in caplog.text
    assert again(attribution="cross_entropy")[1] == len(LINES) and "has other" not in caplog.text
    assert again(batch_size=2)[1] == len(LINES) / 2 and "has other order" in caplog.text
    image = folder / "svhn/test/1.png"
    stat, content = image.stat(), image.read_bytes()
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert again()[1] <= CANARY  # another time, the same image
    replace_pixels(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other_image, count = again()
    assert 1 <= count <= 1 + CANARY and as_bytes(other_image) != as_bytes(plain)
    image.write_bytes(content)
    back, count = again()
    assert count <= CANARY and as_bytes(back) == as_bytes(plain)


def test_data_that_cannot_be_told_apart_are_not_cached(
    checkout: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from openood_sandi.postprocessor import GAIAPostprocessor

    batches = [{"data": tiny.read_images(checkout, "svhn"), "label": torch.zeros(tiny.IMAGES)}]
    gaia = GAIAPostprocessor(config(checkout, "gaia", cache_dir=str(folder / "cache")))
    assert len(gaia.inference(tiny.network(), batches, progress=False)[0]) == tiny.IMAGES
    assert "left unused: the images of a list cannot be told from others" in caplog.text
    assert not (folder / "cache").exists()


@pytest.mark.slow
def test_unreadable_images(
    checkout: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = score(folder, monkeypatch, checkout=checkout)
    image = folder / "svhn/test/0.png"
    image.write_bytes(image.read_bytes()[:-200])
    options = {"checkout": checkout, "cache_dir": str(folder / "cache")}
    with pytest.raises(UnreadableImage, match=r"svhn/test/0\.png.*line 3 of its list.*set unreadable to 'skip'"):
        score(folder, monkeypatch, **options)
    for scored in ([len(LINES) - 1], range(CANARY + 1)):  # at once, and with nothing left to do
        caplog.clear()
        found, count = score(folder, monkeypatch, **options, unreadable="skip")
        assert as_bytes(found) == as_bytes(np.delete(column, 2) for column in expected) and count in scored
        (record,) = (folder / "cache").glob("*.tsv")
        assert str(image) in record.read_text() and str(image) in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unreadable": "ignore"}, "gaia: unreadable='ignore': expected one of 'stop', 'skip'"),
        ({"cache_dir": 3}, "gaia: cache_dir=3: expected a string"),
        ({"cachedir": "x"}, "no option 'cachedir'. Did you mean: cache_dir"),
    ],
)
def test_wrong_options_are_refused(checkout: Path, options: dict[str, Any], message: str) -> None:
    from openood_sandi.postprocessor import GAIAPostprocessor

    with pytest.raises(ValueError) as caught:
        GAIAPostprocessor(config(checkout, "gaia", **options))
    assert message in str(caught.value)
