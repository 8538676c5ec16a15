"""Chooses the constants of S&I-C on validation data alone.

    python benchmarks/choose_constants.py "--data cifar10 --network resnet20" "--data cifar100 --network ..." --out OUT

No test image is looked at. Prototypes are of training images, evenly spaced through their list; of the ID validation
images every other one gives means and deviations, and the rest are told from OpenOOD's OOD validation set
(TinyImageNet: near-OOD) and from themselves corrupted (:mod:`comparison.corruptions`: far-OOD). The rule was written
down before the first run:

    of all constants whose near AUROC is at least energy's - 0.2 on every network, those with the largest mean over
    networks of (near + far) / 2; far is the mean over the corruptions

with labels, and without them (one prototype a layer). Every image passes its network once.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from comparison.cases import Study
from comparison.console import positive
from comparison.corruptions import CORRUPTIONS, Corrupted
from comparison.suite import Suite
from comparison.summaries import FromSummaries, rows
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, Subset

from openood_sandi.detectors.sandi.calibrated import FLOOR
from openood_sandi.detectors.sandi.calibrated_summary import Summary

MARGIN = 0.2
"""How much less than energy's the near AUROC may be, in %."""
TEXT = """\
{rule}

Near, far: AUROC in %, means over networks; mean: their mean; worst near: the least near AUROC less energy's, over
networks. "Chosen" are the best ten by the rule, "defaults" what S&I-C has without any option. "One at a time" changes
one constant of the defaults. A floor or z_gate of "nan" is none: Z does not count then."""


@dataclass(frozen=True)
class Constants:
    """A setting of S&I-C. ``z_gate`` None: Z does not count; ``floor`` None: there is none."""

    base: str
    gate: float
    floor: float | None
    z_gate: float | None


BASES = ("max_logit+fdbd", "max_logit", "energy")
GATES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
FLOORS = (None, -3.0, -2.0, -1.0)
Z_GATES = (None, 1.0, 1.5, 2.0, 2.5)
GRID = [Constants(*each) for each in itertools.product(BASES, GATES, FLOORS, Z_GATES)]
DEFAULTS = {True: Constants("max_logit+fdbd", 1.5, FLOOR, None), False: Constants("max_logit+fdbd", 1.5, FLOOR, 1.5)}
"""With labels and without."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    study = Study("benchmarks/choose_constants.py", __doc__)
    study.parser.add_argument("--fit-on", type=positive, default=2000, help="training images; default: %(default)s")
    options = study.start(sys.argv[1:] if arguments is None else arguments)
    found = pd.DataFrame(
        {"network": name, **row}
        for name, suite in study.suites()
        for row in _tried(suite.fitted_to(options.fit_on), options.batch_size)
    )
    tables: dict[str, pd.DataFrame] = {}
    for labelled, title in ((True, "with labels"), (False, "without labels")):
        ranked = _ranked(found[found["labelled"] == labelled])
        tables[f"chosen {title}"] = ranked[ranked["allowed"]].head(10)
        tables[f"defaults {title}"] = ranked[_matches(ranked, DEFAULTS[labelled])]
        tables[f"one at a time {title}"] = _one_at_a_time(ranked, DEFAULTS[labelled])
    tables["every network"] = found[[_is_default_or_energy(row) for row in found.to_dict("records")]]
    rule = (__doc__ or "").partition("\n\n    of all")[2].partition("\n\n")[0]
    study.write("The constants of S&I-C", TEXT.format(rule=f"The rule: of all {' '.join(rule.split())}."), tables)
    return 0


# ---------------------------------------------------------------------- one network


def _tried(suite: Suite, batch_size: int) -> Iterator[dict[str, object]]:
    assert suite.training is not None and len(suite.validation or ()) == 2, "expected training and validation images"
    known, unknown = suite.validation or ()
    detector = FromSummaries(suite.network, next(iter(known.loader(1)))[0])
    train, labels = detector.read(suite.training.to_fit_on(batch_size), "training")
    held, _ = detector.read(known.to_fit_on(batch_size), "validation")
    seen = Subset(known.dataset, range(1, len(known), 2))
    others = {
        name: detector.read(DataLoader(Corrupted(seen, corruption), batch_size), name)[0]
        for name, corruption in CORRUPTIONS.items()
    }
    others = {"near": detector.read(unknown.to_fit_on(batch_size), "near")[0], **others}
    tests = {"ID": rows(held, slice(1, None, 2)), **others}
    energy = _auroc({name: each.energy.numpy() for name, each in tests.items()})
    for labelled, given in ((True, labels), (False, torch.full_like(labels, -1))):
        yield {"labelled": labelled, "base": "energy alone", **energy}
        detector.fit_to(train, given, rows(held, slice(0, None, 2)))
        for constants in GRID:
            yield {"labelled": labelled, **asdict(constants), **_with(detector, constants, tests)}


def _with(detector: FromSummaries, constants: Constants, tests: dict[str, Summary]) -> dict[str, float]:
    detector.base, detector.gate, detector.z_gate = constants.base, constants.gate, constants.z_gate
    detector.floor = -math.inf if constants.floor is None else constants.floor
    detector.use_z = "never" if constants.z_gate is None else "always"
    return _auroc({name: detector.scores(each) for name, each in tests.items()})


def _auroc(scores: dict[str, np.ndarray]) -> dict[str, float]:
    known = scores["ID"]
    found = {}
    for name in (name for name in scores if name != "ID"):
        truth = np.repeat([0, 1], [len(known), len(scores[name])])
        found[name] = 100 * float(roc_auc_score(truth, np.concatenate([known, scores[name]])))
    return {**found, "far": float(np.mean([found[name] for name in CORRUPTIONS]))}


# ---------------------------------------------------------------------- over networks


def _ranked(found: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting: means over networks, and whether near is within the margin of energy's everywhere."""
    energy = found[found["base"] == "energy alone"].set_index("network")["near"]
    tried = found[found["base"] != "energy alone"].copy()
    tried["worst near"] = tried["near"] - tried["network"].map(energy)
    columns = list(asdict(GRID[0]))
    grouped = tried.groupby(columns, dropna=False, sort=False)
    ranked = grouped.agg({"near": "mean", "far": "mean", "worst near": "min"}).reset_index()
    ranked["mean"] = (ranked["near"] + ranked["far"]) / 2
    ranked["allowed"] = ranked["worst near"] >= -MARGIN
    ranked = ranked.sort_values("mean", ascending=False, kind="stable").reset_index(drop=True)
    ranked.insert(0, "rank", ranked.index + 1)
    return ranked


def _matches(ranked: pd.DataFrame, constants: Constants, but: str | None = None) -> pd.Series:
    """Which rows have these constants, one of them left aside."""
    same = pd.Series(True, index=ranked.index)
    for name, value in asdict(constants).items():
        if name != but:
            same &= ranked[name].isna() if value is None else ranked[name] == value
    return same


def _one_at_a_time(ranked: pd.DataFrame, constants: Constants) -> pd.DataFrame:
    parts = [ranked[_matches(ranked, constants, name)].sort_values(name) for name in asdict(constants)]
    varied = [pd.Series(name, index=part.index) for name, part in zip(asdict(constants), parts, strict=True)]
    joined = pd.concat(parts)
    joined.insert(0, "varied", pd.concat(varied))
    return joined


def _is_default_or_energy(row: dict[str, object]) -> bool:
    default = asdict(DEFAULTS[bool(row["labelled"])])
    missing = {name: None if pd.isna(row[name]) else row[name] for name in default}
    return row["base"] == "energy alone" or missing == default


if __name__ == "__main__":
    sys.exit(main())
