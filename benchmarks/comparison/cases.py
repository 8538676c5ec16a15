"""What the small studies share: several networks on one command line, and a folder of results."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from openood_sandi.runs.files import replace

from . import sources
from .console import Parser, positive
from .environment import described, environment
from .evaluation import Decoder
from .files import markdown
from .suite import Suite

CPU = torch.device("cpu")


class Study:
    """A study of some networks, on the CPU.

    Args:
        script: its path below the checkout, for the command that is recorded.
        about: what it does, its first line for ``--help``.
    """

    def __init__(self, script: str, about: str | None) -> None:
        self.script = script
        self.parser = Parser(description=(about or "").partition("\n")[0])
        case = "a network and its data: options of side_by_side.py in quotes, as '--data cifar10 --network resnet20'"
        self.parser.add_argument("cases", nargs="+", metavar="CASE", help=case)
        self.parser.add_argument("--limit", type=positive, help="use only LIMIT images of every set but training")
        self.parser.add_argument("--batch-size", type=positive, default=100, help="default: %(default)s")
        self.parser.add_argument("--out", type=Path, metavar="DIR", help="write CSV, Markdown and JSON there")

    def start(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options; how it was made is looked up now, before code or machine may change."""
        self.options = self.parser.parse_args(arguments)
        self._about = {
            "command": shlex.join(["python", self.script, *arguments]),
            "limit": self.options.limit,
            "batch_size": self.options.batch_size,
            **environment(CPU),
        }
        return self.options

    def suites(self) -> Iterator[tuple[str, Suite]]:
        """Each case's data and network, as "cifar10 resnet20", and its suite with images decoded once."""
        parser = Parser(prog="CASE")
        sources.add_arguments(parser)
        self._networks: dict[str, str] = {}
        for case in self.options.cases:
            suite = sources.load(parser.parse_args(shlex.split(case))).limited(self.options.limit)
            name = f"{suite.name} {suite.network_name.rpartition(':')[2]}"
            self._networks[name] = f"{suite.network_description} (SHA-256 {suite.weights})"
            yield name, Decoder(self.options.batch_size, 0).suite(suite)

    def write(self, title: str, text: str, tables: Mapping[str, pd.DataFrame]) -> None:
        """Prints the tables, and writes them with what they say into ``--out``: ``results.md``, CSV files, JSON."""
        for name, table in tables.items():
            print(f"\n{name}\n{table.to_string(index=False)}")
        folder: Path | None = self.options.out
        if folder is None:
            return
        versions, machine = self._about["versions"], self._about["hardware"]
        assert isinstance(versions, dict) and isinstance(machine, dict)
        made = f"Made by `{self._about['command']}` with torch {versions['torch']} on {described(machine)}."
        parts = [f"# {title}", f"{made} Everything else about the run is in `results.json`.", text]
        for name, table in tables.items():
            parts += [f"## {name[0].upper()}{name[1:]}", markdown(table.map(_shown))]
            replace(folder / f"{name.replace(' ', '_')}.csv", table.to_csv(index=False))
        parts += ["## Networks", "\n".join(f"- {name}: {what}" for name, what in self._networks.items())]
        record = {**self._about, "networks": self._networks}
        record |= {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        replace(folder / "results.md", "\n\n".join(parts) + "\n")
        replace(folder / "results.json", json.dumps(record, indent=1) + "\n")
        print(f"\nWritten to {folder}.")


def _shown(value: object) -> object:
    if not isinstance(value, float):
        return value
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"
