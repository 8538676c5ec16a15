"""What OpenOOD's leaderboard asks for, a folder for each method of this package.

The leaderboard is the branch ``leaderboard`` of github.com/zjysteven/OpenOOD; a pull request adds a row to
``utils/papers.csv`` and one to ``results/<benchmark>.csv``. Beside these two rows a folder has OpenOOD's ``ood.csv``,
the configuration that gave it, and a README that says whether the bundle may be handed in and, if not, why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from openood_sandi.plugin import registry
from openood_sandi.runs.files import replace

from .methods import Method
from .table import AVERAGE, FPR_OPENOOD, Run, groups

FILES = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet": "imagenet1k_ood"}
"""The leaderboard's file for a suite's name."""
RUNS = 3
"""Networks that OpenOOD trains for CIFAR; ImageNet has one."""
COLUMNS = {
    "FPR@95": FPR_OPENOOD,
    "AUROC": "AUROC",
    "AUPR_IN": "AUPR-in",
    "AUPR_OUT": "AUPR-out",
    "ACC": "ID accuracy",
}
"""Of ``ood.csv``, and ours; its FPR95 is OpenOOD's, ID lost."""


def write(folder: Path, frame: pd.DataFrame, runs: Sequence[Run], about: Mapping[str, Any]) -> None:
    """Write ``folder/<method>`` for each method of this package, if the leaderboard has the data."""
    suite = runs[0].suite
    if suite.name not in FILES:
        return
    for outcome in runs[0].outcomes.values():
        method = outcome.method
        link = next((info.url for name, info in registry.infos().items() if method.name.startswith(name)), None)
        if method.source != "openood-sandi" or link is None:
            continue
        ood = ood_csv(frame[frame["method"] == method.name], runs)
        tables = {"papers": pd.DataFrame([{"Alias": method.title, "Link": link}]), "ood": ood}
        auroc = ood.set_index("dataset")["AUROC"]
        row = {
            "Training": "CrossEntropy",
            "Postprocessor": method.title,
            "Near-OOD_AUROC": auroc.get("nearood", "/"),  # given only if all of its sets are there
            "Far-OOD_AUROC": auroc.get("farood", "/"),
            "ID_Accuracy": ood["ACC"].iloc[0],
            "Outlier_Data": "No",
            "Arch": suite.network_name,
            "Additional_Description": "",
        }
        tables[FILES[suite.name]] = pd.DataFrame([row])
        for name, table in tables.items():
            replace(folder / method.name / f"{name}.csv", table.to_csv(index=False))
        config = {
            "postprocessor": method.name,
            "options": {name: repr(value) for name, value in method.options.items()},
            "network": suite.network_description,
            "weights": [run.suite.weights for run in runs],
            **about,
        }
        replace(folder / method.name / "config.json", json.dumps(config, indent=2) + "\n")
        replace(folder / method.name / "README.md", _readme(method, shortcomings(runs, about)))


def ood_csv(rows: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """As OpenOOD's evaluator writes it, but a group's mean only if all sets are there."""
    shown = [
        (group.name, name, f"{group.name}ood" if name == AVERAGE else name)
        for group in groups(runs[0].suite)
        for name in (*group.places[1:], *(() if group.missing else (AVERAGE,)))
    ]
    order = pd.DataFrame(shown, columns=["group", "OOD set", "dataset"])
    rows = order.merge(rows, how="left", on=["group", "OOD set"])
    found = rows[["dataset"]].copy()
    for theirs, ours in COLUMNS.items():
        deviations = [f" ± {std:.2f}" for std in rows.get(f"{ours} std", ())] or [""] * len(rows)
        found[theirs] = [f"{value:.2f}{std}" for value, std in zip(rows[ours], deviations, strict=True)]
    return found


def shortcomings(runs: Sequence[Run], about: Mapping[str, Any]) -> list[str]:
    """Why the numbers are not the leaderboard's benchmark; none if they are."""
    suite = runs[0].suite
    found = [f"{name} ({group.name}-OOD) is missing" for group in groups(suite) for name in group.missing]
    if about.get("protocol") not in (None, "openood"):
        found.append(f"the OOD sets are not OpenOOD's but those of: {suite.protocol}")
    if about.get("limit"):
        found.append(f"only {about['limit']} images of every set were scored")
    if suite.name != "imagenet" and len(runs) < RUNS:
        found.append(
            f"{len(runs)} network(s), where the leaderboard gives mean and standard deviation over OpenOOD's {RUNS}"
        )
    return found


def _readme(method: Method, short: Sequence[str]) -> str:
    verdict = "**Incomplete, not for submission:**\n\n" + "\n".join(f"- {reason}" for reason in short)
    if not short:
        verdict = "Complete as far as this tool can tell. Before a pull request: the networks must be OpenOOD's own "
        verdict += "checkpoints, and `Arch` and `Additional_Description` should name them as the other rows do."
    return f"# {method.title} for OpenOOD's leaderboard\n\n{verdict}\n"
