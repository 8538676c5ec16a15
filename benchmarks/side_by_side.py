"""S&I beside other OOD detectors: accuracy and cost on the same network, images and machine.

    python benchmarks/side_by_side.py

trains a small network on scikit-learn's handwritten digits (a few seconds, then cached), scores digits,
letters, photographs and noise with every method, prints a table and writes ``report.html``, which a browser shows;
nothing is downloaded. ``--data`` names other data. With ``--out DIR`` the tables are also written as CSV, Markdown and
JSON, with pictures, the S&I paper's tables and what OpenOOD's leaderboard asks for.

Scores and costs are kept in ``--cache`` as they come: an interrupted run goes on where it was, and a finished one is
only reported again.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from comparison import leaderboard, methods, paper_tables, pictures, report, sources
from comparison.console import Parser, device, positive, progress
from comparison.environment import environment, on_quickest_threads, same_arithmetic_on_gpus
from comparison.evaluation import Decoder, Evaluation, Failure, Outcome
from comparison.methods import Method
from comparison.table import Run, results
from networks import SourceError

from openood_sandi.runs import ranks
from openood_sandi.runs.progress import Lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    sources.add_arguments(parser)
    add = parser.add_argument
    names = "names or titles, 'default' or 'all'; a wrong one lists them; default: default"
    add("--methods", nargs="+", default=["default"], metavar="METHOD", help=names)
    add("--limit", type=positive, help="use only LIMIT images of every set")
    add("--fit-on", type=positive, help="use only so many training images")
    add("--batch-size", type=positive, default=200, help="default: %(default)s")
    workers = "processes that decode images; 0: none; default: %(default)s"
    add("--workers", type=int, default=2, help=workers)
    where = "where to score (training is on the CPU); default here: %(default)s"
    add("--device", type=device, default=ranks.own_device(), help=where)
    yes_or_no = argparse.BooleanOptionalAction
    add("--cost", action=yes_or_no, default=True, help="whether to measure it; default: yes")
    add("--pictures", action=yes_or_no, default=True, help="whether to draw them, and report.html; default: yes")
    out = "write tables, pictures and report.html there; default: report.html alone, in CACHE/reports/DATA_NETWORK"
    add("--out", type=Path, metavar="DIR", help=out)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit status: 0, 1 if a method failed, 130 after Ctrl-C.

    Whatever ends the run, the methods finished by then are reported.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    same_arithmetic_on_gpus(options.device)
    about = {
        "command": shlex.join(["python", "benchmarks/side_by_side.py", *arguments]),
        **{name: getattr(options, name) for name in ("protocol", "seeds", "batch_size", "limit", "fit_on")},
        **environment(options.device),
    }
    comparison = _Comparison(options)
    status = 0
    try:
        comparison.score()
        comparison.measure()
    except SourceError as error:
        parser().error(str(error))
    except KeyboardInterrupt:
        print("Interrupted; what is finished is kept and reported.", file=sys.stderr)
        status = 130
    if ranks.is_main_process():
        comparison.report(about)
    return status or int(comparison.failed)


class _Comparison:
    """Every method on the networks of all seeds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._decoder = Decoder(options.batch_size, options.workers)
        self._evaluations: list[Evaluation] = []
        self._outcomes: list[dict[str, Outcome]] = []
        self._failures: dict[str, Failure] = {}
        self._order: list[str] = []
        self.failed = False

    def score(self) -> None:
        """Score all sets, method by method; one that fails is noted, and the others go on."""
        options = self._options
        for seed in options.seeds:
            suite = self._decoder.suite(sources.load(options, seed).limited(options.limit).fitted_to(options.fit_on))
            chosen, reasons, asked = _chosen(options.methods, *methods.available(suite))
            self._failures |= {name: Failure(name, reason) for name, reason in reasons.items()}
            self.failed |= not asked.isdisjoint(reasons)
            evaluation = Evaluation(suite, options.device, options.batch_size, options.workers, options.cache)
            if seed == options.seeds[0] and options.device.type == "cpu":
                on_quickest_threads(suite.network, next(iter(suite.in_distribution.loader(options.batch_size)))[0])
            outcomes: dict[str, Outcome] = {}
            self._evaluations.append(evaluation)
            self._outcomes.append(outcomes)
            lines = Lines(len(chosen) * sum(map(len, (*suite.test_sets, *(suite.validation or ())[:1]))))
            self._order = [method.name for method in chosen]
            ordered: Iterable[Method] = sorted(chosen, key=lambda each: not each.first)
            if sys.stderr.isatty():  # elsewhere lines tell of the images
                ordered = progress(ordered, f"{suite.name}, seed {seed}", "methods")
            for method in ordered:
                with self._noted(method):
                    outcomes[method.name] = Outcome(method, evaluation.scores(method, lines))

    def measure(self) -> None:
        """Measure what each method costs, with the first network; the cost of one that fails is left out."""
        if not self._options.cost or not ranks.is_main_process():
            return
        outcomes = self._outcomes[0]
        for name, outcome in progress(list(outcomes.items()), "cost", "methods"):
            with self._noted(outcome.method, alone=True):
                outcomes[name] = replace(outcome, expense=self._evaluations[0].expense(outcome.method))

    def report(self, about: dict[str, object]) -> None:
        """Print the methods that have been scored with every network, and write and draw them with ``--out``."""
        failures = list(self._failures.values())
        runs = self._finished()
        if not runs:
            print(*(f"No row for {failure.method}: {failure.reason}" for failure in failures), sep="\n")
            print("No method is finished: there is no table.")
            return
        first, frame = runs[0], results(runs)
        print(f"\n{first.suite.name}: {first.suite.network_description}")
        print(*report.remarks(first.suite, failures), sep="\n")
        print(report.screen(frame, first.suite), report.legend(len(runs)), sep="\n\n")
        folder = self._options.out
        if folder:
            drawn = self._draw(folder, frame, first) if self._options.pictures else []
            extra = [*paper_tables.sections(frame, first), *drawn]
            report.write(folder, frame, runs, failures, about, extra)
            leaderboard.write(folder / "leaderboard", frame, runs, about)
            print(f"\nWritten to {folder}.")
        if self._options.pictures:
            self._write_html((folder or self._reports(first)) / "report.html", frame, runs, about)

    def _finished(self) -> list[Run]:
        """The methods scored with every network; a last one without any, after an interruption, is left out."""
        for count in range(len(self._outcomes), 0, -1):
            outcomes = self._outcomes[:count]
            done = [name for name in self._order if all(name in others for others in outcomes)]
            if done:
                networks = zip(self._options.seeds, self._evaluations, outcomes, strict=False)
                return [Run(seed, e.suite, {name: found[name] for name in done}) for seed, e, found in networks]
        return []

    def _reports(self, run: Run) -> Path:
        """Where the report goes that nobody named a folder for."""
        cache: Path = self._options.cache
        return cache / "reports" / re.sub(r"[^\w.-]+", "_", f"{run.suite.name}_{run.suite.network_name}")

    def _write_html(self, path: Path, frame: pd.DataFrame, runs: list[Run], about: dict[str, object]) -> None:
        """``report.html``; what it lacks to be written is told, and costs nothing else."""
        try:
            from comparison import html_report

            html_report.write(path, frame, runs, list(self._failures.values()), about, self._options.device)
            print(f"\nReport, for a browser: {path.resolve()}")
        except Exception as error:
            hint = ' Supply it by pip install -e ".[bench]".' if isinstance(error, ImportError) else ""
            print(f"No report.html: {type(error).__name__}: {error}.{hint}", file=sys.stderr)

    def _draw(self, folder: Path, frame: pd.DataFrame, run: Run) -> list[str]:
        """The pictures, and Markdown that shows them."""
        paths = pictures.draw(folder, frame, run)
        try:
            paths.append(pictures.heat_maps(folder / "heat_maps.png", run.suite, self._options.device))
        except Exception as error:
            print(f"No heat maps: {type(error).__name__}: {error}", file=sys.stderr)
        return ["## Pictures", *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in paths)]

    @contextlib.contextmanager
    def _noted(self, method: Method, alone: bool = False) -> Iterator[None]:
        """An error of the method's is noted, unless other ranks are waiting for this one's scores."""
        try:
            yield
        except SourceError:  # images that nobody can read
            raise
        except Exception as error:
            if ranks.world_size() > 1 and not alone:
                raise
            self.failed = True
            self._failures[method.name] = Failure(method.name, f"{type(error).__name__}: {error}")
            print(f"{method.name} failed: {self._failures[method.name].reason}", file=sys.stderr)


def _chosen(
    wanted: Sequence[str], runnable: dict[str, Method], reasons: dict[str, str]
) -> tuple[list[Method], dict[str, str], set[str]]:
    """The methods that the command line names, in the registry's order; those of them that cannot run, and why; and
    which it asks for one by one."""
    known = [*runnable, *reasons]
    called = methods.called(runnable, known)
    for name in wanted:
        if name.casefold() not in called:
            near = difflib.get_close_matches(name.casefold(), called, 1)
            hint = f"; did you mean {called[near[0]]}?" if near else "."
            parser().error(f"--methods: no method {name!r}{hint} There are: default, all, {', '.join(known)}")
    asked = {called[name.casefold()] for name in wanted}
    groups = {"default": methods.DEFAULT, "all": known}
    names = {name for one in asked for name in groups.get(one, [one])}
    chosen = [method for name, method in runnable.items() if name in names]
    return chosen, {name: reason for name, reason in reasons.items() if name in names}, asked


if __name__ == "__main__":
    sys.exit(main())
