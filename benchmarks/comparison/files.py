"""Writing texts, tables and figures so that an interruption leaves the earlier file or the new one, never half."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure


def replace(path: Path, write: str | Callable[[Path], object]) -> None:
    """Write aside, a text or what ``write`` puts at the path it is given, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f"{path.suffix}.{os.getpid()}.partial")
    try:
        if isinstance(write, str):
            partial.write_text(write, encoding="utf-8")
        else:
            write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; its path."""
    replace(path, lambda partial: figure.savefig(partial, format="png", dpi=110))
    return path


def markdown(frame: pd.DataFrame) -> str:
    """A table of text in Markdown; of two header lines, as one."""
    heads = [" ".join(filter(None, name)) if isinstance(name, tuple) else name for name in frame.columns]
    rows = [heads, ["---"] * len(heads), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
