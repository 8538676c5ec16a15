"""Figures and tables as files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from openood_sandi.runs.files import replace


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; its path."""
    replace(path, lambda partial: figure.savefig(partial, format="png", dpi=110))
    return path


def markdown(frame: pd.DataFrame) -> str:
    """A table of text in Markdown; of two header lines, as one."""
    heads = [" ".join(filter(None, name)) if isinstance(name, tuple) else name for name in frame.columns]
    rows = [heads, ["---"] * len(heads), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
