"""OpenOOD under torchrun: ranks share the images, results are those of one process, printed and written once."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openood_sandi import SandI
from tests.helpers import installation, tiny
from tests.plugin.conftest import git_status

SETS = ("cifar100", *tiny.NEAR, *tiny.FAR)
ROWS = [*tiny.NEAR, "nearood", *tiny.FAR, "farood"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit is promised on the CPU"),
]


def torchrun(ranks: int, *arguments: str, cwd: Path) -> str:
    """What the ranks print together; with the installed wheel, on one thread each as the tests have."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *arguments]
    result = installation.run(installation.wheel_python(), *command, cwd=cwd, timeout=500, OMP_NUM_THREADS="1")
    return str(result.stdout)


def in_batches_of_one(score: Any, checkout: Path, name: str) -> Iterator[np.ndarray]:
    """Predicted classes and confidences of a set."""
    pairs = [score(image[None]) for image in tiny.read_images(checkout, name)]
    yield torch.cat([pred for pred, _ in pairs]).numpy()
    yield torch.cat([-value for _, value in pairs]).numpy()


def check(found: Any, score: Any, checkout: Path, name: str) -> None:
    pred, conf = in_batches_of_one(score, checkout, name)
    np.testing.assert_array_equal(found[0], pred)
    np.testing.assert_array_equal(found[1], conf)
    assert len(found[2]) == tiny.IMAGES


def rows(file: Path) -> list[str]:
    with file.open() as lines:
        return [row[0] for row in csv.reader(lines)][1:]


def test_main(checkout: Path, tmp_path: Path) -> None:
    arguments = ["--postprocessor", "sandi", "--postprocessor.postprocessor_args.splits", "last_stage"]
    arguments += ["--dataset.test.batch_size", "1", "--ood_dataset.batch_size", "1", "--output_dir", str(tmp_path)]
    printed = torchrun(2, "main.py", *arguments, cwd=checkout)
    assert printed.count("Accuracy ") == printed.count("Time used for eval_ood") == 1
    (folder,) = tmp_path.glob("*/s0/ood")
    assert rows(folder / "ood.csv") == ROWS
    assert (folder / "log.txt").read_text().count("Time used for eval_ood") == 1
    detector = SandI(tiny.network(), splits="last_stage")
    for name in SETS:
        with np.load(folder / f"scores/{name}.npz") as saved:
            check([saved[column] for column in ("pred", "conf", "label")], detector, checkout, name)
    assert git_status(checkout) == ""


def test_eval_ood_script(checkout: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "s0").mkdir(parents=True)
    (root / "s0/best.ckpt").symlink_to(checkout / tiny.CHECKPOINT)
    arguments = ["--root", str(root), "--id-data", "cifar100", "--postprocessor", "gaia", "--batch-size", "1"]
    printed = torchrun(2, "scripts/eval_ood.py", *arguments, "--save-csv", "--save-score", cwd=checkout)
    assert printed.count("Performing inference on svhn") == 1
    assert rows(root / "ood/gaia.csv") == ROWS
    scores = pickle.loads((root / "s0/scores/gaia.pkl").read_bytes())
    detector = SandI(tiny.network(), steps=1)
    check(scores["id"]["test"], detector, checkout, "cifar100")
    for name in tiny.NEAR:
        check(scores["ood"]["near"][name], detector, checkout, name)
    assert scores["id_labels"].tolist() == list(range(tiny.IMAGES))
    assert git_status(checkout) == ""


SCRIPT = """
import os, pickle, sys
from pathlib import Path
import torch
from openood.evaluation_api import Evaluator
from openood.networks import ResNet18_32x32

net = ResNet18_32x32(num_classes=100)
net.load_state_dict(torch.load({checkpoint!r}, map_location="cpu"))
evaluator = Evaluator(net.eval(), id_name="cifar100", postprocessor_name="msp", batch_size=1, num_workers=0)
metrics = evaluator.eval_ood()
seen = (metrics.to_csv(), evaluator.scores["id"]["test"], evaluator.scores["ood"]["far"]["svhn"])
Path({out!r}, os.environ["RANK"]).write_bytes(pickle.dumps(seen))
"""


def test_evaluator_in_a_script_with_one_of_openoods_own_methods(checkout: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.append({str(checkout)!r})"
        + SCRIPT.format(checkpoint=str(checkout / tiny.CHECKPOINT), out=str(tmp_path))
    )
    printed = torchrun(2, str(script), cwd=checkout)
    assert printed.count("farood") == printed.count("Performing inference on svhn") == 1
    net = tiny.network()

    def msp(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            confidence, pred = net(images).softmax(1).max(1)
        return pred, -confidence

    tables = set()
    for rank in range(2):
        table, *found = pickle.loads((tmp_path / str(rank)).read_bytes())
        tables.add(table)
        check(found[0], msp, checkout, "cifar100")
        check(found[1], msp, checkout, "svhn")
    assert len(tables) == 1 and "farood" in tables.pop()


def test_processes_of_openoods_own_are_refused() -> None:
    from openood_sandi.plugin.torchrun import run_main

    pipeline = SimpleNamespace(name="test_ood")
    with pytest.raises(SystemExit, match="num_gpus=4, num_machines=1: torchrun has started the processes already"):
        run_main(SimpleNamespace(pipeline=pipeline, num_gpus=4, num_machines=1))
