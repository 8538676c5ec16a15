"""The leaderboard bundle's ``ood.csv`` is the file that OpenOOD's own evaluator writes for the same scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tests.benchmarks import test_reports as known


@pytest.mark.usefixtures("checkout")
def test_ood_csv_is_openoods(tmp_path: Path) -> None:
    from openood.evaluators.metrics import compute_all_metrics
    from openood.evaluators.ood_evaluator import OODEvaluator

    found = known.outcome("sandi-z", 0)
    run = known.run(found)
    frame = known.results([run], resamples=2)
    ours = known.leaderboard.ood_csv(frame, [run])

    evaluator = object.__new__(OODEvaluator)
    settings = {"postprocessor_args": {"steps": 2}}
    evaluator.config = SimpleNamespace(output_dir=str(tmp_path), postprocessor=settings, network=None, ood_dataset=None)
    inside = found.scored["known"]
    for group, names in (("near", ["tin"]), ("far", ["texture", "mnist"])):
        metrics = []
        for name in names:
            outside = found.scored[name]
            with np.printoptions():  # OpenOOD's function changes them
                metrics.append(
                    compute_all_metrics(
                        -np.concatenate([inside.scores, outside.scores]),
                        np.concatenate([inside.labels, outside.labels]),
                        np.concatenate([inside.pred, outside.pred]),
                    )
                )
            evaluator._save_csv(metrics[-1], dataset_name=name)
        evaluator._save_csv(np.mean(metrics, axis=0), dataset_name=f"{group}ood")
    theirs = pd.read_csv(tmp_path / "ood.csv", dtype=str)
    if "options" in theirs:  # a column of the plugin's, where that is on
        theirs = theirs.drop(columns="options")
    pd.testing.assert_frame_equal(ours, theirs)
