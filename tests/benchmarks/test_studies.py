"""The small studies: S&I-C's constants, subsets of training images, the attack's sign, what a fit costs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


import attack_sign
import bounded
import choose_constants
import fit_cost
import fit_subsets
import pandas as pd
import proved_share
from choose_constants import Constants
from comparison import sources
from comparison.corruptions import BLOCKS, CORRUPTIONS, Corrupted
from comparison.summaries import FromSummaries, rows
from sklearn.metrics import roc_auc_score

from openood_sandi import SandI, SandIC
from openood_sandi.detectors.options import options_of
from tests.helpers import tiny_suite


@pytest.fixture(autouse=True)
def _the_tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever data and network a case names."""
    monkeypatch.setattr(sources, "load", lambda options, seed=None: tiny_suite.suite())


# ---------------------------------------------------------------- S&I-C from summaries


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_scores_from_summaries_are_those_of_the_detector(labelled: bool) -> None:
    suite = tiny_suite.suite()
    assert suite.training is not None and suite.validation is not None
    x, y = next(iter(suite.training.loader(150)))
    y = y if labelled else torch.full_like(y, -1)
    val = next(iter(suite.validation[0].loader(20)))
    tests = [next(iter(images.loader(12)))[0] for images in suite.test_sets]
    detector = FromSummaries(suite.network, x)
    train, held, *known = (detector.read([(each, y)], "")[0] for each in (x, val[0], *tests))  # type: ignore[arg-type]
    for count in (150, 80):  # another fit from the same summaries
        detector.fit_to(rows(train, slice(0, count)), y[:count], held)
        plain = SandIC(suite.network).fit([(x[:count], y[:count])], [val])
        for images, summary in zip(tests, known, strict=True):
            torch.testing.assert_close(torch.tensor(detector.scores(summary)), plain(images)[1], rtol=1e-5, atol=1e-5)


def test_subsets_have_so_many_images_of_each_class_and_are_drawn_by_seed() -> None:
    labels = torch.arange(100) % 7
    labels[:50] = 3
    chosen = fit_subsets.subset(labels, 5, seed=0)
    assert len(set(chosen.tolist())) == len(chosen) == 35
    assert torch.bincount(labels[chosen]).tolist() == [5] * 7
    assert torch.equal(chosen, fit_subsets.subset(labels, 5, seed=0))
    assert not torch.equal(chosen.sort().values, fit_subsets.subset(labels, 5, seed=1).sort().values)
    assert torch.bincount(labels[fit_subsets.subset(labels, 1000, seed=0)]).tolist() == torch.bincount(labels).tolist()


def test_the_study_of_subsets(tmp_path: Path) -> None:
    arguments = [
        "--data digits",
        "--per-class",
        "5",
        "9",
        "--subsets",
        "3",
        "--gates",
        "1.5",
        "0.01",
        "--batch-size",
        "16",
        "--out",
        str(tmp_path),
    ]
    assert fit_subsets.main(arguments) == 0
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["command"].startswith("python benchmarks/fit_subsets.py '--data digits' --per-class 5 9")
    assert {"commit", "versions", "hardware"} <= told.keys()
    every = pd.DataFrame(told["every fit"])
    assert list(every["fitted to"]) == [
        *("energy", "max logit", "all", "all, gate 1.5", "all, gate 0.01"),
        *["5 a class"] * 3,
        *["9 a class"] * 3,
    ]
    assert list(every["images"]) == [0, 0, 150, 150, 150, 35, 35, 35, 63, 63, 63]
    assert every["far"][2] == every["far"][3] != every["far"][4]  # 1.5 is the default
    suite = tiny_suite.suite()
    with torch.no_grad():
        energy = [-suite.network(next(iter(images.loader(12)))[0]).logsumexp(1) for images in suite.test_sets]
    assert every["far"][0] == pytest.approx(100 * roc_auc_score([0] * 12 + [1] * 12, torch.cat(energy)))
    few = every[every["fitted to"] == "5 a class"]["far"]
    assert few.nunique() > 1
    (row,) = (row for row in told["summary"] if row["fitted to"] == "5 a class")
    assert row["far"] == f"{few.mean():.2f} ± {few.std(ddof=1):.2f}"
    assert f"| {row['far']} |" in (tmp_path / "results.md").read_text()


# ---------------------------------------------------------------- the constants


def test_the_defaults_that_are_told_of_are_those_of_the_detector() -> None:
    defaults = options_of(SandIC)
    for labelled, constants in choose_constants.DEFAULTS.items():
        assert constants in choose_constants.GRID
        assert (constants.base, constants.gate) == (defaults["base"], defaults["gate"])
        assert constants.floor == SandIC(tiny_suite.network()).floor and defaults["use_z"] == "auto"
        assert constants.z_gate == (None if labelled else constants.gate), "auto: where there is one prototype a layer"


