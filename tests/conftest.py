"""Settings of the whole suite."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from openood_sandi.runs import keys
from tests.helpers.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))  # the comparison and the speed measurements are scripts, not a package

# The networks are small: a second thread costs more in waiting than it computes, and ten times so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _settings_stay_as_they_are() -> Iterator[None]:
    """A test that leaves a setting of torch or a patch of the package behind makes others fail that come after it."""
    before = _settings()
    yield
    after = _settings()
    changed = [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    assert not changed, f"the test changes settings of the whole process: {', '.join(changed)}"


@pytest.fixture(autouse=True, scope="module")
def _sources_stay_as_they_are() -> Iterator[None]:
    """Once a file: reading all of the package's sources before and after each test would take half a minute in all."""
    before = keys.code()
    yield
    assert keys.code() == before, "a test of this file writes into the package's source files (or somebody else did)"


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone, for ``DistributedDataParallel``."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _settings() -> dict[str, str]:
    return {**keys.arithmetic(torch.device("cpu")), "openood_sandi.runs.keys.code": str(keys.code)}


def pytest_configure(config: pytest.Config) -> None:
    """Of pytest-xdist's ways to share tests out, that in which neighbours, which share fixtures, stay together."""
    if getattr(config.option, "dist", "no") == "load":  # what -n chooses
        config.option.dist = "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Half of the time in which modules are imported would go into looking through them for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long implies slow, so that ``-m "not slow"`` leaves both out; first, since pytest selects in this hook too."""
    for item in items:
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: an address, so that no two processes run the same tests"
        if item.get_closest_marker("long"):
            item.add_marker("slow")
