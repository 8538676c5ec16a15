"""The caller's hooks on a network that is scored batch after batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.cases import prepared
from tests.helpers.oracle import Options, Reference
from tests.helpers.trap_networks import Block, InPlaceResidual


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


def doubles_gradients(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return (2 * inputs[0],)


def looks_at_gradients(module: nn.Module, inputs: Any, outputs: Any) -> None:
    float(inputs[0].mean())


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize("options", [{"variant": "Z", "rectifier_shortcut": False}, {"variant": "A"}], ids=["Z", "A"])
@pytest.mark.parametrize("layer", ["stem", "norm0", "norm1"])
@pytest.mark.parametrize("hook", [doubles_gradients, looks_at_gradients])
def test_backward_hooks_are_part_of_the_gradient(hook: Callable[..., Any], layer: str, options: dict[str, Any]) -> None:
    """Those of the first layers too, whose inputs are images and have no gradient."""
    net, x = prepared(Block)
    net.get_submodule(layer).register_full_backward_hook(hook)
    detector = SandI(net, **options)
    tau = detector(x)[1]
    # to the reference hooks come as in training, where the images' gradient is asked for as well
    asked = Options(options["variant"], feature=detector.feature_name or "")
    right = Reference(net, x.clone().requires_grad_(), detector.split_names, asked).tau()
    torch.testing.assert_close(tau, right.detach(), rtol=1e-9, atol=0)
