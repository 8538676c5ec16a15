"""Documents say what is so: paths and links, options, the map of the package, detectors, figures."""

from __future__ import annotations

import csv
import inspect
import math
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest

from openood_sandi import SandI
from openood_sandi.plugin import registry, seams
from tests.helpers.places import BENCHMARKS, DOCUMENTS, ROOT

#: A path of this repository in a document's code.
PATH = re.compile(r"`((?:tests|benchmarks|docs|configs|openood_sandi)/[\w./]*)`")
#: [text](target) of a link or picture that is no address.
LINK = re.compile(r"\]\(([^)#:]+)(?:#[\w-]+)?\)")


def test_paths_and_links_in_documents_exist() -> None:
    example = "mean_gradient"  # the detector that docs/add_a_detector.md adds
    for file in DOCUMENTS:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
        targets = [file.parent / link for link in LINK.findall(text)]
        if file.name != "CHANGELOG.md":  # which also names what is gone
            targets += [ROOT / path for path in PATH.findall(text) if example not in path]
        assert not [str(target) for target in targets if not target.exists()], file


def test_documents_call_the_data_folder_data() -> None:
    assert not [file.name for file in DOCUMENTS if "../shared" in file.read_text(encoding="utf-8")]


def test_the_commands_for_tests_are_those_of_ci(pytestconfig: pytest.Config) -> None:
    markers = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    command = re.compile(r'pytest -n auto(?: -p no:cacheprovider)?(?: -m "not (\w+)")?')
    left_out = {
        file: set(command.findall((ROOT / file).read_text(encoding="utf-8")))
        for file in ("README.md", "CONTRIBUTING.md", ".ci/run")
    }
    assert left_out["README.md"] == left_out[".ci/run"] == {"", "long"}
    assert left_out["CONTRIBUTING.md"] == {"", "long", "slow"}
    assert {"long", "slow"} <= markers


@pytest.mark.slow
def test_long_implies_slow() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    file = "tests/runs/test_soak.py"
    listed = subprocess.run([*command, file], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "test_growth_is_told_from_noise" in listed and "in_a_long_run" not in listed


def test_the_map_of_the_package_is_complete() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"^\| `(openood_sandi/\S+\.py)` \|", text, re.M))
    modules = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("openood_sandi/**/*.py")}
    assert mapped == {file for file in modules if not re.fullmatch(r"openood_sandi/.+/__init__\.py", file)}


def test_options_have_the_documented_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "docs/options.md").read_text(encoding="utf-8"), re.M)
    parameters = [each for each in inspect.signature(SandI).parameters.values() if each.kind is each.KEYWORD_ONLY]
    assert [name for name, _ in rows] == [parameter.name for parameter in parameters]
    values = {"auto": "auto", "inf": math.inf, "True": True, "1e-3": 1e-3}
    for (_, shown), parameter in zip(rows, parameters, strict=True):
        assert str(values.get(shown, shown)) == str(parameter.default), parameter.name


def test_security_names_every_module_of_openood_that_is_changed() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(openood\.[\w.]+)`", text)) - {registry.GROUP}
    assert named == set(seams.SEAMS) and len(named) == 6 and "six of OpenOOD's modules" in text


def test_the_table_of_detectors_is_that_of_the_registry() -> None:
    table = runpy.run_path(str(ROOT / "docs/hooks/detector_table.py"))["table"]
    own = [info for name, info in registry.infos().items() if name in registry.DETECTORS]
    assert table(own) in (ROOT / "docs/detectors.md").read_text(encoding="utf-8")


def test_a_detector_from_outside_has_a_row_of_that_table() -> None:
    about = {"name": "mine", "label": "Mine", "title": "T", "url": "https://a.b", "venue": "V", "year": 2026}
    table = runpy.run_path(str(ROOT / "docs/hooks/detector_table.py"))["table"]
    row = "| `mine` | Mine | [T](https://a.b), V 2026 | training images |"
    assert table([SimpleNamespace(**about, needs="training images")]).splitlines()[-1] == row


#: Names in the documents' tables of results that are not those of the results' files in small letters.
METHODS = {"energy": "ebo", "max logit": "mls", "Prototype Fusion": "prototype_fusion"}
METHODS |= {"**S&I-C**": "sandi_c", "S&I-Z": "sandi-z", "S&I-A": "sandi-a", "S&I-Z, last stage": "sandi-z-last-stage"}

CIFAR = [("near average", "AUROC"), ("far mnist", "AUROC"), ("far texture", "AUROC")]
GROUPS = [("near average", "AUROC"), ("far average", "AUROC")]


@pytest.mark.parametrize(
    ("document", "heading", "columns"),
    [
        ("README.md", "What comes out", {"cifar10_resnet56_sandi": CIFAR, "cifar100_resnet18_sandi": CIFAR}),
        (
            "docs/results.md",
            "CIFAR by the present version",
            {"cifar10_resnet20_sandi": CIFAR, "cifar10_resnet56_sandi": CIFAR, "cifar100_resnet18_sandi": CIFAR},
        ),
        (
            "docs/results.md",
            "CIFAR, with",
            {"cifar10_resnet20": CIFAR, "cifar10_resnet56": CIFAR, "cifar100_resnet18": CIFAR},
        ),
        (
            "docs/results.md",
            "S&I-C",
            {
                "cifar10_resnet20_sandi_c": GROUPS,
                "cifar10_resnet56_sandi_c": GROUPS,
                "cifar10_densenet100_sandi_c": GROUPS,
                "cifar100_resnet18_sandi_c": GROUPS,
                "cifar100_densenet100_sandi_c": GROUPS,
                "imagenet_efficientnet_lite0_sandi_c": [("far textures", "AUROC"), ("far mnist", "AUROC")],
            },
        ),
    ],
)
def test_figures_are_those_of_the_results(
    document: str, heading: str, columns: dict[str, list[tuple[str, str]]]
) -> None:
    measured = {run: figures_of(run) for run in columns}
    if "cifar100_resnet18" in measured:  # run again with GSC's default; the document says so
        measured["cifar100_resnet18"]["gsc"] = figures_of("cifar100_resnet18_gsc")["gsc"]
    text = (ROOT / document).read_text(encoding="utf-8").partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) ((?:\| [\d.]+ )+)\|$", text, re.M)
    assert len(rows) > 5
    for title, shown in rows:
        method = METHODS.get(title, title.lower())
        expected = [measured[run][method][figure] for run, figures in columns.items() for figure in figures]
        assert [float(figure) for figure in shown.split("|")[1:]] == pytest.approx(expected, abs=0.051), title


def figures_of(run: str) -> dict[str, dict[tuple[str, str], float]]:
    """{method: {(group and set, column): figure}} of a committed run of the comparison."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    with open(BENCHMARKS / "results" / run / "results.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            images = f"{row['group']} {row['OOD set']}"
            found.setdefault(row["method"], {})[images, "AUROC"] = float(row["AUROC"] or "nan")
    return found
