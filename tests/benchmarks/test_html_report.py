"""report.html: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

for module in ("jinja2", "matplotlib", "pandas", "plotly", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')

from comparison import curves, html_report, mistakes
from comparison.attribution import attribution_maps, over_all_splits
from comparison.evaluation import Failure, Outcome, Scored
from comparison.metrics import detection
from comparison.suite import ImageSet
from comparison.table import FPR_PAPER, Run, results
from PIL import Image
from sklearn.metrics import roc_curve

from tests.helpers import browser
from tests.helpers.known_scores import ABOUT, outcome, run

RECORD: dict[str, Any] = ABOUT | {"commit": "0123abc", "openood_commit": None}
CPU = torch.device("cpu")


def page(known: Run, failures: tuple[Failure, ...] = ()) -> str:
    return html_report.html(results([known], resamples=2), [known], failures, RECORD, CPU)


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    parsed: dict[str, Any] = json.loads(found[1], parse_constant=refused)
    return parsed


def small() -> Run:
    return run(
        outcome("msp", 0, source="OpenOOD", forwards=1.0),
        outcome("sandi-z", 1, options={"variant": "Z"}),
        outcome("odin", 2, source="OpenOOD"),
    )


class Page(HTMLParser):
    """Checks that tags are closed in their order, and keeps what the file asks for from outside, and its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        address = told.get("src") or (told.get("href") if tag == "link" else "")
        if address and not address.startswith("data:"):
            self.outside.append(address)
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.rows and self.open and self.open[-1] in ("td", "th", "button"):
            self.rows[-1][-1] += text


# ---------------------------------------------------------------- the file


def test_the_file_is_whole_and_holds_the_table_and_the_provenance() -> None:
    known = small()
    text = page(known, (Failure("knn", "it needs training images"),))
    parsed = Page(text)
    assert not parsed.open and not parsed.outside
    row = next(row for row in parsed.rows if row[0] == "odin")
    frame = results([known], resamples=2).set_index(["method", "OOD set"])
    assert f"{frame.loc[('odin', 'tin'), 'AUROC']:.2f}" in row
    for told in (RECORD["command"], "0123abc", "a processor", known.suite.weights, "No row for knn: it needs training"):
        assert told in text
    assert "Table 1: CIFAR-100" in text and "resnet18_32x32, here (sandi-z)" in text


def test_names_from_outside_cannot_break_the_page() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    unknown = ImageSet(evil, "far", TensorDataset(torch.rand(20, 3, 8, 8)), evil, "x")
    known = small()
    outcomes = {
        name: dataclasses.replace(found, scored={**found.scored, evil: found.scored["texture"]})
        for name, found in known.outcomes.items()
    }
    suite = dataclasses.replace(
        known.suite, network_name=evil, network_description=evil, missing=(evil,), out_of_distribution=(unknown,)
    )
    text = page(Run(0, suite, outcomes))
    assert evil not in text and "<img src=x" not in text
    assert data_of(text)["sets"][1]["name"] == evil


def test_charts_are_of_the_scores() -> None:
    known = small()
    data = data_of(page(known))
    frame = results([known], resamples=2).set_index(["method", "OOD set"])
    assert [method["name"] for method in data["methods"]] == ["msp", "sandi-z", "odin"]
    for method in data["methods"]:
        scored = known.outcomes[method["name"]].scored
        kept = np.sort(scored["known"].scores)[37]  # the 38th of 40: 95 %
        assert method["threshold"] == pytest.approx(kept, rel=1e-4) and method["kept"] == 0.95
        for name in ("tin", "texture", "mnist"):
            found, scores = method["sets"][name], scored[name].scores
            assert found["let_in"] == pytest.approx(np.mean(scores <= kept), rel=1e-4)
            assert found["let_in"] == pytest.approx(frame.loc[(method["name"], name), FPR_PAPER] / 100, rel=1e-4)
            assert found["auroc"] == pytest.approx(100 * detection(scored["known"].scores, scores).auroc, rel=1e-4)
            assert np.trapezoid(found["caught"], found["lost"]) == pytest.approx(found["auroc"] / 100, abs=2e-3)
            assert sum(found["known"]) == pytest.approx(1, rel=1e-3) == sum(found["unknown"])


