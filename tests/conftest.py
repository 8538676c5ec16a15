"""Settings of the whole suite."""

from __future__ import annotations

import sys

import torch

from tests.helpers.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))  # the comparison and the speed measurements are scripts, not a package

# The networks are small: a second thread costs more in waiting than it computes, and ten times so on a busy machine.
torch.set_num_threads(1)
