"""Random changes to code, weights, images and settings, each judged by a fresh process: never a stale score; and
unchanged, in whatever process, always a hit."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import fresh_runs
from tests.helpers.fresh_runs import BYTES, IMAGES, MODULES, SETTINGS, Server
from tests.helpers.places import ROOT

BATCHES = -(-IMAGES // SETTINGS["batch size"])
#: What stands in the modules, and what may stand there instead; {} is a random number.
EDITS = [
    ("world_net", "SCALE = 2.0", "SCALE = 2.{}"),
    ("world_net", "power = 2", "power = 1.{}"),
    ("world_net", "offset=0.25", "offset=0.{}"),
    ("world_net", "x.relu()", "(x.relu() * 1.{})"),
    ("world_net", '{"alpha", "beta", "gamma", "delta"}', '{{"beta{}"}}'),
    ("world_net", 'if "alpha" in', 'if "alpha{}" in'),
    ("world_net", "return self.head(", "x = x + 0.{}\n        return self.head("),
    ("world_helper", "LIMIT = 3.0", "LIMIT = 0.{}"),
    ("world_helper", "limit()", "limit(0.{})"),
    ("world_deeper", "most + 0.5", "most * 0.{}"),
    ("world_data", "offset = -1.0", "offset = -0.{}"),
    ("world_data", "* 1.0", "* 1.{}"),
    ("world_late", "image + 0.125", "image + 0.{}"),
]


class World:
    """What the scores are of, as a user has it on disk, and the ways in which it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules, self.settings = {**MODULES}, {**SETTINGS}
        pixels = random.Random(1)
        self.images = {f"{number:02d}.bin": pixels.randbytes(BYTES) for number in range(IMAGES)}
        generator = torch.Generator().manual_seed(2)
        self.weights = {
            "head.weight": torch.randn(3, 12, generator=generator),
            "head.bias": torch.randn(3, generator=generator),
            "norm.weight": torch.rand(12, generator=generator),
            "norm.bias": torch.rand(12, generator=generator),
            "norm.running_mean": torch.rand(12, generator=generator),
            "norm.running_var": torch.rand(12, generator=generator) + 0.5,
            "norm.num_batches_tracked": torch.tensor(0),
        }
        self.write()

    def write(self) -> None:
        fresh_runs.write(self.folder, self.modules, self.weights, self.images)

    def change(self, rng: random.Random) -> str:
        """One at random, which is told."""
        told = rng.choice([self._code, self._weight, self._image, self._setting])(rng)
        self.write()
        return told

    def _code(self, rng: random.Random) -> str:
        name, old, new = rng.choice([edit for edit in EDITS if edit[1] in self.modules[edit[0]]] or EDITS)
        if old not in self.modules[name]:  # all have been made: the module is as it was
            self.modules[name] = MODULES[name]
        self.modules[name] = self.modules[name].replace(old, new.format(rng.randrange(1, 10**6)))
        if rng.random() < 0.2:
            self.modules[name] = MODULES[name]  # taken back: an old score is the right one again
        return f"{name}: {old}"

    def _weight(self, rng: random.Random) -> str:
        name = rng.choice([name for name in self.weights if "num" not in name])
        changed = self.weights[name].clone()
        changed.view(-1)[rng.randrange(changed.numel())] += rng.choice([1e-3, 0.5])
        self.weights[name] = changed
        return name

    def _image(self, rng: random.Random) -> str:
        one, other = rng.sample(sorted(self.images), 2)
        kind = rng.choice(["a byte", "swapped", "another file"])
        before = (self.folder / "images" / one).stat()
        if kind == "a byte":
            pixels = bytearray(self.images[one])
            pixels[rng.randrange(BYTES)] ^= rng.randrange(1, 256)
            self.images[one] = bytes(pixels)
        elif kind == "swapped":
            self.images[one], self.images[other] = self.images[other], self.images[one]
        else:
            (self.folder / "images" / one).unlink()
        self.write()
        os.utime(self.folder / "images" / one, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and dates as before
        return f"image {kind}"

    def _setting(self, rng: random.Random) -> str:
        values = {
            "temperature": [1.0, 2.0, rng.random() + 0.5],
            "batch size": [4, 5, 6, 24],
            "mkldnn": [True, False],
            "precision": ["highest", "high", "medium"],
            "autocast": [None, "bfloat16", "float16"],
            "hook": [1.0, 0.5, rng.random()],
        }
        name = rng.choice(sorted(values))
        self.settings[name] = rng.choice([value for value in values[name] if value != self.settings[name]])
        return f"{name}: {self.settings[name]}"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def other() -> Iterator[Server]:
    """Another process, with another seed of hashes."""
    with Server("1") as server:
        yield server


def copied(folder: Path) -> Path:
    """A folder with a copy of this package."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "openood_sandi", folder / "openood_sandi", ignore=ignored)
    return folder


def fuzz(world: World, server: Server, count: int, package: Path = ROOT) -> int:
    """How many of the random changes changed scores; none may be missed."""
    rng = random.Random(0)
    before, cache, effective = None, world.folder.parent / "cache", 0
    for number in range(count):
        told = world.change(rng) if number else "nothing"
        found = server.run(world.folder, cache, world.settings, package=str(package))
        assert found["scores"] == found["plain"], f"change {number}, {told}: stale scores"
        effective += found["plain"] != before
        before = found["plain"]
    return effective


def test_a_few_changes(world: World, server: Server) -> None:
    assert fuzz(world, server, 4) > 1


@pytest.mark.long
def test_a_hundred_changes_each_in_a_fresh_process(world: World, server: Server) -> None:
    assert fuzz(world, server, 101) > 50, "changes that change nothing prove nothing"


def ways(rng: random.Random, folder: Path) -> Iterator[dict[str, Any]]:
    """How processes may differ: where the world is, what is imported first, where the network is typed."""
    while True:
        elsewhere = folder.parent / f"elsewhere{rng.randrange(3)}" / "deeper"
        if not elsewhere.exists():
            shutil.copytree(folder, elsewhere)
        first = rng.sample(["world_late", "world_deeper", "PIL.Image", "json", "openood_sandi", "torch.fx"], 3)
        yield {"folder": rng.choice([folder, elsewhere]), "first": first, "typed": rng.random() < 0.5}


def hits(world: World, server: Server, others: Iterable[Server], runs: int) -> list[bool]:
    """Whether runs of other processes, of an unchanged world, score nothing."""
    rng, cache = random.Random(0), world.folder.parent / "cache"
    packages = itertools.cycle(map(str, (copied(world.folder.parent / "checkout"), ROOT)))
    first = [server.run(world.folder, cache, typed=typed) for typed in (False, True)]
    assert [run["scored"] for run in first] == [BATCHES] * 2
    found = []
    for other in others:
        for package, _, way in zip(packages, range(runs), ways(rng, world.folder), strict=False):
            again = other.run(cache=cache, package=package, **way)
            assert again["scores"] == again["plain"] == first[0]["plain"]
            found.append(again["scored"] == 0)
    return found


def test_a_few_other_processes_score_nothing(world: World, server: Server, other: Server) -> None:
    assert hits(world, server, [other], 3) == [True] * 3


def seeded(count: int) -> Iterator[Server]:
    """Processes with seeds of hashes of their own, one after the other."""
    for seed in range(1, count + 1):
        with Server(str(seed)) as server:
            yield server


@pytest.mark.long
def test_a_hundred_other_processes_score_nothing(world: World, server: Server) -> None:
    assert hits(world, server, seeded(10), 10) == [True] * 100


def test_a_killed_process_leaves_what_it_has_scored(
    world: World, tmp_path: Path, server: Server, other: Server
) -> None:
    for kill in range(2, BATCHES + 1):
        cache = tmp_path / f"cache{kill}"
        assert server.run(world.folder, cache, kill=kill) == {}
        resumed = other.run(world.folder, cache)
        assert resumed["scores"] == resumed["plain"]
        # what the batch before it gave was on disk; the first one is shown again
        assert resumed["scored"] == BATCHES - kill + 2


def test_the_fuzz_sees_a_stale_hit(world: World, tmp_path: Path, server: Server) -> None:
    """With a package whose keys forget the network's code."""
    package = copied(tmp_path / "broken")
    keys = package / "openood_sandi/runs/keys.py"
    text = keys.read_text()
    whole = "return digest(net, settings.global_hooks(), replaced.functions())"
    assert whole in text
    keys.write_text(text.replace(whole, "return digest(net.state_dict())"))
    with pytest.raises(AssertionError, match="stale"):
        fuzz(world, server, 12, package)
