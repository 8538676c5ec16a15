"""The comparison: timing, decoding, and the command."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.places import BENCHMARKS

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


import comparison
import pandas as pd
import side_by_side
from comparison import cost, digits, environment, evaluation, methods, training
from comparison.metrics import detection
from comparison.suite import Suite
from comparison.table import FPR_OPENOOD, FPR_PAPER

from openood_sandi import SandI

QUICK = training.Recipe(widths=(4, 4, 8), blocks=1, epochs=1)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("share, times", [(0.5, 1), (0.0, 3)], ids=["it fits", "it does not fit"])
def test_images_are_decoded_once_for_all_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., Suite], share: float, times: int
) -> None:
    decoded: Counter[int] = Counter()

    class Counting(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            decoded[index] += 1
            return torch.full((1, 2, 2), float(index)), index

    monkeypatch.setattr(evaluation, "SHARE", share)
    suite = load(0, None)
    images = dataclasses.replace(suite.in_distribution, dataset=Counting(), fingerprint="counting")
    decoder = evaluation.Decoder(batch_size=3, workers=0)
    for _ in range(3):  # networks
        known = decoder.suite(dataclasses.replace(suite, in_distribution=images)).in_distribution
        decoded.clear() if not decoded[6] else None  # it looks at the first image's size
        batches = list(known.loader(3))
        assert torch.equal(torch.cat([batch for batch, _ in batches])[:, 0, 0, 0], torch.arange(7.0))
        assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
    assert set(decoded.values()) == {times}
    assert known.fingerprint == "counting"  # by which the score cache knows them


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Suite]:
    """The digits with a network that is trained in no time, made once for each seed."""
    folder, made = tmp_path_factory.mktemp("networks"), digits.load
    known = functools.cache(lambda seed: made(seed, folder, QUICK))
    return lambda seed, *_: known(seed)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: Callable[..., Suite]) -> list[str]:
    """Arguments of a small run."""
    monkeypatch.setattr(digits, "load", load)
    monkeypatch.setattr(cost, "MIN_SECONDS", 0)
    monkeypatch.setattr(cost, "MIN_TURNS", 2)
    arguments = ["--limit", "20", "--batch-size", "16", "--workers", "0", "--device", "cpu"]
    return [*arguments, "--cache", str(tmp_path / "cache")]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many batches each method scores and times, counted from now on."""
    counted: Counter[str] = Counter()

    def available(suite: Suite) -> tuple[dict[str, methods.Method], dict[str, str]]:
        runnable, reasons = offered(suite)
        return {name: dataclasses.replace(method, build=counting(method)) for name, method in runnable.items()}, reasons

    def counting(method: methods.Method) -> Callable[[Suite, torch.device, int], methods.Scorer]:
        def build(suite: Suite, device: torch.device, batch_size: int) -> methods.Scorer:
            scorer = method.build(suite, device, batch_size)

            def score(images: Tensor) -> tuple[Tensor, Tensor]:
                counted[method.name] += 1
                return scorer(images)

            return score

        return build

    offered = methods.available
    monkeypatch.setattr(methods, "available", available)
    return counted


OURS = ["--methods", "gaia-z", "sandi-z", "sandi-a"]


