"""Tables, the leaderboard's rows, the paper's tables and pictures of known scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


import pandas as pd
from comparison import leaderboard, metrics, paper_tables, pictures, report
from comparison.cost import Cost, Expense
from comparison.evaluation import Failure, Outcome, Scored
from comparison.methods import Method, Scorer
from comparison.methods.method import Library
from comparison.metrics import detection
from comparison.suite import ImageSet, Suite
from comparison.table import FPR_OPENOOD, FPR_PAPER, METRICS, Run, results
from PIL import Image

COUNTS = {"known": 40, "tin": 30, "texture": 20, "mnist": 25}
GROUPS: dict[str, Literal["near", "far"]] = {"tin": "near", "texture": "far", "mnist": "far"}
ABOUT: dict[str, Any] = {
    "command": "python benchmarks/side_by_side.py",
    "seeds": [0],
    "protocol": "openood",
    "limit": None,
    "hardware": {"device": "cpu", "processor": "a processor", "torch_threads": 1},
    "versions": {"torch": "2"},
}


def suite(missing: tuple[str, ...] = (), **changes: Any) -> Suite:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 100),
    ).eval()
    values: dict[str, Any] = {
        "name": "cifar100",
        "network": net,
        "network_name": "resnet18_32x32",
        "network_description": "a network",
        "weights": "0" * 64,
        "classes": 100,
        "normalisation": ((0.5,) * 3, (0.25,) * 3),
        "in_distribution": image_set("known", "ID"),
        "out_of_distribution": tuple(image_set(name, group) for name, group in GROUPS.items()),
        "missing": missing,
        "protocol": "OpenOOD's near and far sets",
    }
    return Suite(**values | changes)


def image_set(name: str, group: Literal["ID", "near", "far"]) -> ImageSet:
    count = COUNTS[name]
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
    return ImageSet(name, group, TensorDataset(images, torch.arange(count) % 100), "images", name)


def outcome(
    name: str,
    seed: int,
    source: Library = "openood-sandi",
    options: Mapping[str, object] | None = None,
    title: str | None = None,
    forwards: float = 2.0,
) -> Outcome:
    def build(suite: Suite, device: torch.device, batch_size: int) -> Scorer:
        raise AssertionError("a report scores nothing")

    rng = np.random.default_rng(seed)
    scored = {}
    for at, (place, count) in enumerate(COUNTS.items()):
        labels = np.arange(count) % 100 if place == "known" else np.full(count, -1)
        pred = np.where(rng.random(count) < 0.8, labels, 0)
        scored[place] = Scored(pred, labels, rng.normal(at, 1, count))
    cost = Cost(images_per_second=100 / forwards, forwards=(0.9 * forwards, forwards, 1.1 * forwards))
    expense = Expense(cost, batch_size=16, peak_bytes=3 << 20, hardware=ABOUT["hardware"])
    return Outcome(Method(name, title or name, source, options or {}, build), scored, expense)


def run(*outcomes: Outcome, seed: int = 0, **changes: Any) -> Run:
    return Run(seed, suite(**changes), {outcome.method.name: outcome for outcome in outcomes})


# ---------------------------------------------------------------- numbers


def test_the_table_has_the_metrics_of_the_scores_and_the_intervals_of_their_resamples() -> None:
    known = run(outcome("a", 0), outcome("b", 1))
    frame = results([known], resamples=30)
    assert frame[frame["method"] == "b"][["group", "OOD set", "images"]].to_numpy().tolist() == [
        ["near", "average", 30],
        ["near", "tin", 30],
        ["far", "average", 45],
        ["far", "texture", 20],
        ["far", "mnist", 25],
    ]
    scored = known.outcomes["b"].scored
    rows = frame[frame["method"] == "b"].set_index(["group", "OOD set"])
    by_set, resampled = {}, {}
    id_draws = metrics.draws(40, 30, 0, 0)
    for stratum, (name, group) in enumerate(GROUPS.items(), 1):
        ood_draws = metrics.draws(COUNTS[name], 30, 0, stratum)
        pairs = zip(id_draws, ood_draws, strict=True)
        scores = scored[name].scores
        by_set[group, name] = np.array(astuple(detection(scored["known"].scores, scores)))
        resampled[group, name] = np.array([astuple(detection(scored["known"].scores[i], scores[o])) for i, o in pairs])
    for found in (by_set, resampled):
        found["near", "average"] = found["near", "tin"]
        found["far", "average"] = (found["far", "texture"] + found["far", "mnist"]) / 2
    for place, values in by_set.items():
        ends = np.percentile(resampled[place], [2.5, 97.5], axis=0)
        for column, value, low, high in zip(METRICS.values(), values, *ends, strict=True):
            assert rows.loc[place, column] == pytest.approx(100 * value)
            assert rows.loc[place, f"{column} low"] == pytest.approx(100 * low)
            assert rows.loc[place, f"{column} high"] == pytest.approx(100 * high)
    accuracy = np.mean(scored["known"].pred == scored["known"].labels)
    assert rows["ID accuracy"].to_list() == pytest.approx([100 * accuracy] * 5)


def test_several_networks_give_mean_and_standard_deviation() -> None:
    runs = [run(outcome("a", seed), seed=seed) for seed in range(3)]
    frame = results(runs).set_index(["group", "OOD set"])
    values = [
        100 * detection(r.outcomes["a"].scored["known"].scores, r.outcomes["a"].scored["tin"].scores).auroc
        for r in runs
    ]
    assert frame.loc[("near", "tin"), "AUROC"] == pytest.approx(np.mean(values))
    assert frame.loc[("near", "tin"), "AUROC std"] == pytest.approx(np.std(values))
    assert not [column for column in frame.columns if column.endswith(("low", "high"))]
    assert f"{np.mean(values):.2f} +- {np.std(values):.2f}" in report.screen(frame.reset_index(), runs[0].suite)


# ---------------------------------------------------------------- tables

MISSING = ("svhn (far-OOD): there is no list", "places365 (far-OOD): there is no list", "validation images: none")


def test_an_average_over_fewer_sets_says_so_wherever_it_is(tmp_path: Path) -> None:
    known = run(outcome("a", 0), missing=MISSING)
    frame = results([known], resamples=2)
    report.write(tmp_path, frame, [known], [Failure("b", "it needs training images")], ABOUT)
    written = (tmp_path / "results.md").read_text()
    for text in (report.screen(frame, known.suite), written):
        assert "near (1 of 1)" in text
        assert "far (2 of 4: svhn, places365 missing)" in text
    for sentence in MISSING:
        assert f"Missing: {sentence}" in written
    assert "No row for b: it needs training images" in written


def test_csv_and_json_hold_the_table_at_full_precision(tmp_path: Path) -> None:
    known = run(outcome("a", 0, options={"variant": "Z"}), outcome("b", 1))
    frame = results([known], resamples=2)
    report.write(tmp_path, frame, [known], [], ABOUT)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv"), frame)
    record = pd.read_json(tmp_path / "results.json", typ="series", precise_float=True)
    pd.testing.assert_frame_equal(pd.DataFrame(record["results"]), frame)
    assert record["methods"][0]["options"] == {"variant": "Z"}
    assert record["sets"][1] == {
        "name": "tin",
        "group": "near",
        "images": 30,
        "description": "images",
        "fingerprint": "tin",
    }


def test_both_fpr95_are_told_apart_in_every_header(tmp_path: Path) -> None:
    known = run(outcome("a", 0))
    frame = results([known], resamples=2)
    report.write(tmp_path, frame, [known], [], ABOUT)
    for text in (
        report.screen(frame, known.suite),
        *((tmp_path / f"results.{end}").read_text() for end in ("md", "csv")),
    ):
        assert text.count("FPR95") == text.count(FPR_OPENOOD) + text.count(FPR_PAPER)


# ---------------------------------------------------------------- the leaderboard


def test_the_leaderboard_row_of_known_scores(tmp_path: Path) -> None:
    outcomes = [outcome("sandi-z", seed, title="S&I-Z") for seed in range(3)]
    runs = [run(found, seed=seed) for seed, found in enumerate(outcomes)]
    leaderboard.write(tmp_path, results(runs), runs, ABOUT)
    auroc = {
        name: [100 * detection(found.scored["known"].scores, found.scored[name].scores).auroc for found in outcomes]
        for name in GROUPS
    }
    far = [(texture + mnist) / 2 for texture, mnist in zip(auroc["texture"], auroc["mnist"], strict=True)]
    accuracy = [100 * np.mean(found.scored["known"].pred == found.scored["known"].labels) for found in outcomes]
    cells = [f"{np.mean(values):.2f} ± {np.std(values):.2f}" for values in (auroc["tin"], far, accuracy)]
    assert (tmp_path / "sandi-z/cifar100.csv").read_text() == (
        "Training,Postprocessor,Near-OOD_AUROC,Far-OOD_AUROC,ID_Accuracy,Outlier_Data,Arch,Additional_Description\n"
        f"CrossEntropy,S&I-Z,{','.join(cells)},No,resnet18_32x32,\n"
    )
    assert (tmp_path / "sandi-z/papers.csv").read_text() == (
        "Alias,Link\nS&I-Z,https://proceedings.mlr.press/v267/zhang25by.html\n"
    )
    assert "Complete" in (tmp_path / "sandi-z/README.md").read_text()


@pytest.mark.parametrize(
    "changes, about, reason",
    [
        ({"missing": MISSING}, {}, "svhn (far-OOD) is missing"),
        ({}, {"limit": 50}, "only 50 images"),
        ({}, {"protocol": "paper"}, "the OOD sets are not OpenOOD's"),
        ({}, {}, "1 network(s)"),
    ],
)
def test_an_incomplete_bundle_is_not_for_submission(
    tmp_path: Path, changes: dict[str, Any], about: dict[str, Any], reason: str
) -> None:
    known = run(outcome("sandi-z", 0), outcome("msp", 1, source="OpenOOD"), **changes)
    leaderboard.write(tmp_path, results([known], resamples=2), [known], ABOUT | about)
    assert [path.name for path in tmp_path.iterdir()] == ["sandi-z"]
    readme = (tmp_path / "sandi-z/README.md").read_text()
    assert "Incomplete, not for submission" in readme and reason in readme
    row = pd.read_csv(tmp_path / "sandi-z/cifar100.csv").iloc[0]
    assert (row["Far-OOD_AUROC"] == "/") == bool(changes)
    assert ("farood" in (tmp_path / "sandi-z/ood.csv").read_text()) != bool(changes)


# ---------------------------------------------------------------- the paper's tables


def test_published_averages_are_those_of_the_published_sets() -> None:
    published = paper_tables.PUBLISHED
    main = published[published["table"].isin(["1", "2"])].astype({"value": float})
    checked = 0
    for _, rows in main.groupby(["network", "method", "metric"]):
        values = rows.set_index("set")["value"]
        if len(values) > 1:
            assert len(values) == 6
            assert values["average"] == pytest.approx(values.drop("average").mean(), abs=0.006)
            checked += 1
    assert checked == 4
    assert (published["source"] != "").all()


def test_the_papers_main_table_has_published_values_beside_measured_ones() -> None:
    known = run(outcome("sandi-z", 0, title="S&I-Z"), missing=MISSING)
    frame = results([known], resamples=2)
    text = "\n".join(paper_tables.sections(frame, known))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| S&I |" in line]
    by_network = {row[1]: row[2:] for row in rows if len(row) == 14}
    assert by_network["ResNet-34, published"][:2] == ["15.68", "97.06"]
    assert by_network["ResNet-34, published"][-2:] == ["29.05", "94.93"]
    assert by_network["WRN-40-2, published"] == ["not at hand"] * 10 + ["38.61", "not at hand"]
    measured = frame[(frame["method"] == "sandi-z")].set_index("OOD set")
    here = by_network["resnet18_32x32, here"]
    assert here[:2] == ["not measured"] * 2  # SVHN
    assert here[4:6] == [f"{measured.loc['tin', FPR_PAPER]:.2f}", f"{measured.loc['tin', 'AUROC']:.2f}"]
    mean = measured.loc[["tin", "texture"], "AUROC"].mean()
    assert here[-1] == f"{mean:.2f} (2 of 5)"
    msp = [line for line in text.splitlines() if line.startswith("| MSP | ResNet-34, WRN-40-2, published")]
    assert len(msp) == 1 and msp[0].count("not at hand") == 12


def test_ablations_are_the_settings_that_differ_in_the_option_alone() -> None:
    z = {"variant": "Z"}
    known = run(
        outcome("sandi-z", 0, options=z),
        outcome("gaia-z", 1, options={**z, "steps": 1}),
        outcome("both", 2, options={**z, "steps": 1, "splitting": False}),
        outcome("large", 3, options={**z, "step_size": 0.002}),
        outcome("large union", 4, options={**z, "step_size": 0.002, "combine": "union"}),
        outcome("named", 5, options={**z, "splits": ["1", "4"]}),
        outcome("gsc", 6, options={"mask_ratio": 0.1}),
    )
    sections = paper_tables.sections(results([known], resamples=2), known)
    tables = {
        title.removeprefix("### Tables 3-5: "): "\n".join(sections[at + 1 : at + 3])
        for at, title in enumerate(sections)
        if title.startswith("### Tables 3-5")
    }
    assert list(tables) == ["attack (T = 1 is none) and layer splitting", "step size", "split points"]
    attack, step, split = tables.values()
    for name, rows in (("gaia-z", attack), ("both", attack), ("large", step), ("named", split)):
        assert f"| {name} |" in rows
    assert "union" not in "".join(tables.values()) and "gsc" not in "".join(tables.values())
    assert "not at hand" in attack
    lines = {line.split("|")[1].strip(): line for line in step.splitlines() if line.startswith("|")}
    assert "| large |" in lines["0.002"] and lines["0.002"].endswith("| 29.05 | 94.91 |")
    assert "not measured" in lines["0.0005"] and lines["0.0005"].endswith("| 29.03 | 94.93 |")


def test_throughput_is_relative_to_msp() -> None:
    known = run(outcome("msp", 0, source="OpenOOD", forwards=1.0), outcome("sandi-z", 1, forwards=2.5))
    text = paper_tables.sections(results([known], resamples=2), known)[-1]
    assert "| MSP | 16.9 | 1.00 | 100.0 | 1.00 |" in text
    assert "| GAIA | 6.4 | 2.64 | not measured | not measured |" in text
    assert "| S&I | 4.9 | 3.45 | 40.0 | 2.50 |" in text


# ---------------------------------------------------------------- pictures


@pytest.mark.slow
def test_pictures_are_drawn_and_small(tmp_path: Path) -> None:
    names = [f"method-{at}" for at in range(20)]
    found = [outcome(name, at, forwards=1 + at % 3 / 50) for at, name in enumerate(names)]
    known = run(outcome("msp", 30), outcome("sandi-z", 31, forwards=5), *found, missing=MISSING)
    paths = pictures.draw(tmp_path, results([known], resamples=2), known)
    paths.append(pictures.heat_maps(tmp_path / "heat_maps.png", known.suite, torch.device("cpu")))
    assert [path.name for path in paths] == ["histograms.png", "roc.png", "cost_auroc.png", "heat_maps.png"]
    for path in paths:
        assert 5_000 < path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20
