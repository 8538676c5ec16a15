"""What S&I costs: time, memory and arithmetic of every implementation, in plain forward passes.

    python benchmarks/throughput.py

measures everything as a ratio to a forward pass of the same batch, timed in turn with it, on networks with random
weights (nothing is downloaded), prints a table, and sweeps what the cost depends on. With ``--out DIR`` the results are
also written as CSV, Markdown, JSON and pictures, anew after each measurement, so that an interrupted run keeps what is
finished.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from comparison.console import Parser, device, number, positive
from comparison.environment import environment, free_memory, same_arithmetic_on_gpus
from speed import report
from speed.measuring import METHODS, Bench, Setting
from speed.networks import NETWORKS, TimedNetwork
from speed.scaling import BASE, measure_point, sweeps
from tqdm import tqdm

QUICK_NETWORKS = ("resnet18", "resnet50")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=here, help="default here: %(default)s")
    quick = f"{', '.join(NETWORKS)}; default: all, with --quick {' '.join(QUICK_NETWORKS)}"
    add("--networks", nargs="+", choices=list(NETWORKS), metavar="NETWORK", help=f"one or more of {quick}")
    every = f"one or more of {', '.join(METHODS)}; default: all that apply to a network"
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=every)
    sizes = "default: 16 64 200 on a GPU and 16 on a CPU, at 224 pixels 8 32 and 2; slow methods take 2 on a CPU"
    add("--batch-size", type=positive, nargs="+", metavar="B", help=sizes)
    turns = "how often each method is timed, a slow one a third of it; 2 at least; default: 7, --quick 3"
    add("--turns", type=number(int, 2), help=turns)
    splits = "Z's split points: the paper's, or the normalisation layers, SandI's own default; default: %(default)s"
    add("--splits", choices=("paper", "norms"), default="paper", help=splits)
    width = "factor on all numbers of channels; default: 1, 0.25 with --quick, and 0.5 for sweeps on a CPU"
    add("--width", type=number(float, 1e-3), help=width)
    add("--scaling", action=argparse.BooleanOptionalAction, default=True, help="whether to sweep too; default: yes")
    add("--quick", action="store_true", help="two narrow networks, small batches, few turns: about a minute on a CPU")
    clock = "processor: CPU time, steadier on a machine that others use; with --threads 1 only; default: %(default)s"
    add("--clock", choices=("wall", "processor"), default="wall", help=clock)
    add("--threads", type=positive, help="CPU threads; default: torch's")
    add("--seed", type=int, default=0, help="of weights and images; default: %(default)s")
    add("--out", type=Path, metavar="DIR", help="write CSV, Markdown, JSON and pictures there")
    return parser


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
    same_arithmetic_on_gpus(options.device)
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
    about = {
        "command": shlex.join(["python", "benchmarks/throughput.py", *arguments]),
        **{name: getattr(options, name) for name in ("seed", "clock", "splits")},
        **{name: getattr(setting, name) for name in ("width", "turns")},
        "free_bytes": free_memory(options.device),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **environment(options.device),
    }
    results = _Results(options.out, about)
    try:
        _measure(options, setting, results)
        if options.scaling:
            _sweep(options, setting, results)
    except KeyboardInterrupt:
        print("Interrupted; what is finished is kept.", file=sys.stderr)
        return 130
    finally:
        results.print()
    return 0


class _Results:
    """Everything measured so far, and its place on disk."""

    def __init__(self, folder: Path | None, run: dict[str, Any]) -> None:
        self._folder, self.run = folder, run
        self.measurements: list[dict[str, Any]] = []
        self.sweeps: dict[str, pd.DataFrame] = {}

    def print(self) -> None:
        print(report.heading(self.run))
        if self.measurements:
            print("\n" + report.screen(report.table(self.measurements)), report.LEGEND, sep="\n\n")
        for name, sweep in self.sweeps.items():
            wide = sweep.pivot(index="value", columns="method", values=["forwards", "flops"]).round(2)
            print(f"\nCost in forwards against {name} (otherwise: {self.run['sweeps']}):\n{wide.to_string()}")

    def write(self) -> None:
        if self._folder:
            report.write(self._folder, report.table(self.measurements), self.sweeps, self.run)


def _measure(options: argparse.Namespace, setting: Setting, results: _Results) -> None:
    with tqdm(options.networks, unit="network", disable=None) as progress:
        for name in progress:
            network = NETWORKS[name]
            bench = Bench(name, network, setting)
            for method in [method for method in options.methods if METHODS[method].applies(network)]:
                progress.set_description(f"{name} {method}")
                for batch in setting.batch_sizes(method, options.batch_size or _batch_sizes(network, options)):
                    results.measurements.append(bench.measure(method, batch))
                    results.write()


def _batch_sizes(network: TimedNetwork, options: argparse.Namespace) -> list[int]:
    small = network.image_size < 224
    if options.device.type == "cuda" and not options.quick:
        return [16, 64, 200] if small else [8, 32]
    return [8 if options.quick else 16] if small else [2]


def _sweep(options: argparse.Namespace, setting: Setting, results: _Results) -> None:
    on_gpu = options.device.type == "cuda"
    if options.width is None and not on_gpu:
        setting = replace(setting, width=0.25 if options.quick else 0.5)
    batch = 64 if on_gpu else 4
    results.run["sweeps"] = f"{BASE}, batch size {batch}, numbers of channels x {setting.width:g}"
    with tqdm(sweeps(batch, options.quick).items(), unit="sweep", disable=None) as progress:
        for name, points in progress:
            progress.set_description(f"cost against {name}")
            rows = [row for value, point in points for row in measure_point(value, point, setting)]
            results.sweeps[name] = pd.DataFrame(rows)
            results.write()


if __name__ == "__main__":
    sys.exit(main())
