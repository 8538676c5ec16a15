"""Hooks of MkDocs: the site is laid out as the repository is, so a link is right in both or in neither.

`mkdocs build --strict` then checks the links of every document, README.md and the results among them. The tutorial, a
Python script of cells, becomes a page under its own name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "docs/*",
    "docs/api/*",
    "benchmarks/README.md",
    "benchmarks/results/*/*",
)


class Script(File):
    """A Python script that is shown as a page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: Any) -> Files:
    """Every document under the path that it has in the repository, beside the files of the theme."""
    paths = [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *(_file(path.relative_to(ROOT).as_posix(), config.site_dir) for path in paths)])


def _file(path: str, site: str) -> File:
    if path.endswith(".py"):
        return Script(path, str(ROOT), site, True, dest_uri=path.removesuffix(".py") + "/index.html")
    return File(path, str(ROOT), site, True)


def on_page_read_source(page: Page, config: Any) -> str | None:
    """A script's cells as Markdown; None, for MkDocs to read the page itself, where it is no script."""
    if not isinstance(page.file, Script):
        return None
    text = Path(page.file.abs_src_path or "").read_text(encoding="utf-8")
    return "\n\n".join(_cell(cell) for cell in re.split(r"^# %%", text, flags=re.M)[1:])


def _cell(cell: str) -> str:
    kind, _, body = cell.partition("\n")
    if kind.strip() == "[markdown]":
        return re.sub(r"^# ?", "", body.strip(), flags=re.M)
    return f"```python\n{body.strip()}\n```"
