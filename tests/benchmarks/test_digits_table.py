"""README's table of the first command is that of the committed results of the oldest and the newest torch."""

from __future__ import annotations

import csv
import math
import re

import pytest

from tests.helpers.places import BENCHMARKS, ROOT
from tests.test_documents import METHODS

SETS = ("letters", "photos", "noise")
CELL = re.compile(r"([\d.]+) ± ([\d.]+) \(([\d.]+) to ([\d.]+)\)")


def results(folder: str) -> dict[tuple[str, str], dict[str, float]]:
    """{(method, set): mean, std, min and max of the AUROC}"""
    with (BENCHMARKS / "results" / folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = ("", " std", " min", " max")
    return {(row["method"], row["OOD set"]): {part: float(row[f"AUROC{part}"]) for part in parts} for row in rows}


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_the_tables_are_those_of_the_results(document: str) -> None:
    both = results("digits"), results("digits_torch_2.6")
    lines = [line for line in (ROOT / document).read_text().splitlines() if CELL.search(line)]
    named = {line.split("|")[1].strip(): CELL.findall(line) for line in lines}
    assert {"MSP", "GAIA-Z", "S&I-Z", "S&I-A"} <= named.keys()
    for title, cells in named.items():
        for place, shown in zip(SETS, cells, strict=True):
            found = [one[METHODS.get(title, title.lower()), place] for one in both]
            mean = sum(one[""] for one in found) / 2
            spread = math.sqrt(sum(one[" std"] ** 2 + (one[""] - mean) ** 2 for one in found) / 2)
            wanted = mean, spread, min(one[" min"] for one in found), max(one[" max"] for one in found)
            assert [float(value) for value in shown] == pytest.approx(wanted, abs=0.051), (title, place)
