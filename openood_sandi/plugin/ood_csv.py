"""``ood.csv``, OpenOOD's table of results: each set once, whatever was interrupted before.

OpenOOD appends a row whenever it has a result, also where the same run has left one. Here a row replaces that of the
same set and options, which a column of their own tells; rows of other options stay. A row that tells no options
(OpenOOD's own) is replaced by any of its set, and half rows go. The file is replaced whole, by one run at a time where
several share a folder, and what an earlier run left stays beside it, once, as ``ood.csv.old``.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from openood_sandi.runs import files

__all__ = ["hold_each_set_once"]

_Row = dict[str, str]
_kept: set[Path] = set()  # tables whose earlier state this process has kept


def hold_each_set_once(evaluator: Any) -> None:
    """Have a class of OpenOOD's evaluators write its table so."""
    own = evaluator._save_csv

    @functools.wraps(own)
    def _save_csv(self: Any, metrics: Any, dataset_name: str) -> None:
        folder = self.config.output_dir
        with tempfile.TemporaryDirectory() as aside:
            self.config.output_dir = aside
            try:
                own(self, metrics, dataset_name)
            finally:
                self.config.output_dir = folder
            rows = _read(Path(aside, "ood.csv"))
        with files.alone(Path(folder)):
            for row in rows:
                _put(row | {"options": _options(self.config, dataset_name)}, Path(folder, "ood.csv"))

    evaluator._save_csv = _save_csv


def _put(row: _Row, table: Path) -> None:
    """Add a row, in place of the one of the same set and options."""
    if table.is_file() and table not in _kept:
        files.replace(table.with_name("ood.csv.old"), table.read_bytes())
    _kept.add(table)
    rows = {(each["dataset"], each.get("options", "")): each for each in _read(table)}
    rows.pop((row["dataset"], ""), None)
    rows[row["dataset"], row["options"]] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows.values())
    files.replace(table, text.getvalue())


def _read(table: Path) -> list[_Row]:
    """The whole rows of a table."""
    if not table.is_file():
        return []
    text = table.read_bytes().decode(errors="replace").replace("\0", "")
    return [row for row in csv.DictReader(io.StringIO(text)) if _whole(row)]


def _whole(row: dict[Any, Any]) -> bool:
    """Whether every column has its value, and a number where there is to be one."""
    if not row.get("dataset") or None in row or None in row.values():
        return False
    try:
        for name, value in row.items():
            if name not in ("dataset", "options"):
                float(value)
    except ValueError:
        return False
    return True


def _options(config: Any, dataset_name: str) -> str:
    """What decides the numbers of a run beside the names in its folder: ``steps=2; ...; checkpoint=FILE``."""
    settings = config.postprocessor
    options = {**(settings.get("postprocessor_args") or {})}
    options.pop("cache_dir", None)  # where scores are kept decides none
    if settings.get("APS_mode"):
        options["APS_mode"] = dict(settings.get("postprocessor_sweep") or {})
    checkpoint = config.network and config.network.checkpoint
    options["checkpoint"] = os.path.relpath(checkpoint) if isinstance(checkpoint, str) else checkpoint
    group = config.ood_dataset and config.ood_dataset.get(dataset_name)
    if group and "datasets" in group:  # a mean is of these
        options["mean of"] = ",".join(group["datasets"])
    return "; ".join(f"{name}={value}" for name, value in options.items())
