"""What S&I costs: time, memory and arithmetic of every implementation, in plain forward passes.

    python benchmarks/throughput.py

measures everything as a ratio to a forward pass of the same batch, timed in turn with it, on networks with random
weights (nothing is downloaded), prints a table with the goals beside it, and sweeps what the cost depends on. With
``--out DIR`` the results are also written as CSV, Markdown, JSON and pictures, anew after each measurement, so that an
interrupted run keeps what is finished.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from comparison import arguments
from comparison.environment import environment
from speed import plots, report
from speed.measuring import Bench, Measurement, Setting
from speed.methods import METHODS
from speed.networks import NETWORKS, Network
from speed.scaling import BASE, Scaled, measure_point, sweeps
from tqdm import tqdm

from openood_sandi.engine.memory import free_memory

QUICK_NETWORKS = ("resnet18", "resnet50")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, _ = (__doc__ or "").partition("\n")
    options = argparse.ArgumentParser(description=summary)
    options.add_argument(
        "--device",
        type=arguments.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default here: %(default)s",
    )
    options.add_argument(
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        metavar="NETWORK",
        help=f"one or more of {', '.join(NETWORKS)}; default: all, with --quick {' '.join(QUICK_NETWORKS)}",
    )
    options.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"one or more of {', '.join(METHODS)}; default: all that apply to a network",
    )
    options.add_argument(
        "--batch-size",
        type=arguments.positive,
        nargs="+",
        metavar="B",
        help="default: 16 64 200 on a GPU and 16 on a CPU, at 224 pixels 8 32 and 2; slow methods take 2 on a CPU",
    )
    options.add_argument(
        "--turns", type=_turns, help="how often each method is timed, a slow one a third of it; default: 7, --quick 3"
    )
    options.add_argument(
        "--splits",
        choices=("paper", "norms"),
        default="paper",
        help="Z's split points: the paper's, or the normalisation layers, SandI's own default; default: %(default)s",
    )
    options.add_argument(
        "--width",
        type=_factor,
        help="factor on all numbers of channels; default: 1, 0.25 with --quick, and 0.5 for sweeps on a CPU",
    )
    options.add_argument(
        "--scaling", action=argparse.BooleanOptionalAction, default=True, help="whether to sweep too; default: yes"
    )
    options.add_argument(
        "--quick", action="store_true", help="two narrow networks, small batches, few turns: about a minute on a CPU"
    )
    options.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: CPU time, steadier on a machine that others use; with --threads 1 only; default: %(default)s",
    )
    options.add_argument("--threads", type=arguments.positive, help="CPU threads; default: torch's")
    options.add_argument("--seed", type=int, default=0, help="of weights and images; default: %(default)s")
    options.add_argument("--out", type=Path, metavar="DIR", help="write CSV, Markdown, JSON and pictures there")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status: 0, or 130 after Ctrl-C.

    Whatever ends the run, the measurements finished by then are printed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.clock == "processor" and (options.device.type != "cpu" or options.threads != 1):
        parser().error("--clock processor needs --device cpu --threads 1: it adds up the threads and sees no GPU")
    options.networks = options.networks or (QUICK_NETWORKS if options.quick else list(NETWORKS))
    if not any(METHODS[method].applies(NETWORKS[name]) for name in options.networks for method in options.methods):
        parser().error("--networks and --methods: none of these methods applies to any of these networks")
    if options.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # or float32 convolutions are not, and no two batch sizes agree
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(
        device=options.device,
        turns=options.turns or (3 if options.quick else 7),
        clock=time.process_time if options.clock == "processor" else time.perf_counter,
        seed=options.seed,
        width=options.width or (0.25 if options.quick else 1.0),
        splits=options.splits,
    )
    results = _Results(options.out, _describe(options, setting, arguments))
    try:
        _measure(options, setting, results)
        if options.scaling:
            _sweep(options, setting, results)
    except KeyboardInterrupt:
        print("Interrupted; what is finished is kept.", file=sys.stderr)
        return 130
    finally:
        results.finish()
    return 0


class _Results:
    """Everything measured so far, and its place on disk."""

    def __init__(self, folder: Path | None, run: dict[str, Any]) -> None:
        self._folder, self._run = folder, run
        self._measurements: list[Measurement] = []
        self._sweeps: dict[str, pd.DataFrame] = {}

    def add(self, measurement: Measurement) -> None:
        self._measurements.append(measurement)
        self._write()

    def add_sweep(self, name: str, points: list[Scaled]) -> None:
        self._sweeps[name] = pd.DataFrame([asdict(point) for point in points]).drop(columns="sweep")
        self._write()
        if self._folder:
            plots.scaling(self._folder, name, self._sweeps[name])

    def describe_sweeps(self, text: str) -> None:
        self._run["sweeps"] = text

    def finish(self) -> None:
        """Print everything, and draw what is drawn once."""
        print(report.heading(self._run))
        if self._measurements:
            table = self._table()
            print("\n" + report.screen(table), report.memory(table), report.LEGEND, sep="\n\n")
            if self._folder:
                plots.costs(self._folder, table)
        for name, sweep in self._sweeps.items():
            wide = sweep.pivot(index="value", columns="method", values=["forwards", "flops"]).round(2)
            print(f"\nCost in forwards against {name} (otherwise: {self._run['sweeps']}):\n{wide.to_string()}")

    def _table(self) -> pd.DataFrame:
        return report.table(self._measurements, on_gpu=self._run["hardware"]["device"] != "cpu")

    def _write(self) -> None:
        if self._folder:
            report.write(self._folder, self._table(), self._sweeps, self._run)


def _describe(options: argparse.Namespace, setting: Setting, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "benchmarks/throughput.py", *arguments]),
        "seed": options.seed,
        "clock": options.clock,
        "splits": options.splits,
        "width": setting.width,
        "turns": setting.turns,
        "free_bytes": free_memory(options.device),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **environment(options.device),
    }


def _measure(options: argparse.Namespace, setting: Setting, results: _Results) -> None:
    work = [
        (name, method, batch)
        for name in options.networks
        for method in options.methods
        if METHODS[method].applies(NETWORKS[name])
        for batch in setting.batch_sizes(method, options.batch_size or _batch_sizes(NETWORKS[name], options))
    ]
    bench: tuple[str, Bench] | None = None  # one network at a time is kept
    with tqdm(work, unit="row", disable=None) as progress:
        for name, method, batch in progress:
            progress.set_description(f"{name} {method}")
            if bench is None or bench[0] != name:
                bench = name, Bench(name, NETWORKS[name], setting)
            results.add(bench[1].measure(method, batch))


def _batch_sizes(network: Network, options: argparse.Namespace) -> list[int]:
    small = network.image_size < 224
    if options.quick:
        return [8] if small else [2]
    if options.device.type == "cuda":
        return [16, 64, 200] if small else [8, 32]
    return [16] if small else [2]


def _sweep(options: argparse.Namespace, setting: Setting, results: _Results) -> None:
    on_gpu = options.device.type == "cuda"
    if options.width is None and not on_gpu:
        setting = replace(setting, width=0.25 if options.quick else 0.5)
    batch = 64 if on_gpu else 4
    work = sweeps(batch, options.quick)
    results.describe_sweeps(f"{BASE}, batch size {batch}, numbers of channels x {setting.width:g}")
    with tqdm(total=sum(map(len, work.values())), unit="point", disable=None) as progress:
        for name, points in work.items():
            progress.set_description(f"cost against {name}")
            found: list[Scaled] = []
            for value, point in points:
                found += measure_point(name, value, point, setting)
                progress.update()
            results.add_sweep(name, found)


def _factor(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _turns(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} turn(s) have no quartiles; give 2 at least")
    return number


if __name__ == "__main__":
    sys.exit(main())
