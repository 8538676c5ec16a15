"""Folders of its own for a rank of ``torchrun`` above 0: what OpenOOD's scripts write there goes when it ends.

``main.py`` writes to its ``output_dir``. The others write where they read: ``--root`` has a folder for each training
run (s0, s1, ...), ``--ckpt-path`` lies in such a folder, and without either they take one under ``results/`` of their
``ROOT_DIR``. In place of each they are given one of links: to checkpoints, fitted postprocessors and data. Scores that
are there are copied, as the scripts write them anew.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from openood_sandi.plugin.without_gpu import is_openood

__all__ = ["for_main", "for_script", "temporary"]


@functools.cache
def temporary() -> Path:
    """This process's folder, removed when it ends."""
    # in hexadecimal, as eval_ood.py takes a path with "csi" or "udg" in it for that of such a network
    folder = Path(tempfile.gettempdir(), f"openood-{os.getpid()}-{secrets.token_hex(8)}")
    folder.mkdir(mode=0o700)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def for_main(config: Any) -> None:
    """Have ``main.py`` write elsewhere."""
    config.output_dir = str(temporary() / "output")


def for_script(script: ModuleType) -> None:
    """Have ``script``, which is about to read its command line, write elsewhere, if it is one of OpenOOD's."""
    if not is_openood(getattr(script, "__file__", None) or ""):
        return
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--ckpt-path", type=Path)
    given, others = parser.parse_known_args()
    if given.root is not None:
        others += ["--root", str(_runs(given.root))]
    elif given.ckpt_path is not None:
        run = given.ckpt_path.parent
        others += ["--ckpt-path", str(_mirror(run, _place(run)) / given.ckpt_path.name)]
    elif "ROOT_DIR" in vars(script):
        vars(script)["ROOT_DIR"] = str(_checkout(Path(vars(script)["ROOT_DIR"])))
    sys.argv[1:] = others


def _runs(root: Path) -> Path:
    """In place of a folder of runs."""
    for run in root.glob("s*"):
        _mirror(run, _place(run))
    return _place(root)


def _checkout(root: Path) -> Path:
    """In place of OpenOOD's own folder."""
    place = temporary()
    (root / "data").mkdir(exist_ok=True)  # where the first rank of a machine downloads to
    for name in ("configs", "data"):
        (place / name).symlink_to((root / name).resolve())
    for run in (root / "results").glob("*"):
        _mirror(run, place / "results" / run.name)
    return place


def _place(folder: Path) -> Path:
    """A path of the same words, as eval_ood.py looks for words in it, in this process's folder."""
    return temporary().joinpath(*(part for part in folder.parts if part not in (folder.anchor, "..")))


def _mirror(run: Path, place: Path) -> Path:
    """Links to a run's files at ``place``, which it returns."""
    for name in (".", "postprocessors", "scores"):
        put = shutil.copy if name == "scores" else os.symlink
        for file in (run / name).glob("*"):
            if file.is_file():
                (place / name).mkdir(parents=True, exist_ok=True)
                put(file.resolve(), place / name / file.name)
    return place
