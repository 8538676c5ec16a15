"""Who may import whom: the rules of docs/architecture.md, read off the source without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers.places import BENCHMARKS, ROOT

PACKAGE = ROOT / "openood_sandi"
#: For each subpackage, what of this package it may import.
ALLOWED = {
    "engine": ("engine.",),
    "detectors": ("detectors.", "engine.", "runs."),
    "runs": ("runs.",),
    "plugin": ("plugin.", "runs.", "startup.", "detectors.info.", "moved."),
}


def imported(file: Path) -> set[str]:
    """Modules and names of this package that ``file`` imports, at its top or anywhere else; "engine.tape.Tape"."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return {name.removeprefix("openood_sandi.") for name in names if name.startswith("openood_sandi.")}


@pytest.mark.parametrize("subpackage", ALLOWED)
def test_a_subpackage_imports_only_what_it_may(subpackage: str) -> None:
    files = sorted((PACKAGE / subpackage).rglob("*.py"))
    wrong = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(file)
        if not f"{name}.".startswith(ALLOWED[subpackage])
    }
    assert files and not wrong


def test_every_subpackage_has_a_rule() -> None:
    assert {file.parent.name for file in PACKAGE.glob("*/__init__.py")} == set(ALLOWED)


def test_no_import_is_relative_or_private() -> None:
    """Relative imports would pass the rules above unseen; a name with an underscore is its module's own."""
    wrong = []
    for file in sorted([*PACKAGE.rglob("*.py"), *BENCHMARKS.rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"]
                if private or (node.level and PACKAGE in file.parents):
                    wrong.append(f"{file.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not wrong