def test_a_setting_scores_as_the_detector_with_these_options() -> None:
    suite = tiny_suite.suite()
    assert suite.training is not None and suite.validation is not None
    (x, labels), (held, _) = next(iter(suite.training.loader(150))), next(iter(suite.validation[0].loader(20)))
    detector = FromSummaries(suite.network, x)
    train, _ = detector.read([(x, labels)], "")  # type: ignore[arg-type]
    known, _ = detector.read([(held, labels[:20])], "")  # type: ignore[arg-type]
    detector.fit_to(train, labels, known)
    tests = {"ID": known, "near": rows(known, slice(0, 12)), **{name: rows(known, slice(3, 9)) for name in CORRUPTIONS}}
    for z_gate, use_z in ((None, "never"), (2.5, "always")):
        plain = SandIC(suite.network, base="energy", gate=0.5, use_z=use_z).fit([(x, labels)], [(held, labels[:20])])
        plain.floor, plain.z_gate = -1.0, z_gate
        scores = plain(held)[1]
        found = choose_constants._with(detector, Constants("energy", 0.5, -1.0, z_gate), tests)
        expected = 100 * roc_auc_score([0] * 20 + [1] * 12, torch.cat([scores, scores[:12]]))
        assert found["near"] == pytest.approx(expected, abs=0.3)


def test_the_rule_takes_the_best_mean_of_what_is_near_energy_on_every_network() -> None:
    def row(network: str, gate: float, near: float, far: float, base: str = "energy") -> dict[str, object]:
        return {"network": network, "base": base, "gate": gate, "floor": None, "z_gate": 1.0, "near": near, "far": far}

    found = pd.DataFrame(
        [
            *(row(network, 0, 80, 0, "energy alone") for network in "ab"),
            *(row("a", 1, 99, 99), row("b", 1, 79.7, 99)),  # the best on average, and too far below on b
            *(row("a", 2, 79.9, 90), row("b", 2, 79.9, 90)),
            *(row("a", 3, 82, 80), row("b", 3, 82, 80)),
        ]
    )
    ranked = choose_constants._ranked(found)
    assert ranked["gate"].tolist() == [1, 2, 3] and ranked["allowed"].tolist() == [False, True, True]
    assert ranked["worst near"].tolist() == pytest.approx([-0.3, -0.1, 2])
    assert ranked["mean"].tolist() == pytest.approx([94.175, 84.95, 81])
    one = choose_constants._one_at_a_time(ranked, Constants("energy", 2, None, 1.0))
    assert one[one["varied"] == "gate"]["gate"].tolist() == [1, 2, 3]


