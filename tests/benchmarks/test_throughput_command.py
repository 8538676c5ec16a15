"""The speed benchmark's command: what it writes, keeps of an interrupted run, and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.places import BENCHMARKS

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


import pandas as pd
import throughput
from networks.cifar import CifarResNet
from speed import measuring, scaling
from speed.networks import NETWORKS, out_of_place

from tests.benchmarks.test_throughput import small

BOUNDS = {"bounds-z", "bounds-z-t5", "decisions-z", "decisions-z-estimates"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run that takes seconds: small images, narrow and shallow networks, one sweep of two points."""
    pytest.importorskip("torchvision", reason="torchvision is missing: pip install torchvision")
    shallow = {
        "resnet18": lambda classes: CifarResNet((1, 1, 1, 1), classes=classes),
        "resnet50": lambda classes: out_of_place(classes, (1, 1, 1, 1)),
    }
    for name, make in shallow.items():
        network = small(name)
        architecture = replace(network.architecture, make=make)
        monkeypatch.setitem(NETWORKS, name, replace(network, architecture=architecture))
    points = [(n, scaling.Point(splits=n, batch=2, size=8, blocks=1)) for n in (1, 3)]
    monkeypatch.setattr(throughput, "sweeps", lambda batch, quick: {"number of splits": points})
    arguments = ["--device", "cpu", "--networks", "resnet18", "resnet50", "--width", "0.0625", "--batch-size", "3"]
    return [*arguments, "--turns", "2", "--seed", "5"]


@pytest.mark.slow
def test_a_small_run_end_to_end(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main([*tiny, "--out", str(tmp_path)]) == 0
    scaling_files = ["scaling_number_of_splits.csv", "scaling_number_of_splits.png"]
    table_files = ["throughput.csv", "throughput.json", "throughput.md"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cost.png", *scaling_files, *table_files]

    frame = pd.read_csv(tmp_path / "throughput.csv")
    assert list(zip(frame["network"], frame["method"], strict=True)) == [
        (name, method)
        for name in ("resnet18", "resnet50")
        for method in measuring.METHODS
        if measuring.METHODS[method].applies(NETWORKS[name])
    ]
    slow = frame["method"].map(lambda name: measuring.METHODS[name].slow)
    assert set(frame["batch"][~slow]) == {3} and set(frame["batch"][slow]) == {2}
    assert (frame["forwards_q1"] <= frame["forwards"]).all() and (frame["forwards"] <= frame["forwards_q3"]).all()
    assert (frame.loc[frame["method"].isin(["forward", "kept", "msp"]), "flops"] == 1).all()
    assert (frame.loc[frame["method"] == "kept", "peak_of_kept"] == 1).all()
    compared = frame[frame["score_difference"].notna()]
    assert set(compared["method"]) == set(frame["method"]) - {"forward", "kept", "msp", "naive-z", "naive-a", *BOUNDS}
    assert compared["score_difference"].max() < 1e-3

    record = json.loads((tmp_path / "throughput.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert [row["method"] for row in record["results"]] == list(frame["method"])
    assert record["seed"] == 5 and record["width"] == 0.0625 and record["splits"] == "paper" and "commit" in record
    assert record["hardware"]["torch_threads"] == 1 and record["versions"]["torch"] == torch.__version__
    assert {(p["value"], p["method"]) for p in record["scaling"]["number of splits"]} == {
        (value, name) for value in (1, 3) for name in ("sandi-z", "bounds-z", "sandi-z-exact", "naive-z")
    }
    printed, written = capsys.readouterr().out, (tmp_path / "throughput.md").read_text()
    for text in (printed, written):
        for word in ("ResNet-18 for 32 pixels (12)", "/kept", "multiplied by 0.0625", "released-a", "of MSP"):
            assert word in text


def test_a_wrong_argument_is_told_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--methods", "none"])
    error, usage = capsys.readouterr().err.splitlines()
    assert "error: argument --methods" in error and usage.startswith("usage:")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_finished_measurements_survive_an_interruption(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
) -> None:
    measure = measuring.Bench.measure

    def breaks(self: measuring.Bench, method: str, batch: int) -> dict[str, Any]:
        if method == "gaia-z":
            raise error
        return measure(self, method, batch)

    monkeypatch.setattr(measuring.Bench, "measure", breaks)
    arguments = [*tiny, "--methods", "msp", "gaia-z", "sandi-z", "--out", str(tmp_path)]
    if error is KeyboardInterrupt:
        assert throughput.main(arguments) == 130
    else:
        with pytest.raises(error):
            throughput.main(arguments)
    assert list(pd.read_csv(tmp_path / "throughput.csv")["method"]) == ["msp"]
    printed = capsys.readouterr()
    assert " msp " in printed.out and ("Interrupted" in printed.err) == (error is KeyboardInterrupt)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--turns", "1"],
        ["--batch-size", "0"],
        ["--width", "0"],
        ["--width", "nan"],
        ["--networks", "resnet19"],
        ["--methods", "sandi"],
        ["--splits", "x"],
        ["--device", "gpu"],
        ["--clock", "processor", "--threads", "2"],
        ["--networks", "resnet18", "--methods", "sandi-a"],
    ],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(wrong)
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_imports_neither_torchvision_nor_openood() -> None:
    program = f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent)!r}]; import throughput; "
    program += 'print("imported:", sorted({"torchvision", "openood"} & set(sys.modules)))'
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "imported: []\n"
