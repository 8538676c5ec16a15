"""The caller's hooks on a network that is scored batch after batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.cases import prepared
from tests.helpers.trap_networks import InPlaceResidual


def clamps(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.clamp(max=0.5)


def doubles_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


def clamps_large_ones(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    return output.clamp(max=3) if output.max() > 5 else None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", ["Z", "A"])
@pytest.mark.parametrize("hook", [clamps, doubles_in_place, clamps_large_ones])
def test_what_a_hook_changes_counts_in_every_batch(hook: Callable[..., Any], variant: str) -> None:
    net, x = prepared(InPlaceResidual)
    net.norm1.register_forward_hook(hook)
    detector = SandI(net, variant=variant)
    for batch in (0.1 * x, 5 * x, x):
        torch.testing.assert_close(detector(batch)[1], SandI(net, variant=variant)(batch)[1], rtol=1e-12, atol=0)
