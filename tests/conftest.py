"""Settings of the whole suite."""

from __future__ import annotations

import torch

# The networks are small: a second thread costs more in waiting than it computes, and ten times so on a busy machine.
torch.set_num_threads(1)
