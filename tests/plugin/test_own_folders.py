"""What OpenOOD's scripts are given to write to on ranks above 0: they read what is there, and leave it as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openood_sandi.plugin import own_folders
from tests.helpers import installation
from tests.helpers.places import ROOT

#: A script that reads and writes as OpenOOD's eval_ood scripts do, and tells what it has read and where.
SCRIPT = """
import argparse, json, os, sys
ROOT_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT_DIR)
import openood
from openood_sandi.plugin import own_folders
own_folders.for_script(sys.modules["__main__"])
parser = argparse.ArgumentParser()
for option in ("--root", "--ckpt-path", "--postprocessor"):
    parser.add_argument(option)
args = parser.parse_args()
if args.root:
    run = os.path.join(args.root, "s0")
elif args.ckpt_path:
    run = '/'.join(args.ckpt_path.split('/')[:-1])
else:
    run = os.path.join(ROOT_DIR, "results", "net")
read = [open(os.path.join(run, name)).read() for name in ("best.ckpt", "postprocessors/x.pkl", "scores/x.pkl")]
data = open(os.path.join(ROOT_DIR, "data/image")).read()
open(os.path.join(run, "scores/x.pkl"), "w").write("new")
os.makedirs(os.path.join(args.root or run, "ood"))
open(os.path.join(args.root or run, "ood/x.csv"), "w").write("new")
print(json.dumps([run, read, data, args.postprocessor]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the parts of OpenOOD's that matter here."""
    files = {"openood/__init__.py": "", "data/image": "pixels", "configs/x.yml": ""}
    for run in ("results/net/s0", "results/net"):
        files |= {f"{run}/best.ckpt": "weights", f"{run}/postprocessors/x.pkl": "fit", f"{run}/scores/x.pkl": "old"}
    files["scripts/eval.py"] = SCRIPT
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run_script(checkout: Path, *command: str) -> Any:
    return json.loads(installation.run(sys.executable, *command, cwd=checkout, PYTHONPATH=str(ROOT)).stdout)


def content(folder: Path) -> dict[str, str]:
    return {
        str(path): path.read_text() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }


@pytest.mark.parametrize(
    ("arguments", "run"),
    [
        (["--root", "results/net"], "results/net/s0"),
        (["--root=./results/../results/net/"], "results/net/s0"),
        (["--ckpt-path", "results/net/s0/best.ckpt"], "results/net/s0"),
        ([], "results/net"),
    ],
)
def test_scripts_read_what_is_there_and_write_elsewhere(checkout: Path, arguments: list[str], run: str) -> None:
    before = content(checkout)
    used, read, data, postprocessor = run_script(checkout, "scripts/eval.py", "--postprocessor", "x", *arguments)
    assert (read, data, postprocessor) == (["weights", "fit", "old"], "pixels", "x")
    assert used.endswith(run) and not used.startswith(str(checkout))
    assert not Path(used).exists(), "what a rank has of its own goes when it ends"
    assert content(checkout) == before


def test_an_absolute_root_keeps_its_words(checkout: Path) -> None:
    """As eval_ood.py tells CSI and UDG networks by the words of the path."""
    (checkout / "results/net").rename(checkout / "results/csi_net")
    used, *_ = run_script(checkout, "scripts/eval.py", "--root", str(checkout / "results/csi_net"))
    assert used.endswith(str(checkout / "results/csi_net/s0"))


def test_other_peoples_scripts_are_left_alone(checkout: Path) -> None:
    (checkout / "mine").mkdir()
    (checkout / "scripts/eval.py").rename(checkout / "mine/eval.py")
    used, *_ = run_script(checkout, "mine/eval.py", "--root", "results/net")
    assert used == "results/net/s0"


def test_main_writes_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(own_folders, "temporary", lambda: tmp_path)
    config: Any = SimpleNamespace(output_dir="results/x")
    own_folders.for_main(config)
    # a folder that is there already would have OpenOOD ask what to do about it
    assert Path(config.output_dir).parent == tmp_path and not Path(config.output_dir).exists()
