"""Settings of the whole suite."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.helpers.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))  # the comparison and the speed measurements are scripts, not a package

# The networks are small: a second thread costs more in waiting than it computes, and ten times so on a busy machine.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long implies slow, so that ``-m "not slow"`` leaves both out; first, since pytest selects in this hook too."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
