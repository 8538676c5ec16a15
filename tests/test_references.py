"""References to modules, classes and functions, in docstrings, comments and documents, name what exists."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import BENCHMARKS, DOCUMENTS, ROOT

SOURCES = sorted(
    [*ROOT.glob("openood_sandi/**/*.py"), *BENCHMARKS.glob("**/*.py"), *ROOT.glob("tests/**/*.py"), ROOT / "setup.py"]
)
#: :class:`name` and its kin, as in Sphinx.
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?(\.?[\w.]+)`")
#: A module or name of this package in a document's code.
NAME = re.compile(r"`(openood_sandi(?:\.\w+)+)(?:\(\))?`")


def module_name(file: Path) -> str:
    """The name under which ``file`` is imported; the benchmarks' folder is on the path."""
    parts = file.relative_to(BENCHMARKS if BENCHMARKS in file.parents else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def defined(tree: ast.AST, scope: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names that a module or class defines, each with what it was imported from, "" if nothing."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield scope + node.name, ""
            yield from defined(node, f"{scope}{node.name}." if isinstance(node, ast.ClassDef) else scope)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from ((alias.asname or alias.name, origin + alias.name) for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((scope + ast.unparse(target).removeprefix("self."), "") for target in targets)
        else:
            yield from defined(node, scope)


MODULES = {module_name(file): dict(defined(ast.parse(file.read_text(encoding="utf-8")))) for file in SOURCES}


def exists(name: str) -> bool:
    """Whether ``name`` is a module of this repository, is defined in one, or can be imported from elsewhere."""
    if name in MODULES:
        return True
    module, _, member = name.rpartition(".")
    while module and module not in MODULES:
        module, _, outer = module.rpartition(".")
        member = f"{outer}.{member}"
    if not module:
        return importable(name)
    first, _, rest = member.partition(".")
    origin = MODULES[module].get(first)
    return member in MODULES[module] if not origin else exists(f"{origin}.{rest}".rstrip("."))


def importable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def resolves(name: str, module: str, is_package: bool) -> bool:
    """Whether a role's ``name`` means something in ``module``: a member of it or of a class in it, or a full name."""
    if name.startswith("."):
        return exists((module if is_package else module.rpartition(".")[0]) + name)
    here = [known for known in MODULES[module] if known == name or known.endswith(f".{name}")]
    return bool(here) or exists(f"{module}.{name}") or ("." in name and exists(name))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("openood_sandi.SandI", True),
        ("openood_sandi.SandI.explain", True),
        ("openood_sandi.runs.cache", True),
        ("openood_sandi.runs.cache.ScoreCache", True),
        ("torch.overrides.TorchFunctionMode", True),
        ("openood_sandi.nothing", False),
        ("openood_sandi.SandI.nothing", False),
        ("openood_sandi.runs.cache.nothing", False),
        ("torch.nothing", False),
    ],
)
def test_names_are_looked_up(name: str, found: bool) -> None:
    assert exists(name) == found


def test_references_in_docstrings_and_comments_exist() -> None:
    roles = [
        (file, name) for file in SOURCES if file != Path(__file__) for name in ROLE.findall(file.read_text("utf-8"))
    ]
    dead = {
        f"{file.relative_to(ROOT)}: {name}"
        for file, name in roles
        if not resolves(name, module_name(file), file.name == "__init__.py")
    }
    assert len(roles) > 30 and not dead


def test_names_in_documents_exist() -> None:
    named = [(file, name) for file in DOCUMENTS for name in NAME.findall(without_history(file))]
    named = [(file, name) for file, name in named if not name.endswith((".pth", ".start"))]  # files
    assert len(named) > 10 and not {f"{file.relative_to(ROOT)}: {name}" for file, name in named if not exists(name)}


def without_history(file: Path) -> str:
    """The text of a document; the changelog also names what is gone."""
    text = file.read_text(encoding="utf-8")
    return re.sub(r"^\| `[^|]+ \|", "|", text, flags=re.M) if file.name == "CHANGELOG.md" else text