@pytest.mark.slow
def test_the_study_of_constants(tmp_path: Path) -> None:
    assert choose_constants.main(["--data digits", "--fit-on", "100", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "## Chosen with labels" in text and "The rule: of all constants whose near AUROC" in text
    every = pd.read_csv(tmp_path / "every_network.csv")
    assert every["base"].tolist() == ["energy alone", "max_logit+fdbd"] * 2


def test_corrupted_images_are_of_the_same_pixels_and_the_same_each_time() -> None:
    images = tiny_suite.images(3, 0, 5)
    found = {name: Corrupted(TensorDataset(images, torch.zeros(3)), each) for name, each in CORRUPTIONS.items()}
    for name, dataset in found.items():
        (first, label), (second, _) = dataset[0], dataset[1]
        assert label == -1 and len(dataset) == 3 and first.shape == images[0].shape, name
        assert torch.equal(first, dataset[0][0]) and not torch.equal(first, images[0]), name
        assert not torch.equal(first - images[0], second - images[1]), name
    permuted = found["permuted"][0][0]
    columns = {tuple(column) for column in images[0].flatten(1).T.tolist()}
    assert {tuple(column) for column in permuted.flatten(1).T.tolist()} == columns
    side = 16 // BLOCKS
    corners = [(i, j) for i in range(0, 16, side) for j in range(0, 16, side)]
    blocks = [
        tuple(image[:, i : i + side, j : j + side].flatten().tolist())
        for image in (images[0], found["shuffled"][0][0])
        for i, j in corners
    ]
    assert Counter(blocks[:16]) == Counter(blocks[16:]) and blocks[:16] != blocks[16:]
    torch.testing.assert_close(found["noise"][0][0].mean((1, 2)), images[0].mean((1, 2)), atol=0.25, rtol=0.2)


# ---------------------------------------------------------------- the attack's sign


class Plain(nn.Module):
    """Two rectifiers on maps, one in place, and one behind the pool, which is none of Z's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x), inplace=True)).relu_()
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


def test_signs_are_those_of_the_step_at_the_positions_that_it_can_close() -> None:
    torch.manual_seed(0)
    net, x, eta = Plain().eval(), tiny_suite.images(6, 0, 5), 0.02
    expected: Counter[str] = Counter()
    for image in x.split(1):
        a1 = net.conv1(image)
        a2 = net.conv2(a1.relu())
        logits = net.fc2(net.fc1(a2.relu().mean((2, 3))).relu())
        loss = -logits.log_softmax(1)[0, logits.argmax()]
        for a, gradient in zip((a1, a2), torch.autograd.grad(loss, (a1, a2)), strict=True):
            moved = a + eta * gradient.sign()
            assert not bool(((a <= 0) & (moved > 0)).any()), "what is closed never opens"
            expected["down"] += int(((a > 0) & (moved <= 0)).sum())
            expected["can"] += int(((a > 0) & (a <= eta)).sum())
            expected["open"] += int((a > 0).sum())
            expected["positions"] += a.numel()
    found = attack_sign.signs(net, x, eta)
    assert {name: found[name] for name in expected} == dict(expected) and 0 < expected["down"] < expected["can"]
    with pytest.raises(ValueError, match="calls silu: expected one whose activations are all ReLU"):
        attack_sign.signs(nn.Sequential(net.conv1, nn.SiLU()), x, eta)


def test_the_study_of_the_sign(tmp_path: Path) -> None:
    assert attack_sign.main(["--data digits", "--eta", "0.05", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["positions"]
    assert [row["set"] for row in rows] == ["known", "unknown"]
    assert "| 0.05 | known |" in (tmp_path / "results.md").read_text()
    for row in rows:
        assert row["down"] + row["up"] + row["not at all"] == pytest.approx(100) and row["an image"] > 0


# ---------------------------------------------------------------- what a fit costs


@pytest.mark.slow
def test_the_study_of_cost(tmp_path: Path) -> None:
    assert (
        fit_cost.main(["--data digits", "--images", "60", "--turns", "2", "--batch-size", "15", "--out", str(tmp_path)])
        == 0
    )
    rows = json.loads((tmp_path / "results.json").read_text())["time"]
    assert [(row["what"], row["images"]) for row in rows] == [
        *(("fit, labels", 60), ("score, labels", 1), ("score, labels", 15)),
        *(("fit, no labels", 60), ("score, no labels", 1), ("score, no labels", 15)),
    ]
    assert all(row["lower"] <= row["forwards"] <= row["upper"] for row in rows)


# ---------------------------------------------------------------- what is proved


def test_the_study_of_proofs(tmp_path: Path) -> None:
    assert proved_share.main(["--data digits", "--batch-size", "6", "--steps", "1", "3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["proved"]
    suite = tiny_suite.suite()
    assert [(row["set"], row["images"]) for row in rows] == [(each.name, len(each)) for each in suite.test_sets]
    for row, images in zip(rows, suite.test_sets, strict=True):
        for steps in (1, 3):
            detector = SandI(suite.network, variant="Z", steps=steps)
            detector.score(images.loader(6), progress=False)
            assert row[f"T={steps}"] == pytest.approx(100 * detector.proved_share)
    assert any(row["T=1"] for row in rows)


# ---------------------------------------------------------------- bounds


def test_the_study_of_bounds(tmp_path: Path) -> None:
    assert bounded.main(["--data digits", "--batch-size", "6", "--steps", "3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["bounds"]
    suite = tiny_suite.suite()
    known, unknown = suite.test_sets
    assert [(row["set"], row["T"], row["images"]) for row in rows] == [(known.name, 3, 12), (unknown.name, 3, 12)]
    exact = SandI(suite.network, variant="Z", steps=3, rectifier_shortcut=False)
    tau = [exact.score(images.loader(6), progress=False).score.astype(float) for images in (known, unknown)]
    bounds = SandI(suite.network, variant="Z", steps=3).bounds(torch.stack([image for image, _ in unknown.dataset]))
    threshold = sorted(tau[0])[11]  # the 95 % quantile of twelve
    assert rows[1]["half-width %"] == pytest.approx(float((bounds.half_width / tau[1]).max()) * 100, rel=1e-3)
    assert rows[1]["proved %"] == 100 * float(bounds.proved.double().mean())
    assert rows[1]["above %"] == pytest.approx(100 * float((bounds.high > threshold).double().mean()))
    greater = (tau[1][:, None] > tau[0]) + 0.5 * (tau[1][:, None] == tau[0])
    assert rows[1]["AUROC tau"] == pytest.approx(100 * greater.mean())
    assert rows[0]["outside"] == rows[1]["outside"] == 0 and rows[0]["AUROC tau"] is None
