"""Each form of call gives on two processes what it gives on one, and the first alone writes.

OpenOOD's own forms, which run under ``torchrun`` itself, are in ``tests/plugin/test_torchrun.py``.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from openood_sandi import command, score_dataset
from openood_sandi.runs import ranks
from tests.helpers import tiny_suite
from tests.helpers.every_detector import KINDS, TRAINING, images, network
from tests.helpers.loaders import as_bytes
from tests.helpers.rank_cases import forked

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit is promised on the CPU")

RANKS = 2


def on_two(job: Callable[[Path], Any], out: Path) -> list[Any]:
    """What ``job`` returns on each rank, given a folder of that rank's."""

    def on_one(out: Path) -> None:
        ranks.join()
        mine = out / str(ranks.rank())
        mine.mkdir()
        (mine / "result").write_bytes(pickle.dumps(job(mine)))

    outcomes = forked(RANKS, on_one, out)
    assert outcomes == [(0, "")] * RANKS, outcomes
    return [pickle.loads((out / str(rank) / "result").read_bytes()) for rank in range(RANKS)]


# ---------------------------------------------------------------------- Python


def fitted_and_scored(_: Path) -> dict[str, Any]:
    """Of every detector: threshold, decisions and scores of a data set, as ``fit`` and ``score`` give them."""
    found: dict[str, Any] = {}
    data = DataLoader(TensorDataset(images(22, 5), torch.arange(22)), batch_size=4)
    for name, (kind, options) in KINDS.items():
        detector = kind(network(), **options).fit(DataLoader(TensorDataset(*TRAINING), batch_size=16))
        scores = detector.score(data, progress=False)
        found[name] = detector.threshold, as_bytes(scores)
        direct = score_dataset(detector, data, "cpu", progress=False)
        assert as_bytes(direct[:2]) == as_bytes(scores[:2])
    return found


@pytest.mark.slow
def test_detectors_are_fitted_and_score_alike(tmp_path: Path) -> None:
    assert on_two(fitted_and_scored, tmp_path) == [fitted_and_scored(tmp_path)] * RANKS


def test_each_rank_scores_its_own_batches(tmp_path: Path) -> None:
    """Equal results would be had by scoring everything twice."""

    def batches_seen(_: Path) -> list[int]:
        seen: list[int] = []

        def score(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(int(x[0, 0, 0, 0]))
            return x[:, 0, 0, 0].long(), x[:, 0, 0, 0]

        numbered = torch.arange(6.0).view(6, 1, 1, 1)
        score_dataset(score, DataLoader(TensorDataset(numbered, numbered[:, 0, 0, 0].long())), "cpu", progress=False)
        return seen

    assert on_two(batches_seen, tmp_path) == [[0, 2, 4], [0, 1, 3, 5]]


# ---------------------------------------------------------------------- the command


FACTORY = "from tests.helpers import tiny_suite\n\ndef network():\n    return tiny_suite.TinyResNet()\n"
TRANSFORM = ["--crop", "16", "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.3", "0.4"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Folders of images, a network's file and its weights."""
    (tmp_path / "mine.py").write_text(FACTORY)
    torch.save({"state_dict": tiny_suite.network().state_dict()}, tmp_path / "weights.pt")
    for name, count, seed in (("id", 30, 1), ("new", 7, 3)):
        (tmp_path / name).mkdir()
        for number, image in enumerate(tiny_suite.images(count, seed, 5)):
            pixels = (image.sigmoid() * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{number:02d}.png")
    return tmp_path


def called(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        status = command.main(arguments)
    return status, out.getvalue(), error.getvalue()


@pytest.mark.slow
def test_the_command(place: Path) -> None:
    given = ["--network", f"{place}/mine.py:network", "--checkpoint", f"{place}/weights.pt", *TRANSFORM]
    given += ["--device", "cpu", "--batch-size", "2"]

    def fit_and_score(out: Path) -> list[Any]:
        file, table, maps = str(out / "d.safetensors"), out / "new.csv", out / "maps"
        fit = called(["fit", f"{place}/id", "--out", file, *given])
        shared = place / "shared.safetensors"  # as a file that all ranks can read
        if ranks.is_main_process():
            shared.write_bytes(Path(file).read_bytes())
        ranks.gather("file", None)
        score = ["score", f"{place}/new", "--detector", str(shared), *given]
        printed = called(score)
        kept = called([*score, "--csv", str(table), "--heat-maps", str(maps)])
        told = [(status, out, error.replace(str(out), "")) for status, out, error in (printed, kept)]
        pictures = sorted((path.name, path.read_bytes()) for path in maps.rglob("*.png"))
        return [fit[0], told, table.read_text() if table.exists() else "", pictures, Path(file).exists()]

    alone = place / "alone"
    alone.mkdir()
    expected = fit_and_score(alone)
    assert expected[2].count("\n") == 8 and len(expected[3]) == 7
    (place / "ranks").mkdir()
    first, second = on_two(fit_and_score, place / "ranks")
    assert first == expected
    assert second == [0, [(0, "", "")] * 2, "", [], False]


# ---------------------------------------------------------------------- the comparison


@pytest.mark.slow
def test_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
        pytest.importorskip(module)
    import side_by_side

    suite = tiny_suite.suite()
    monkeypatch.setattr(side_by_side.sources, "load", lambda options, seed: suite)
    methods = ["--methods", "msp", "gaia-z", "sandi-z", "sandi-a", "sandi_c", "--no-cost", "--no-pictures"]

    def compare(out: Path) -> dict[str, Any]:
        arguments = [*methods, "--batch-size", "5", "--cache", str(out / "cache"), "--out", str(out / "tables")]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert side_by_side.main(arguments) == 0
        tables = {path.name: path.read_text() for path in (out / "tables").rglob("*.csv")}
        return {"printed": printed.getvalue().replace(str(out), ""), "tables": tables}

    (tmp_path / "alone").mkdir()
    expected = compare(tmp_path / "alone")
    assert expected["tables"]
    (tmp_path / "ranks").mkdir()
    first, second = on_two(compare, tmp_path / "ranks")
    assert first == expected
    assert second == {"printed": "", "tables": {}}
