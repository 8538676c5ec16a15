"""Images in files: other bytes are never taken for those that were scored, and the same ones always are."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openood_sandi.runs import cache, canary, contents, keys, unreadable
from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import score_dataset

COUNT = 12


class Pixels(Dataset[Any]):
    """Files of three bytes, an image of one pixel each."""

    def __init__(self, folder: Path) -> None:
        self.files = [str(folder / f"{number}.bin") for number in range(COUNT)]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        content = Path(self.files[index]).read_bytes()
        if len(content) != 3:
            raise ValueError("it is no image of three bytes")
        return torch.tensor(list(content), dtype=torch.float32).reshape(3, 1, 1), index


class Sum:
    """A scorer that counts the images it is given."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.count = factor, 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count += len(x)
        return x.flatten(1).argmax(1), x.flatten(1) @ torch.tensor([1.0, 256.0, 65536.0]) * self.factor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "images")


def written(folder: Path, plus: int = 0) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        path = folder / f"{number}.bin"
        path.write_bytes(bytes([number + plus, 7, 3 * number]))
        os.utime(path, (1e9, 1e9))
    return folder


def run(folder: Path, cache: Path, score: Any = None, **options: Any) -> Any:
    data = Pixels(folder)
    key = {"images": keys.images(data)}
    store = ScoreCache(cache, 0.0)
    return score_dataset(score or Sum(), DataLoader(data, 2), "cpu", key=key, cache=store, progress=False, **options)[1]


def expected(folder: Path) -> Any:
    return score_dataset(Sum(), DataLoader(Pixels(folder), 2), "cpu", progress=False)[1]


#: Images of the first batch and of the one that the canary draws.
CANARY = 4


def test_an_image_with_the_same_size_and_times_is_another(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "cache")
    path = folder / "5.bin"
    before = path.stat()
    path.write_bytes(b"xyz")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    score = Sum()
    assert np.array_equal(run(folder, tmp_path / "cache", score), expected(folder))
    assert score.count <= 2 + CANARY, "only the batch with it"