@pytest.mark.slow
def test_a_small_run_end_to_end(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert side_by_side.main([*quick, *OURS, "--seeds", "3", "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {
        *("results.csv", "results.json", "results.md", "report.html"),
        *("histograms.png", "roc.png", "cost_auroc.png", "heat_maps.png"),
    }
    frame = pd.read_csv(out / "results.csv")
    places = [("near", "average"), ("near", "letters"), ("far", "average"), ("far", "photos"), ("far", "noise")]
    assert list(zip(frame["group"], frame["OOD set"], frame["method"], strict=True)) == [
        (*place, method) for place in places for method in OURS[1:]
    ]
    assert frame["ID accuracy"].nunique() == 1  # the detectors' predictions are the network's
    assert (frame[["images/s", "forwards", "peak MiB"]] > 0).all(axis=None)

    printed, written = capsys.readouterr().out, (out / "results.md").read_text()
    for text in (printed, written):
        for word in ("FPR95 ID lost (OpenOOD)", "FPR95 OOD let in (paper)", "near (1 of 1)", "far (2 of 2)", *OURS[1:]):
            assert word in text
        for value in frame["AUROC"]:
            assert f"{value:.2f}" in text
    for picture in ("histograms", "roc", "cost_auroc", "heat_maps"):
        assert f"({picture}.png)" in written

    record = json.loads((out / "results.json").read_text())
    assert record["seeds"] == [3] and record["batch_size"] == 16 and "--limit 20" in record["command"]
    assert record["versions"]["torch"] == torch.__version__ and record["hardware"]["processor"]
    assert "commit" in record and [images["images"] for images in record["sets"]] == [20] * 4


def test_the_table_holds_the_metrics_of_the_methods_scores(quick: list[str], tmp_path: Path) -> None:
    assert side_by_side.main([*quick, "--methods", "sandi-z", "--no-cost", "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "results.csv").set_index("OOD set")
    assert frame["forwards"].isna().all()
    suite = digits.load(0, tmp_path / "cache").limited(20)
    detector = SandI(suite.network, variant="Z")

    def scores(dataset: torch.utils.data.Dataset[tuple[Tensor, Tensor]]) -> np.ndarray:
        return detector(torch.stack([dataset[i][0] for i in range(20)]))[1].numpy()

    known = scores(suite.in_distribution.dataset)
    for images in suite.out_of_distribution:
        expected = detection(known, scores(images.dataset))
        assert frame.loc[images.name, "AUROC"] == pytest.approx(100 * expected.auroc)
        assert frame.loc[images.name, FPR_OPENOOD] == pytest.approx(100 * expected.fpr95_id_lost)
        assert frame.loc[images.name, FPR_PAPER] == pytest.approx(100 * expected.fpr95_ood_let_in)


@pytest.mark.slow
def test_a_finished_run_is_reported_again_byte_for_byte_without_scoring(
    quick: list[str], tmp_path: Path, scored: Counter[str]
) -> None:
    arguments = [*quick, *OURS, "--no-pictures", "--out", str(tmp_path / "out")]
    assert side_by_side.main(arguments) == 0
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(scored) == set(OURS[1:])
    scored.clear()
    assert side_by_side.main(arguments) == 0
    assert max(scored.values()) <= 2  # the first batch and one drawn at random, of one set
    scored.clear()
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert side_by_side.main([*arguments, "--batch-size", "20"]) == 0  # decides scores, if by rounding only
    assert set(scored) == set(OURS[1:])


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_finished(
    quick: list[str],
    tmp_path: Path,
    scored: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*quick, *OURS, "--no-cost", "--no-pictures"]
    assert side_by_side.main([*arguments, "--cache", str(tmp_path / "other"), "--out", str(tmp_path / "whole")]) == 0
    whole = scored.copy()
    scored.clear()
    detect = SandI.__call__

    def interrupted(detector: SandI, images: Tensor) -> tuple[Tensor, Tensor]:
        if scored["sandi-z"] == 4:
            raise KeyboardInterrupt
        return detect(detector, images)

    with monkeypatch.context() as patch:
        patch.setattr(SandI, "__call__", interrupted)
        assert side_by_side.main([*arguments, "--out", str(tmp_path / "out")]) == 130
    assert set(pd.read_csv(tmp_path / "out/results.csv")["method"]) == {"gaia-z"}
    printed = capsys.readouterr()
    assert "Interrupted" in printed.err and "gaia-z" in printed.out
    finished = scored.copy()
    scored.clear()
    assert side_by_side.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert scored["gaia-z"] <= 2 and scored["sandi-a"] == whole["sandi-a"]
    # The batch it was interrupted in, one that its study of the network begins with, and a canary with the same.
    assert scored["sandi-z"] + finished["sandi-z"] <= whole["sandi-z"] + 4
    tables = [(tmp_path / folder / "results.csv").read_bytes() for folder in ("whole", "out")]
    assert tables[0] == tables[1]


def test_a_method_that_fails_is_told_and_the_others_go_on(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    detect = SandI.__call__

    def failing(detector: SandI, images: Tensor) -> tuple[Tensor, Tensor]:
        pred, tau = detect(detector, images)
        if detector.attack.steps == 1:
            raise RuntimeError("a broken detector")
        return pred, tau if detector.variant == "Z" else tau * torch.nan

    monkeypatch.setattr(SandI, "__call__", failing)
    assert side_by_side.main([*quick, *OURS, "--no-pictures", "--out", str(tmp_path)]) == 1
    assert set(pd.read_csv(tmp_path / "results.csv")["method"]) == {"sandi-z"}
    for text in (capsys.readouterr().out, (tmp_path / "results.md").read_text()):
        assert "No row for gaia-z: RuntimeError: a broken detector" in text
        assert "No row for sandi-a: ValueError: 20 of 20 scores of digits are not finite" in text


@pytest.mark.slow
def test_several_seeds_give_a_standard_deviation(quick: list[str], tmp_path: Path) -> None:
    arguments = [*quick, "--methods", "gaia-z", "--no-cost", "--no-pictures"]
    assert side_by_side.main([*arguments, "--seeds", "0", "1", "--out", str(tmp_path / "both")]) == 0
    for seed in ("0", "1"):
        assert side_by_side.main([*arguments, "--seeds", seed, "--out", str(tmp_path / seed)]) == 0
    one, other, both = (pd.read_csv(tmp_path / folder / "results.csv") for folder in ("0", "1", "both"))
    np.testing.assert_allclose(both["AUROC"], (one["AUROC"] + other["AUROC"]) / 2)
    np.testing.assert_allclose(both["AUROC std"], (one["AUROC"] - other["AUROC"]).abs() / 2, atol=1e-9)


def test_a_method_that_cannot_run_here_is_told(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = digits.load(0, tmp_path / "cache")
    monkeypatch.setattr(digits, "load", lambda *_: dataclasses.replace(untrained, training=None))
    arguments = [*quick, "--no-cost", "--no-pictures"]
    assert side_by_side.main([*arguments, "--methods", "gaia-z", "prototype_fusion"]) == 1
    printed = capsys.readouterr().out
    assert "No row for prototype_fusion: " in printed and "training" in printed


def test_without_a_folder_the_report_is_in_the_cache_and_its_place_is_printed(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*quick, "--methods", "gaia-z", "--no-cost"]
    assert side_by_side.main([*arguments, "--no-pictures"]) == 0
    path = tmp_path / "cache/reports/digits_smallresnet/report.html"
    assert not path.exists()
    capsys.readouterr()
    assert side_by_side.main(arguments) == 0
    assert f"Report, for a browser: {path}\n" in capsys.readouterr().out and "gaia-z" in path.read_text()
    first = path.read_bytes()
    assert side_by_side.main(arguments) == 0
    assert path.read_bytes() == first


def test_a_report_that_cannot_be_made_is_told_and_costs_nothing_else(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were missing
    monkeypatch.delitem(sys.modules, "comparison.html_report", raising=False)
    monkeypatch.delattr(comparison, "html_report", raising=False)
    assert side_by_side.main([*quick, "--methods", "gaia-z", "--no-cost", "--out", str(tmp_path / "out")]) == 0
    assert "No report.html: " in (error := capsys.readouterr().err) and 'pip install -e ".[bench]"' in error
    assert (tmp_path / "out/results.csv").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--limit", "0"],
        ["--batch-size", "-1"],
        ["--data", "x"],
        ["--device", "gpu"],
        ["--device", "cuda:99"],
    ],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.main(wrong)
    error, usage = capsys.readouterr().err.rstrip().split("\n")  # what is wrong first, and a line of usage
    assert "error: " in error and wrong[0] in error and usage.startswith("usage: ")


def test_a_wrong_method_is_refused_with_a_suggestion(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.main([*quick, "--methods", "sandy-z"])
    assert "did you mean sandi-z?" in capsys.readouterr().err


def test_methods_go_by_their_titles_too(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*quick, "--no-cost", "--no-pictures", "--out", str(tmp_path)]
    assert side_by_side.main([*arguments, "--methods", "Energy", "s&i-z, union", "GAIA-Z"]) == 0
    assert set(pd.read_csv(tmp_path / "results.csv")["method"]) == {"ebo", "sandi-z-union", "gaia-z"}
    with pytest.raises(SystemExit):
        side_by_side.main([*arguments, "--methods", "Prototype Fussion"])
    assert "did you mean prototype_fusion?" in capsys.readouterr().err


def test_a_small_network_runs_on_one_thread_if_that_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for seconds, chosen in (({4: 2.0, 1: 1.0}, 1), ({4: 1.0, 1: 3.0}, 4)):
        threads[:] = [4]
        monkeypatch.setattr("timeit.repeat", lambda *_, seconds=seconds, **__: [seconds[threads[-1]]])
        environment.on_quickest_threads(nn.Identity(), torch.zeros(1))
        assert threads[-1] == chosen


def test_data_that_are_not_there_are_told(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.main([*quick, "--data", "cifar10", "--data-root", str(tmp_path), "--checkpoint", "random"])
    assert f"{tmp_path}/benchmark_imglist/cifar10" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_runs_by_its_path(tmp_path: Path) -> None:
    run = [sys.executable, str(BENCHMARKS / "side_by_side.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "--batch-size" in result.stdout
