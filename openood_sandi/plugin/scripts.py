"""Options for OpenOOD's scripts: ``eval_ood.py --postprocessor sandi --postprocessor.postprocessor_args.steps 5``.

The scripts know their own arguments only. So ``--postprocessor.KEY VALUE`` is taken from the command line before they
read it, and put into the postprocessor's configuration when the ``Evaluator`` makes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from openood_sandi.plugin import arguments
from openood_sandi.plugin.without_gpu import is_openood

__all__ = ["apply_options", "take_options"]

_taken: list[str] = []


def take_options(script: ModuleType) -> None:
    """Take ``--postprocessor.KEY VALUE`` from the command line of ``script``, if it is one of OpenOOD's.

    Raises:
        SystemExit: a value is missing, or the script would read results of other options.
    """
    if not is_openood(getattr(script, "__file__", None) or ""):
        return
    left: list[str] = []
    given = iter(sys.argv[1:])
    for argument in given:
        mine = argument.startswith("--postprocessor.")
        (_taken if mine else left).append(argument)
        if mine and "=" not in argument:
            _taken.extend([value] if (value := next(given, None)) is not None else [])
    sys.argv[1:] = left
    if _taken:
        _refuse_finished(left, Path(vars(script).get("ROOT_DIR", ".")))


def apply_options(config: Any) -> None:
    """Put what was taken into a postprocessor's configuration.

    Raises:
        SystemExit: it has no such setting, or a value has the wrong type.
    """
    try:
        arguments.parse_args(config, _taken)
    except arguments.WrongArgument as error:
        raise SystemExit(str(error)) from None


def _refuse_finished(given: list[str], root_dir: Path) -> None:
    finished = [str(file) for file in _finished(given, root_dir) if file.is_file()]
    if finished:
        raise SystemExit(
            f"{_taken[0]} would have no effect: the script reads what an earlier run, maybe with other options, has "
            f"left in {', '.join(finished)}; move these elsewhere, or leave the options out"
        )


def _finished(given: list[str], root_dir: Path) -> Iterator[Path]:
    """Where scripts look for a fitted postprocessor and for scores, before they compute any."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--ckpt-path", type=Path)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--postprocessor", default="msp")
    options, _ = parser.parse_known_args(given)
    if options.root is not None:
        runs = options.root.glob("s*")
    elif options.ckpt_path is not None:
        runs = iter([options.ckpt_path.parent])
    else:
        runs = (root_dir / "results").glob(f"imagenet_{options.arch}_*")
    for run in runs:
        yield run / "postprocessors" / f"{options.postprocessor}.pkl"
        yield run / "scores" / f"{options.postprocessor}.pkl"