def test_folders_with_equal_names_sizes_and_times_have_their_own_scores(folder: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", plus=100)
    for _ in range(2):
        for each in (folder, other):
            score = Sum()
            assert np.array_equal(run(each, tmp_path / "cache", score), expected(each))
    assert score.count <= CANARY, "the other's scores are kept beside the first's"


def test_a_copy_elsewhere_is_the_same(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "moved/deeper")
    score = Sum()
    assert np.array_equal(run(tmp_path / "moved/deeper", tmp_path / "cache", score), expected(folder))
    assert score.count <= CANARY


def test_what_is_known_is_not_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_TICK", -1.0)  # as if the files were old
    run(folder, tmp_path / "cache")
    read: list[str] = []
    look = contents.look
    monkeypatch.setattr(contents, "look", lambda path: (read.append(path), look(path))[1])
    run(folder, tmp_path / "cache")
    assert len(read) <= CANARY
    memory = tmp_path / "memory"
    read.clear()
    paths = Pixels(folder).files
    first, again = contents.remembered(paths, memory), contents.remembered(paths, memory)
    assert len(read) == COUNT and np.array_equal(first, again)


def test_a_canary_voids_what_does_not_come_out_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A scorer that is another by means that no key has."""
    right = run(folder, tmp_path / "cache")
    (name,) = [path.name for path in (tmp_path / "cache").glob("*.npz")]
    score = Sum(1.0 + 2 * canary.TOLERANCE)
    found = run(folder, tmp_path / "cache", score)
    assert "is void" in caplog.text and name in caplog.text and score.count >= COUNT
    assert np.allclose(found, right * score.factor) and not (tmp_path / "cache" / name).exists()
    caplog.clear()
    run(folder, tmp_path / "cache", Sum(score.factor * (1 + canary.TOLERANCE / 10)))  # last bits
    assert not caplog.text


def test_unequal_last_bits_stay_beside_each_other(folder: Path, tmp_path: Path) -> None:
    """Two runs at once, each with its own rounding: neither removes what the other has written."""
    run(folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.npz")
    with np.load(path) as arrays:
        key = json.loads(str(arrays["key"]))
    files = Pixels(folder).files
    paths = {number: files[2 * number : 2 * number + 2] for number in range(COUNT // 2)}
    one = ScoreCache(path.parent).entry(key, paths)
    found = one.found
    one.complete({number: batch._replace(score=np.nextafter(batch.score, 1e9)) for number, batch in found.items()})
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_failure_of_the_disk_is_not_kept(
    number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = Pixels.__getitem__

    def failing(self: Pixels, index: int) -> Any:
        if index == 3:
            raise RuntimeError("the loader's own words") from OSError(number, os.strerror(number))
        return get(self, index)

    data = Pixels(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Pixels, "__getitem__", failing)
        options: Any = {"key": {"k": 1}, "cache": ScoreCache(tmp_path / "cache"), "progress": False}
        skipped = score_dataset(Sum(), DataLoader(data, 2), "cpu", unreadable="skip", **options)[1]
    assert len(skipped) == COUNT - 1
    again = score_dataset(Sum(), DataLoader(data, 2), "cpu", unreadable="skip", **options)[1]
    assert np.array_equal(again, expected(folder))


def test_what_the_bytes_say_is_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "3.bin").write_bytes(b"four")
    for most in (COUNT, CANARY):
        score = Sum()
        assert len(run(folder, tmp_path / "cache", score, unreadable="skip")) == COUNT - 1
        assert score.count <= most


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "huge"])
def test_what_is_no_file_is_refused_unopened(what: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "3.bin"
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer for ever
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")  # reading it would never end
    else:
        with path.open("wb") as file:
            file.truncate(contents.LARGEST + 1)  # without the space that it claims
    started = time.monotonic()
    with pytest.raises(unreadable.UnreadableImage, match=r"3\.bin.*expected an image file"):
        run(folder, tmp_path / "cache")
    assert len(run(folder, tmp_path / "cache", unreadable="skip")) == COUNT - 1
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("there", ["link", "folder"])
def test_the_list_of_unreadable_images_goes_through_no_link(
    there: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "3.bin").write_bytes(b"four")
    run(folder, tmp_path / "cache", unreadable="skip")
    (listed,) = (tmp_path / "cache").glob("*.unreadable.tsv")
    listed.unlink()
    (tmp_path / "precious").write_text("mine")
    if there == "link":
        listed.symlink_to(tmp_path / "precious")
    else:
        listed.mkdir()
    caplog.clear()
    assert len(run(folder, tmp_path / "cache", unreadable="skip")) == COUNT - 1
    assert (tmp_path / "precious").read_text() == "mine"
    assert ("cannot be written" in caplog.text) == (there == "folder") and listed.is_symlink() is False


def test_a_bomb_in_the_cache_is_not_unpacked(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = run(folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.npz")
    stem = path.name.partition(".")[0]
    path.unlink()
    bomb = tmp_path / "cache/bomb"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("key.npy", b"\0" * 2**24)
    from tests.runs.test_cache import renamed

    bomb.rename(bomb.with_name(renamed(bomb.read_bytes(), stem)))
    refusing = {**vars(np), "load": lambda *args, **options: pytest.fail("it was unpacked")}
    monkeypatch.setattr(cache, "np", SimpleNamespace(**refusing))  # NumPy's own, replaced, would be another key
    assert np.array_equal(run(folder, tmp_path / "cache"), right)
    assert "packed" in caplog.text


def test_remains_of_this_machines_dead_processes_go_at_once(folder: Path, tmp_path: Path) -> None:
    from openood_sandi.runs import files

    run(folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.npz")
    stem = path.name.partition(".")[0]
    dead = path.with_name(f"{stem}.{files._machine()}-{2**22 + 1}-aa.tmp")
    alive = path.with_name(f"{stem}.{files._machine()}-{os.getppid()}-bb.tmp")
    for each in (dead, alive):
        each.write_bytes(b"half")
    run(folder, tmp_path / "cache")
    assert not dead.exists() and alive.exists()


def test_a_collate_fn_decides_scores(folder: Path, tmp_path: Path) -> None:
    def twice(items: list[Any]) -> Any:
        return torch.stack([image * 2 for image, _ in items]), torch.tensor([label for _, label in items])

    run(folder, tmp_path / "cache")
    data = Pixels(folder)
    options: Any = {"key": {"images": keys.images(data)}, "cache": ScoreCache(tmp_path / "cache"), "progress": False}
    found = score_dataset(Sum(), DataLoader(data, 2, collate_fn=twice), "cpu", **options)[1]
    assert np.array_equal(found, 2 * expected(folder))
