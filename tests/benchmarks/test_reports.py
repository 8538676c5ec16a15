"""Tables, the leaderboard's rows, the paper's tables and pictures of known scores."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for module in ("adjustText", "matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


import pandas as pd
from comparison import leaderboard, metrics, pictures, report
from comparison.evaluation import Failure, Scored
from comparison.metrics import detection
from comparison.table import DECISION, FPR_OPENOOD, FPR_PAPER, METRICS, Run, results
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tests.helpers.known_scores import ABOUT, COUNTS, GROUPS, outcome, run

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
    assert frame.loc[("near", "tin"), ["AUROC min", "AUROC max"]].to_list() == pytest.approx([min(values), max(values)])
    low, high = (frame.loc[("near", "tin"), f"AUROC {end}"] for end in ("low", "high"))
    one = results(runs[:1]).set_index(["group", "OOD set"]).loc[("near", "tin")]
    assert low < np.mean(values) < high
    assert high - low < one["AUROC high"] - one["AUROC low"], "of the mean over networks"
    assert f"{np.mean(values):.2f} +- {np.std(values):.2f} [{low:.2f}, {high:.2f}]" in report.screen(
        frame.reset_index(), runs[0].suite
    )


def test_decisions_are_those_of_a_threshold_on_validation_images() -> None:
    known = run(outcome("a", 0))
    assert results([known], resamples=3)[list(DECISION)].isna().all(axis=None), "there are no validation images"
    scored = dict(known.outcomes["a"].scored)
    scored["known"] = Scored(*(np.zeros(40, dtype=np.int64),) * 2, np.arange(40.0))
    scored["tin"] = Scored(*(np.zeros(30, dtype=np.int64),) * 2, np.arange(30.0) + 15)
    scored["val"] = Scored(*(np.zeros(20, dtype=np.int64),) * 2, np.arange(20.0))  # 19 of them are at most 18
    suite = replace(known.suite, validation=(replace(known.suite.in_distribution, name="val"),))
    run_ = replace(known, suite=suite, outcomes={"a": replace(known.outcomes["a"], scored=scored)})
    row = results([run_], resamples=3).set_index("OOD set").loc["tin"]
    assert row["ID lost at threshold"] == pytest.approx(100 * 21 / 40)
    assert row["OOD let in at threshold"] == pytest.approx(100 * 4 / 30)


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
    read = pd.DataFrame(record["results"]).astype(frame.dtypes.to_dict())  # a column of nulls has no type
    pd.testing.assert_frame_equal(read, frame)
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


# ---------------------------------------------------------------- pictures


def many() -> Run:
    found = [outcome(f"method-{at}", at, forwards=1 + at % 3 / 50) for at in range(20)]
    return run(outcome("msp", 30, title="MSP"), outcome("sandi-z", 31, forwards=5, title="S&I-Z"), *found)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.slow
def test_pictures_are_drawn_and_small(tmp_path: Path) -> None:
    known = many()
    paths = pictures.draw(tmp_path, results([known], resamples=2), known)
    paths.append(pictures.heat_maps(tmp_path / "heat_maps.png", known.suite, torch.device("cpu")))
    assert [path.name for path in paths] == ["histograms.png", "roc.png", "cost_auroc.png", "heat_maps.png"]
    for path in paths:
        assert 5_000 < path.stat().st_size < 300_000
        with Image.open(path) as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize("seeds", [1, 2])
def test_pictures_say_whose_scores_they_show_where_auroc_is_a_mean(seeds: int) -> None:
    runs = [run(outcome("msp", seed), seed=seed) for seed in range(seeds)]
    frame = results(runs, resamples=2)
    for draw in (pictures.histograms, pictures.roc_curves):
        assert any("network of seed 0, AUROC the mean" in text for text in texts(draw(frame, runs[0]))) == (seeds > 1)


def test_every_method_is_in_the_grid_and_legends_have_the_auroc_by_the_tables_names() -> None:
    known = many()
    frame = results([known], resamples=2)
    auroc = frame.set_index(["method", "OOD set"])["AUROC"]
    grid = texts(pictures.histograms(frame, known))
    for name in known.outcomes:
        assert name in grid
        assert all(f"{auroc[name, place]:.1f}" in grid for place in GROUPS)
    labels = texts(pictures.roc_curves(frame, known))
    assert all(
        f"{name} {auroc[name, place]:.1f}" in labels for name in ("msp", "sandi-z", "method-3") for place in GROUPS
    )
    assert "ID images lost, % (14 more methods in report.html)" in labels
    assert not {"MSP", "S&I-Z"} & {*grid, *labels}


def test_labels_of_costs_do_not_collide_and_points_have_their_spread() -> None:
    known = many()
    frame = results([known], resamples=20)
    figure = pictures.cost_against_auroc(frame, known)
    figure.canvas.draw()
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.texts if text.get_text() in known.outcomes]
        assert len(boxes) == len(known.outcomes)
        assert not [(one, other) for one, other in combinations(boxes, 2) if one.overlaps(other)]
    rows = frame[(frame["group"] == "near") & (frame["OOD set"] == "average")].set_index("method")
    bars = [bar for container in figure.axes[0].containers for bar in container.lines[2]]
    ends = {tuple(np.round(np.ptp(bar.get_segments()[0], axis=0), 6)) for bar in bars}
    row = rows.loc["sandi-z"]
    assert (round(row["forwards (Q3)"] - row["forwards (Q1)"], 6), 0.0) in ends
    assert (0.0, round(row["AUROC high"] - row["AUROC low"], 6)) in ends


def test_heat_maps_lie_over_the_images_with_a_colour_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure) or path)
    pictures.heat_maps(tmp_path / "x.png", many().suite, torch.device("cpu"))
    panels = [panel for panel in drawn[0].axes if panel.images]
    over = [panel.images for panel in panels if len(panel.images) == 2]
    assert len(over) == len(panels) - 5  # the images alone: two ID, three OOD
    assert {(image.get_cmap().name, map_.get_cmap().name) for image, map_ in over} == {("gray", "inferno")}
    assert len({map_.get_clim() for _, map_ in over}) == 1  # one scale, that of the bar
    assert "attribution, times the image's mean" in [panel.get_ylabel() for panel in drawn[0].axes]
