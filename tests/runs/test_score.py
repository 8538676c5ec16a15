"""A whole data set through ``score_dataset``: as in a plain loop, over ranks the same bytes; lost ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from openood_sandi import SandI
from openood_sandi.runs import progress
from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import score_dataset
from tests.helpers import loaders as runs
from tests.helpers import rank_cases
from tests.helpers.loaders import Linear, as_bytes, run
from tests.helpers.places import ROOT
from tests.helpers.rank_cases import forked

# ---------------------------------------------------------------------- one process


@pytest.mark.parametrize("case", rank_cases.LOADERS)
def test_one_process_gives_what_a_plain_loop_gives(case: str) -> None:
    score = SandI(runs.network())
    preds: list[Tensor] = []
    scores: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in rank_cases.LOADERS[case]():
        images, label = (batch["data"], batch["label"]) if isinstance(batch, dict) else batch
        pred, values = score(images)
        for column, value in zip((preds, scores, labels), (pred, values, label), strict=True):
            column.append(value)
    found = run(SandI(runs.network()), data=rank_cases.LOADERS[case]())
    assert as_bytes(found) == as_bytes(torch.cat(column).numpy() for column in (preds, scores, labels))


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="the loader of svhn gives no batches"):
        run(Linear(), data=[], progress="svhn")
    with pytest.raises(TypeError, match=r"dict of image, label; expected \{'data'"):
        run(Linear(), data=[{"image": torch.zeros(1, 3, 8, 8), "label": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"4 images with labels \(4,\) have predictions \(4,\) and scores \(4, 1\)"):
        run(lambda x: (x[:, 0, 0, 0], x[:, 0, 0, :1]))


def test_a_log_has_lines_with_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    run(Linear(), progress="svhn")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"svhn: {runs.IMAGES} of {runs.IMAGES} images, ") and last.endswith("0:00:00 left")
    run(Linear(), progress=False)
    assert not capsys.readouterr().err


def test_a_cache_needs_a_key_and_an_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="a cache needs a key"):
        score_dataset(Linear(), runs.loader(), "cpu", cache=ScoreCache(tmp_path))
    run(Linear(), tmp_path, runs.loader(shuffle=True), progress="svhn")
    assert "left unused for svhn: the loader gives its images in a random order" in caplog.text
    run(Linear(), tmp_path, DataLoader(rank_cases.Stream(), batch_size=4))
    assert "the loader is not a DataLoader over a map-style data set" in caplog.text
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- ranks


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.slow
def test_ranks_give_the_bytes_of_one_process(ranks: int, tmp_path: Path) -> None:
    expected = {name: as_bytes(found) for name, found in rank_cases.results().items()}
    assert forked(ranks, rank_cases.share, tmp_path) == [(0, "")] * ranks
    for rank in range(ranks):
        with np.load(tmp_path / f"{rank}.npz") as found:
            for name, columns in expected.items():
                assert as_bytes(found[f"{name}/{column}"] for column in range(3)) == columns, (name, rank)


@pytest.mark.slow
def test_torchrun_ends_with_the_error_of_a_rank_and_others_resume(tmp_path: Path) -> None:
    """Two ranks, one of which fails; then three; then one process, for which nothing is left."""
    expected = as_bytes(run(Linear()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests/helpers/rank_cases.py"), str(tmp_path), "fail"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert failed.returncode != 0
    assert "ArithmeticError: this image cannot be scored" in failed.stderr

    known = {number for file in (tmp_path / "cache").glob("*.npz") for number in np.load(file)["batch"].tolist()}
    assert {1, 3} <= known <= {0, 1, 2, 3, 4, 6, 8}  # of rank 1 all but what failed, of rank 0 what it had written

    assert forked(3, rank_cases.resume, tmp_path) == [(0, "")] * 3
    scored: list[int] = []
    for rank in range(3):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert as_bytes(found[f"arr_{column}"] for column in range(3)) == expected
            first, *batches = found["batches"].tolist()
        assert first == 0  # each sees the first batch, first
        scored += [number for number in batches if rank or number not in known]  # rank 0 takes one of those again
    assert sorted(scored) == sorted({*range(10)} - known)

    again = Linear()
    assert as_bytes(run(again, tmp_path / "cache")) == expected
    assert again.after_the_canary([])


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_thread_of_torch_enters_python_when_ranks_exchange_results(ranks: int, tmp_path: Path) -> None:
    """It may do so just as a DataLoader forks a worker, which then hangs in CPython before 3.12 and 3.11.10."""
    assert forked(ranks, rank_cases.exchange, tmp_path) == [(0, "")] * ranks
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(ranks)] == ["0"] * ranks


@pytest.mark.parametrize("case", [rank_cases.fail, rank_cases.die, rank_cases.hang])
@pytest.mark.slow
def test_a_rank_that_is_lost_ends_the_others(case: Any, tmp_path: Path) -> None:
    """Also without torchrun, which would end them: as on another machine."""
    (code, error), (other, _) = forked(2, case, tmp_path)
    assert code == 1 and "rank 0 of 2 has waited for the others' " in error
    assert other == {"fail": 1, "die": -9}.get(case.__name__, other)
    assert case is not rank_cases.hang or "Ranks 1 failed" in error


def test_a_rank_that_goes_on_after_an_error_ends_the_run(tmp_path: Path) -> None:
    """Its scores of the next set must not be taken for those of this one."""
    errors = forked(2, rank_cases.go_on, tmp_path)
    assert [code for code, _ in errors] == [1, 1]
    assert any("gives its scores, but rank 0 its task: one has gone on after an error" in error for _, error in errors)
