"""``ood.csv`` holds each set once for each set of options, whatever was interrupted before."""

from __future__ import annotations

import csv
import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from openood_sandi.plugin import ood_csv
from openood_sandi.runs import files

HEADER = "dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC"


@pytest.fixture(params=["OODEvaluator", "MOSEvaluator"])
def kind(checkout: Path, request: pytest.FixtureRequest) -> Any:
    import openood.evaluators.utils as evaluators

    return getattr(evaluators, request.param)


class Run:
    """One run of OpenOOD's, which writes rows to a folder."""

    def __init__(self, kind: Any, folder: Path, steps: int = 2, **args: object) -> None:
        from openood.utils.config import Config

        ood_csv._kept.clear()  # a new process
        self.evaluator = kind.__new__(kind)
        args["steps"] = steps
        self.evaluator.config = Config(
            output_dir=str(folder),
            postprocessor={"name": "sandi", "postprocessor_args": args},
            network={"checkpoint": "./net.ckpt"},
            ood_dataset={"farood": {"datasets": ["mnist", "svhn"]}},
        )

    def write(self, *names: str, auroc: float = 0.5) -> Run:
        for name in names:
            self.evaluator._save_csv([0.1, auroc, 0.2, 0.3, 0.4], name)
        return self


def table(folder: Path) -> list[tuple[str, str]]:
    with (folder / "ood.csv").open() as file:
        return [(row["dataset"], row["AUROC"]) for row in csv.DictReader(file)]


def test_a_rerun_replaces_rows_in_their_order(kind: Any, tmp_path: Path) -> None:
    Run(kind, tmp_path).write("mnist", "svhn", "farood")
    first = (tmp_path / "ood.csv").read_bytes()
    Run(kind, tmp_path, cache_dir="elsewhere").write("mnist", "svhn", auroc=0.7)  # and is interrupted
    assert table(tmp_path) == [("mnist", "70.00"), ("svhn", "70.00"), ("farood", "50.00")]
    assert (tmp_path / "ood.csv.old").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ood.csv", "ood.csv.old"]


def test_rows_of_other_options_stay(kind: Any, tmp_path: Path) -> None:
    Run(kind, tmp_path).write("mnist")
    Run(kind, tmp_path, steps=5).write("mnist", auroc=0.7)
    Run(kind, tmp_path).write("mnist", auroc=0.6)
    assert table(tmp_path) == [("mnist", "60.00"), ("mnist", "70.00")]
    other = Run(kind, tmp_path)
    other.evaluator.config.network.checkpoint = "other.ckpt"
    other.write("mnist", auroc=0.8)
    means = Run(kind, tmp_path).write("farood")
    means.evaluator.config.ood_dataset.farood.datasets = ["mnist"]
    means.write("farood", auroc=0.9)
    assert [row for row, _ in table(tmp_path)] == ["mnist"] * 3 + ["farood"] * 2


@pytest.mark.parametrize(
    "left",
    [
        f"{HEADER}\nmnist,1,2,3,4,5\nmnist,1,2,3,4,5\n",  # OpenOOD's own, twice
        f"{HEADER}\nmnist,1,2,3,4,5\nmnist,1,2",  # half a row
        f"{HEADER}\nmnist,1,2mnist,1,2,3,4,5\n",  # half a row, and another behind it
        f"{HEADER}\nmnist,1,2,,,\n",
        f"{HEADER}\n\0\0\0\0",
        "data",
        "",
    ],
)
def test_what_an_interruption_left(checkout: Path, tmp_path: Path, left: str) -> None:
    from openood.evaluators.ood_evaluator import OODEvaluator

    (tmp_path / "ood.csv").write_text(left)
    Run(OODEvaluator, tmp_path).write("mnist", "svhn")
    assert table(tmp_path) == [("mnist", "50.00"), ("svhn", "50.00")]
    assert (tmp_path / "ood.csv.old").read_text() == left


def test_a_failure_leaves_the_table_whole(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openood.evaluators.ood_evaluator import OODEvaluator

    Run(OODEvaluator, tmp_path).write("mnist")
    before = (tmp_path / "ood.csv").read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    run = Run(OODEvaluator, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.write("svhn")
    assert (tmp_path / "ood.csv").read_bytes() == before
    assert run.evaluator.config.output_dir == str(tmp_path)


@pytest.mark.parametrize("system", ["with locks", "without"])
def test_runs_at_once_lose_no_row(system: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openood.evaluators.ood_evaluator import OODEvaluator

    if system == "without":
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("none here")))
    read = ood_csv._read

    def slowly(table: Path) -> Any:
        rows = read(table)
        time.sleep(0.01)  # in which the others would write what is lost afterwards
        return rows

    monkeypatch.setattr(ood_csv, "_read", slowly)
    names = [[f"set{process}{number}" for number in range(5)] for process in range(4)]
    forked = multiprocessing.get_context("fork")
    runs = [forked.Process(target=lambda mine: Run(OODEvaluator, tmp_path).write(*mine), args=(own,)) for own in names]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0] * 4
    assert sorted(row for row, _ in table(tmp_path)) == sorted(name for own in names for name in own)
    assert not (tmp_path / ".lock").exists()


def test_a_killed_runs_lock_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("none here")))
    (tmp_path / ".lock").touch()
    old = time.time() - files._STALE - 1
    os.utime(tmp_path / ".lock", (old, old))
    with files.alone(tmp_path):
        assert (tmp_path / ".lock").stat().st_mtime > old
    assert not (tmp_path / ".lock").exists()
