"""A network to test on: how to build it, what to feed it, where to split it.

Every network has seeded weights, non-trivial normalisation statistics, eval mode, float64, and is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Case:
    """A network, the size of its images, its feature map F for variant A, and how many split points to test."""

    name: str
    make: Callable[[], nn.Module]
    size: int
    feature: str = ""
    splits: tuple[str, ...] = ()
    at_most: int = 6


def build(case: Case, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = case.make()
        randomise(net)
    net = net.double().eval().requires_grad_(False)
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    head = linear[-1] if linear else [m for m in net.modules() if isinstance(m, nn.Conv2d)][-1]
    # A saturated softmax has gradients of the size of rounding, whose signs no two computations share.
    head.weight.mul_(2 / net(images(case)).std())
    return net


def randomise(net: nn.Module) -> None:
    """Weights of a scale that keeps activations of order one, so that neither half of a rectifier is empty."""
    for module in net.modules():
        if isinstance(module, NORMS) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)


def images(case: Case, batch: int = 3, seed: int = 1) -> Tensor:
    """(batch, 3, size, size), each image of a contrast of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, case.size, case.size, generator=generator, dtype=torch.float64)
    return (x * torch.tensor([1.0, 0.5, 2.0], dtype=x.dtype).view(3, 1, 1, 1))[:batch]


def calls(net: nn.Module, x: Tensor) -> list[str]:
    """Every call of a module, in the order in which they return; "name#2" for a second call."""
    seen: list[str] = []

    def note(name: str) -> None:
        times = sum(call.partition("#")[0] == name for call in seen)
        seen.append(name if not times else f"{name}#{times + 1}")

    handles = [
        module.register_forward_hook(lambda _m, _a, _o, name=name: note(name))
        for name, module in net.named_modules()
        if name
    ]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def norm_calls(net: nn.Module, x: Tensor) -> list[str]:
    """The output of every normalisation layer, in call order."""
    return [call for call in calls(net, x) if isinstance(net.get_submodule(call.partition("#")[0]), NORMS)]


def split_points(case: Case, net: nn.Module, x: Tensor, before: str = "") -> list[str]:
    """The case's split points, by default its normalisation layers, in call order.

    They are thinned out evenly to ``at_most``, first and last kept; with ``before``, only those that return before it.
    """
    order = calls(net, x)
    points = [call for call in order if call in (case.splits or norm_calls(net, x))]
    if before:
        points = [point for point in points if order.index(point) < order.index(before)]
    if len(points) <= case.at_most:
        return points
    return [points[round(i * (len(points) - 1) / (case.at_most - 1))] for i in range(case.at_most)]


def prepared(make: Callable[[], nn.Module], size: int = 16) -> tuple[nn.Module, Tensor]:
    """A network and images for it."""
    case = Case("", make, size)
    return build(case), images(case)
