"""Progress in a log: lines instead of a bar."""

from __future__ import annotations

import pytest

for module in ("pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')

import torch
from comparison import console
from comparison.evaluation import Counted

from openood_sandi.runs import progress
from openood_sandi.runs.progress import Lines


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_30_seconds_has_images_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = Lines(1_000 + 5_000, clock=clock)
    lines.add(1_000, "msp on mnist", at_hand=True)  # says nothing of the rate
    for _ in range(14):
        clock.now += 5
        lines.add(50, "ebo on mnist")
    assert capsys.readouterr().err.splitlines() == [
        "ebo on mnist: 1,300 of 6,000 images, 10 images/s, 0:07:50 left",
        "ebo on mnist: 1,600 of 6,000 images, 10 images/s, 0:07:20 left",
    ]


def test_lines_without_a_total_or_a_rate_say_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    unknown, cached = Lines(None, "batches", clock), Lines(10, clock=clock)
    clock.now += 30
    unknown.add(60, "decoding")
    cached.add(5, "msp on mnist", at_hand=True)
    told = capsys.readouterr().err.splitlines()
    assert told == ["decoding: 60 batches, 2 batches/s", "msp on mnist: 5 of 10 images, 0 images/s, time left unknown"]


def test_a_terminal_has_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lines = Lines(10, clock=clock)
    clock.now += 100
    lines.add(5, "msp on mnist")
    assert capsys.readouterr().err == ""


def test_items_pass_unchanged_and_are_told_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(console.progress([1, 2, 3], "decoding", "batches")) == [1, 2, 3]
    assert "decoding: 3 of 3 batches, " in capsys.readouterr().err


def test_images_scored_and_images_at_hand_are_told_apart() -> None:
    told: list[tuple[int, str, bool]] = []
    lines = Lines(100)
    lines.add = lambda count, now, at_hand=False: told.append((count, now, at_hand))  # type: ignore[method-assign]
    scorer = Counted(lambda batch: (batch, batch), lines, "msp on mnist")
    scorer(torch.zeros(16, 1))
    scorer.finish(40)
    assert told == [(16, "msp on mnist", False), (24, "msp on mnist", True)]
