"""S&I beside other OOD detectors: accuracy and cost on the same network, images and machine.

    python benchmarks/side_by_side.py

trains a small network on scikit-learn's handwritten digits (a few seconds, then cached), scores digits,
letters, photographs and noise with every method and prints a table. Nothing is downloaded. With ``--out DIR``
the table is also written as CSV, Markdown and JSON, anew after each method, so that an interrupted run keeps
what is finished.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from comparison import arguments, digits, report
from comparison.environment import environment
from comparison.evaluation import Outcome, evaluate
from comparison.methods import METHODS
from comparison.suite import Suite
from comparison.training import default_cache

SOURCES: dict[str, Callable[[int, Path], Suite]] = {"digits": digits.load}
"""Names of ``--data``: functions of the seed and the cache folder."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, _ = (__doc__ or "").partition("\n")
    options = argparse.ArgumentParser(description=summary)
    options.add_argument("--data", choices=sorted(SOURCES), default="digits", help="default: %(default)s")
    options.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"one or more of {', '.join(METHODS)}; default: all",
    )
    options.add_argument("--limit", type=arguments.positive, help="use only the first LIMIT images of every set")
    options.add_argument("--batch-size", type=arguments.positive, default=200, help="default: %(default)s")
    options.add_argument(
        "--device",
        type=arguments.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to score (training is on the CPU); default here: %(default)s",
    )
    options.add_argument("--seed", type=int, default=0, help="of the network's training; default: %(default)s")
    options.add_argument(
        "--cache", type=Path, default=default_cache(), help="keeps trained networks; default: %(default)s"
    )
    options.add_argument("--out", type=Path, metavar="DIR", help="write results.csv, .md and .json there")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit status: 0, or 130 after Ctrl-C.

    Whatever ends the run, the methods finished by then are printed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    run = {
        "command": shlex.join(["python", "benchmarks/side_by_side.py", *arguments]),
        "seed": options.seed,
        "batch_size": options.batch_size,
        **environment(options.device),
    }
    outcomes: list[Outcome] = []
    try:
        suite = SOURCES[options.data](options.seed, options.cache).first(options.limit)
        for method in options.methods:
            outcomes.append(evaluate(method, suite, options.device, options.batch_size))
            if options.out:
                report.write(options.out, report.table(outcomes, suite), suite, run)
    except KeyboardInterrupt:
        print(f"Interrupted: {len(outcomes)} of {len(options.methods)} methods finished.", file=sys.stderr)
        return 130
    finally:
        if outcomes:
            print(report.screen(report.table(outcomes, suite)), report.LEGEND, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
