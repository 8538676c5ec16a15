"""OpenOOD's own data set with images and lines that cannot be read: named, then an end or a gap, no stand-in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import DataLoader

from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import score_dataset
from openood_sandi.runs.unreadable import Readable, UnreadableImage, WrongLabel, name_of

COUNT, BAD = 7, 4


def truncate(file: Path, line: str) -> str:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return line


def overwrite(file: Path, line: str) -> str:
    file.write_bytes(b"this is no image")
    return line


def empty(file: Path, line: str) -> str:
    file.write_bytes(b"")
    return line


def remove(file: Path, line: str) -> str:
    file.unlink()
    return line


#: What is done to image 4 and its line in the list.
DAMAGES: dict[str, Callable[[Path, str], str]] = {
    "truncated": truncate,
    "not an image": overwrite,
    "empty": empty,
    "missing": remove,
}
#: What is done to the line alone.
WRONG_LABELS: dict[str, Callable[[Path, str], str]] = {
    "no label": lambda file, line: line.split()[0],
    "label not a number": lambda file, line: line.split()[0] + " cat",
    "label out of range": lambda file, line: line.split()[0] + " 1000000",
    "blank line": lambda file, line: "",
}


@pytest.fixture
def damaged(checkout: Path, tmp_path: Path) -> Callable[..., Any]:
    """A data set of OpenOOD's with 7 images, to one of which something has happened."""
    from openood.datasets.imglist_dataset import ImglistDataset
    from torchvision.transforms.functional import to_tensor

    def make(damage: Callable[[Path, str], str], suffix: str = "png", **options: Any) -> Any:
        lines = []
        for number in range(COUNT):
            file = tmp_path / f"{number}.{suffix}"
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
            line = f"{file.name} {number}"
            lines.append(damage(file, line) if number == BAD else line)
        (tmp_path / "list.txt").write_text("".join(line + "\n" for line in lines))
        transform = lambda image: to_tensor(image)  # noqa: E731
        return ImglistDataset("test", str(tmp_path / "list.txt"), str(tmp_path), 10, transform, transform, **options)

    return make


def score(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.argmax(1)[:, 0, 0], images.mean((1, 2, 3))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_stop_names_the_image(damaged: Callable[..., Any], damage: Callable[..., Any], suffix: str) -> None:
    loader = DataLoader(damaged(damage, suffix), batch_size=3)
    with pytest.raises(UnreadableImage, match=rf"{BAD}.{suffix}.*line {BAD + 1} of its list.*'skip'"):
        score_dataset(score, loader, "cpu", progress=False)
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "OpenOOD's setting is its own"


@pytest.mark.parametrize("damage", WRONG_LABELS.values(), ids=WRONG_LABELS)
@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_a_wrong_label_is_no_unreadable_image(damaged: Callable[..., Any], damage: Any, unreadable: str) -> None:
    with pytest.raises(
        WrongLabel, match=rf"line {BAD + 1} of its list.*expected a class, 0 to 9, or -1.*mend the list"
    ):
        score_dataset(score, DataLoader(damaged(damage), 3), "cpu", progress=False, unreadable=unreadable)


@pytest.mark.parametrize(
    "damage, workers",
    [*((damage, 0) for damage in DAMAGES.values()), (truncate, 2)],
    ids=[*DAMAGES, "truncated, seen by another process"],
)
def test_skip_leaves_it_out_and_records_it(
    damaged: Callable[..., Any],
    damage: Callable[..., Any],
    workers: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = score_dataset(score, DataLoader(damaged(lambda file, line: line), batch_size=3), "cpu", progress=False)
    loader = DataLoader(damaged(damage), batch_size=3, num_workers=workers)
    cache = ScoreCache(tmp_path / "cache")
    caplog.set_level(logging.WARNING, "openood_sandi")
    kept = [number for number in range(COUNT) if number != BAD]
    for _ in range(2):  # the second time from the cache
        found = score_dataset(
            score, loader, "cpu", progress=False, unreadable="skip", cache=cache, key={"what": "test"}
        )
        for ours, all_of_them in zip(found, good, strict=True):
            assert np.array_equal(ours, all_of_them[kept])
    told = [record.getMessage() for record in caplog.records if record.name.startswith("openood_sandi")]
    assert len(told) == 2 and all("1 of 7 images" in text and f"line {BAD + 1} of its list" in text for text in told)
    (record,) = (tmp_path / "cache").rglob("*unreadable.tsv")
    assert record.read_text().startswith(f"{BAD}\t") and record.read_text().count("\n") == 1


def test_no_other_image_stands_in(damaged: Callable[..., Any]) -> None:
    """A data set that would itself take the next image, and one that would fill the missing half with grey."""
    broken = damaged(overwrite, skip_broken=True)
    assert broken[BAD]["index"] != BAD, "this is what OpenOOD would do"
    with pytest.raises(UnreadableImage):
        Readable(broken)[BAD]
    assert broken.skip_broken
    halved = damaged(truncate)
    halved[BAD]  # OpenOOD scores what is left of it
    with pytest.raises(UnreadableImage, match="truncated"):
        Readable(halved)[BAD]


def test_an_image_without_a_score_is_named(damaged: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    def no_score_for_5(images: Tensor) -> tuple[Tensor, Tensor]:
        pred, values = score(images)
        return pred, values.masked_fill(values == expected[5], float("nan"))

    expected = torch.from_numpy(score_dataset(score, DataLoader(damaged(remove), 1), "cpu", unreadable="skip")[1])
    expected = torch.cat([expected[:BAD], torch.zeros(1), expected[BAD:]])
    caplog.clear()
    scores = score_dataset(no_score_for_5, DataLoader(damaged(remove), 3), "cpu", progress=False, unreadable="skip")[1]
    assert np.isnan(scores).tolist() == [False] * 4 + [True, False]
    (told,) = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert "1 of 6 images" in told and "5.png" in told and "line 6 of its list" in told


def test_a_set_of_nothing_but_unreadable_images(damaged: Callable[..., Any]) -> None:
    data = damaged(remove)
    data.data_dir = "/nowhere"
    with pytest.raises(UnreadableImage, match=r"none of the 7 images.*/nowhere/0\.png"):
        score_dataset(score, DataLoader(data, batch_size=3), "cpu", progress=False, unreadable="skip")


def test_trouble_of_the_machine_is_not_a_bad_image() -> None:
    class Exhausted(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many"):
        Readable(Exhausted(), "skip")[0]


def test_names_reach_through_subsets(damaged: Callable[..., Any]) -> None:
    data = torch.utils.data.Subset(damaged(remove), [5, BAD])
    assert f"{BAD}.png" in name_of(data, 1)
    listed: Any = torch.utils.data.TensorDataset(torch.zeros(2))
    listed.files = [Path("a.png"), Path("b.png")]
    assert name_of(Readable(listed), 1) == "image 'b.png'"
    with pytest.raises(ValueError, match="unreadable='ignore'"):
        Readable(data, "ignore")