def test_the_threshold_is_fitted_to_validation_images_where_there_are_some() -> None:
    known = small()
    found = known.outcomes["msp"]
    scores = np.arange(100.0)
    val = Scored(np.zeros(100, int), np.zeros(100, int), scores)
    images = dataclasses.replace(known.suite.in_distribution, name="val")
    suite = dataclasses.replace(known.suite, validation=(images, images))
    outcomes = {"msp": dataclasses.replace(found, scored={**found.scored, "val": val})}
    (method,) = data_of(page(Run(0, suite, outcomes)))["methods"]
    assert (method["fitted"], method["threshold"], method["kept"]) == ("val", 94, 1)  # 0 to 94 are 95


def test_a_thin_curve_and_a_binned_histogram_stay_near_all_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(0, 1, 10_000), np.r_[rng.normal(1, 2, 9_000), np.full(1_000, 0.3)]
    lost, caught = curves.roc(known, unknown)
    assert len(lost) <= curves.POINTS and (lost[0], caught[0], lost[-1], caught[-1]) == (0, 0, 1, 1)
    full_lost, full_caught, _ = roc_curve(np.repeat([0, 1], 10_000), np.r_[known, unknown])
    way = np.interp(full_lost + full_caught, lost + caught, caught)  # along the curve, as some of it is upright
    assert np.abs(way - full_caught).max() < 0.01
    binned = curves.histogram(known, unknown)
    middle = np.mean((known >= binned.low) & (known < (binned.low + binned.high) / 2))
    assert binned.known[1:25].sum() == pytest.approx(middle, abs=0.02) and binned.known.sum() == pytest.approx(1)
    same = curves.histogram(np.ones(5), np.ones(5))
    assert same.low < 1 < same.high and same.known.sum() == 1


# ---------------------------------------------------------------- the images


def decoded(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def test_the_images_are_those_that_the_method_gets_most_wrong() -> None:
    known = small()
    data = data_of(page(known))
    for method in data["methods"]:
        scored = known.outcomes[method["name"]].scored
        rejected, accepted = method["wrong"]
        assert [one["at"] for one in rejected] == np.argsort(-scored["known"].scores)[:6].tolist()
        pooled = sorted((score, name) for name in ("tin", "texture", "mnist") for score in scored[name].scores)[:6]
        assert [(one["images"], pytest.approx(one["score"])) for one in accepted] == [(n, s) for s, n in pooled]
        for one in (*rejected, *accepted):
            images = next(images for images in known.suite.test_sets if images.name == one["images"])
            shown = decoded(data["pictures"][one["picture"]]["image"])
            mean, std = 0.5, 0.25
            expected = (images.dataset[one["at"]][0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() * 255
            assert np.abs(shown - expected).max() <= 0.51
            assert one["label"] == scored[one["images"]].labels[one["at"]]
            assert one["pred"] == scored[one["images"]].pred[one["at"]]


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        (lambda label: f"class{label}", True),  # a folder each
        (lambda label: f"part{label % 2}", False),  # several in one
        (lambda label: ".", False),
    ],
)
def test_classes_are_called_as_the_folders_of_their_images(folder: Callable[[int], str], named: bool) -> None:
    known = small()
    labels = known.outcomes["msp"].scored["known"].labels.tolist()
    names = [f"test/{folder(label)}/{number}.png" for number, label in enumerate(labels)]
    images = dataclasses.replace(known.suite.in_distribution, names=names)
    suite = dataclasses.replace(known.suite, in_distribution=images)
    classes = data_of(page(dataclasses.replace(known, suite=suite)))["classes"]
    assert classes == ({str(label): f"class{label}" for label in labels} if named else {})


def test_maps_are_where_the_attribution_is() -> None:
    known = small()
    found, reason = mistakes.pictures([("known", 3), ("tin", 5)], known.suite, CPU)
    assert not reason
    images = torch.stack([known.suite.in_distribution.dataset[3][0]])
    expected = over_all_splits(attribution_maps(known.suite, images, CPU))[0]
    picture = found["known", 3]
    assert picture.map and picture.most == pytest.approx(expected.max(), rel=1e-4)
    wanted = mistakes.PALETTE[(expected / expected.max() * 255).round().astype(int)]
    assert np.abs(decoded(picture.map).astype(int) - wanted).max() <= 3  # a rounding step of the palette


def test_a_network_without_maps_has_pictures_and_the_reason() -> None:
    known = small()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 100)).eval()
    text = page(dataclasses.replace(known, suite=dataclasses.replace(known.suite, network=linear)))
    data = data_of(text)
    assert "There are no maps here" in text
    assert all(picture["map"] is None and picture["image"] for picture in data["pictures"])


