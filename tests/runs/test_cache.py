"""Interrupted runs go on and give the same bytes; nothing but a run's own intact scores is ever used."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openood_sandi import SandI
from openood_sandi.runs import keys
from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import score_dataset
from tests.helpers import loaders as runs
from tests.helpers.loaders import KEY, Linear, as_bytes, run

BATCHES = list(range(10))
forked = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def expected() -> list[tuple[str, bytes]]:
    return as_bytes(run(Linear()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the one file of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    run(Linear(), folder)
    return folder


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


# ---------------------------------------------------------------------- interruptions


def test_a_finished_run_is_not_scored_again(finished: Path, expected: Any) -> None:
    before, again = only_file(finished).stat(), Linear()
    assert as_bytes(run(again, finished)) == expected
    after = only_file(finished).stat()
    assert again.after_the_canary([]) and (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 9])
def test_after_an_error_only_the_rest_is_scored(at: int, tmp_path: Path, expected: Any) -> None:
    first = Linear()

    def failing(x: Tensor) -> tuple[Tensor, Tensor]:
        if len(first.seen) == at:
            raise Interrupted
        return first(x)

    with pytest.raises(Interrupted):
        run(failing, tmp_path, seconds=0.0)
    only_file(tmp_path)  # each write takes the place of the last one
    rest = Linear()
    assert as_bytes(run(rest, tmp_path)) == expected
    # the first batch is shown to the scorer again, which may have to study it
    assert rest.after_the_canary(BATCHES[at:])


def test_kills_at_random_moments(tmp_path: Path) -> None:
    """S&I, killed again and again while it scores and writes, ends with the bytes of a run left alone."""
    expected = as_bytes(run(SandI(runs.network(), steps=2)))
    rng = random.Random(0)
    sizes = [0]
    while len(sizes) < 12 or sizes[-1] == 0:
        process = forked.Process(target=run, args=(SandI(runs.network(), steps=2), tmp_path, None, 0.0))
        process.start()
        time.sleep(rng.uniform(0.0, 0.02 * len(sizes)))  # longer and longer, so that a slow machine gets on too
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        sizes.append(len(ScoreCache(tmp_path).entry(_key_in(tmp_path)).found) if any(tmp_path.glob("*.npz")) else 0)
    assert sizes == sorted(sizes) and sizes[-1] > 0  # what was written once is never lost
    assert as_bytes(run(SandI(runs.network(), steps=2), tmp_path)) == expected


def _key_in(folder: Path) -> Any:
    with np.load(next(folder.glob("*.npz"))) as arrays:
        return json.loads(str(arrays["key"]))


class KillsItsWorker(Dataset[Any]):
    """The worker that is asked for the image ``at`` is killed, once all batches before that image's are on disk."""

    fingerprint = "as intact"

    def __init__(self, at: int, folder: Path) -> None:
        self.images, self.at, self.folder = runs.images(), at, folder

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            wait_for(lambda: _batches_in(self.folder) == BATCHES[: self.at // runs.BATCH])
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def _batches_in(folder: Path) -> list[int]:
    """The numbers of the batches on disk; none in the moment in which a file takes the place of the last one."""
    try:
        with np.load(only_file(folder)) as arrays:
            return list(arrays["batch"])
    except (FileNotFoundError, ValueError):
        return []


# torch tells of a worker's death from a signal handler: should that come while an object is deleted, Python ignores it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies(tmp_path: Path, expected: Any) -> None:
    first, rest = Linear(), Linear()
    data = DataLoader(KillsItsWorker(30, tmp_path), batch_size=runs.BATCH, num_workers=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(Killed|exited|died)"):
        run(first, tmp_path, data, seconds=0.0)
    assert as_bytes(run(rest, tmp_path)) == expected
    assert first.batches() == BATCHES[:7] and rest.after_the_canary(BATCHES[7:])


def test_several_processes_at_once(tmp_path: Path, expected: Any) -> None:
    """Three score and write the same, and remove files at random, as if they had been superseded."""

    def score(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(5):
            assert as_bytes(run(Linear(), tmp_path, None, 0.0)) == expected
            for path in tmp_path.glob("*.npz"):
                if rng.random() < 0.5:
                    path.unlink(missing_ok=True)

    processes = [forked.Process(target=score, args=(seed,)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    run(Linear(), tmp_path)
    again = Linear()
    assert as_bytes(run(again, tmp_path)) == expected
    assert again.after_the_canary([]) and only_file(tmp_path).suffix == ".npz"


# ---------------------------------------------------------------------- what is on disk


def damages(content: bytes) -> st.SearchStrategy[bytes]:
    place = st.integers(0, len(content) - 1)
    flips = st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=5, unique_by=lambda flip: flip[0])

    def flipped(changes: list[tuple[int, int]]) -> bytes:
        damaged = bytearray(content)
        for at, mask in changes:
            damaged[at] ^= mask
        return bytes(damaged)

    shorter = place.map(lambda end: content[:end])
    longer = st.binary(min_size=1, max_size=20).map(lambda more: content + more)
    return st.one_of(flips.map(flipped), shorter, longer, st.binary(max_size=200))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_named_and_never_used(
    data: st.DataObject, finished: Path, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = only_file(finished)
    folder = tmp_path / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / original.name
    path.write_bytes(data.draw(damages(original.read_bytes())))
    caplog.clear()
    score = Linear()
    assert as_bytes(run(score, folder)) == expected
    assert score.batches() == BATCHES
    assert str(path) in caplog.text and "damaged" in caplog.text
    assert only_file(folder).read_bytes() == original.read_bytes()


def renamed(content: bytes, stem: str) -> str:
    return f"{stem}.{hashlib.sha256(content).hexdigest()[:32]}.npz"


def foreign_files(finished: Path) -> Iterator[bytes]:
    """Intact files that are not this run's: of another key, of another program, with a pickle inside."""
    with np.load(only_file(finished)) as arrays:
        own = dict(arrays)
    for changed in (
        {**own, "key": np.array('{"method": "another"}')},
        {"key": own["key"], "scores": np.zeros(3)},
        {**own, "score": np.array([print] * len(own["score"]), dtype=object)},
        {**own, "score": own["score"][:-1]},
        {**own, "unreadable": np.array("[[1, 2]]")},
    ):
        file = io.BytesIO()
        np.savez(file, allow_pickle=True, **changed)
        yield file.getvalue()
    yield b"not even an archive"


def test_foreign_files_are_named_and_never_used(
    finished: Path, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stem = only_file(finished).name.partition(".")[0]
    for number, content in enumerate(foreign_files(finished)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / renamed(content, stem)
        path.write_bytes(content)
        caplog.clear()
        score = Linear()
        assert as_bytes(run(score, folder)) == expected
        assert score.batches() == BATCHES, number
        assert f"{path} is not of its kind" in caplog.text


def test_scores_of_other_weights_options_batches_or_code_are_named_and_not_used(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "cache"
    path = folder / only_file(finished).name

    def score(differing: str, key: Any = KEY, loader: Any = None, **options: Any) -> None:
        caplog.clear()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        cache, scorer, loader = ScoreCache(folder), Linear(), loader or runs.loader()
        score_dataset(scorer, loader, "cpu", cache=cache, key=key, progress=False, **options)
        assert len(scorer.seen) == len(loader)
        assert not differing or f"{path} has other {differing} and is not used" in caplog.text

    score("weights", key={**KEY, "weights": "1" * 64})
    score("order", loader=runs.loader(batch_size=5))
    score("order", loader=runs.loader(runs.images(36)))
    score("", key={**KEY, "method": "square"})
    score("", unreadable="skip")
    monkeypatch.setattr(keys, "code", lambda: "2" * 64)
    score("code")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_remains_of_killed_processes_are_cleared_away(finished: Path, tmp_path: Path) -> None:
    stem = only_file(finished).name.partition(".")[0]
    old, recent = tmp_path / f"{stem}.1-a.tmp", tmp_path / f"{stem}.2-b.tmp"
    for path in (old, recent):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    run(Linear(), tmp_path)
    assert not old.exists() and recent.exists()


# ---------------------------------------------------------------------- trouble with the disk


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_full_disk_does_not_end_the_run(
    at: int, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = iter(range(100))
    fsync = os.fsync

    def full(file: int) -> None:
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    assert as_bytes(run(Linear(), tmp_path, seconds=0.0)) == expected
    assert caplog.text.count("No space left on device") == 1
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    rest = Linear()
    assert as_bytes(run(rest, tmp_path)) == expected
    assert rest.batches() == BATCHES if at == 0 else rest.after_the_canary(BATCHES[at:])


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="taken' is a file; expected a folder"):
        ScoreCache(tmp_path / "taken")