def big(methods: int, count: int, side: int) -> Run:
    """Noise, which no format of images makes small."""
    rng = np.random.default_rng(0)

    def scored(label: int) -> Scored:
        return Scored(np.zeros(count, int), np.full(count, label), rng.normal(size=count))

    class Noise(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.randn(3, side, side, generator=torch.Generator().manual_seed(index)), 0

    names = ("known", "tin", "svhn", "texture", "places365", "mnist")
    sets = [ImageSet(name, "ID" if name == "known" else "far", Noise(), "noise", name) for name in names]
    found: dict[str, Outcome] = {}
    for at in range(methods):
        scores = {name: scored(0 if name == "known" else -1) for name in names}
        found[f"m{at}"] = dataclasses.replace(outcome(f"m{at}", at), scored=scores)
    known = run(in_distribution=sets[0], out_of_distribution=tuple(sets[1:]))
    return Run(0, known.suite, found)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [3, 60])
def test_ten_thousand_images_take_less_than_15_mb(methods: int) -> None:
    assert 4e6 < len(page(big(methods, 10_000, 224)).encode()) < 15e6


# ---------------------------------------------------------------- in a browser

VISIT = """
const table = document.querySelector("table.sortable"), heads = [...table.tHead.rows[1].cells];
const column = (at) => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
const click = (at) => { heads[at].querySelector("button").click(); return column(at); };
const told = {before: column(0), falling: click(1), rising: click(1), names: click(0)};
document.querySelector('button.method[data-method="odin"]').click();
const viewer = document.getElementById("viewer");
told.method = document.getElementById("method").value;
told.threshold = document.getElementById("threshold").textContent;
told.plots = document.querySelectorAll(".plot .main-svg").length;
told.bars = document.querySelectorAll("#charts .bars path").length;
told.closed = viewer.open;
const images = document.querySelectorAll("#wrong-id button");
images[0].click();
told.images = images.length;
told.opened = viewer.open;
told.told = viewer.querySelector(".told").textContent;
told.map = viewer.querySelector("img.map").src.slice(0, 15);
return told;
"""


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)
def test_a_browser_shows_sorts_and_opens_an_image_without_an_error(tmp_path: Path) -> None:
    known = small()
    file = tmp_path / "report.html"
    file.write_text(page(known), encoding="utf-8")
    told, console = browser.visit(file, VISIT, tmp_path)
    assert console == []
    first = [float(text.split()[0]) for text in told["falling"]]
    assert first == sorted(first, reverse=True) and told["rising"] == told["falling"][::-1]
    assert told["before"] == ["msp", "sandi-z", "odin"] and told["names"] == ["msp", "odin", "sandi-z"]
    assert told["method"] == "odin" and "keeps 95.0 % of the ID test images" in told["threshold"]
    assert told["plots"] >= 6 and told["bars"] >= 300
    assert not told["closed"] and told["opened"] and told["images"] == 6
    worst = int(np.argmax(known.outcomes["odin"].scored["known"].scores))
    assert f"class {worst}, predicted class" in told["told"] and told["map"] == "data:image/png;"


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)
def test_a_page_with_an_error_is_seen_to_have_one(tmp_path: Path) -> None:
    file = tmp_path / "broken.html"
    file.write_text("<script>missing()</script><img src='https://example.org/a.png'>")
    told, console = browser.visit(file, "return 1;", tmp_path)
    assert told == 1 and any("missing" in line for line in console)
