"""The split points of the S&I paper on its networks, and its choice of layers carried over to two others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

NORMS = (nn.BatchNorm2d, nn.GroupNorm)


@dataclass(frozen=True)
class Splits:
    """Where the paper splits a network: names of modules, found on the network, and A's F by module name."""

    names: Callable[[nn.Module], list[str]]
    feature: str | None = None


def norms(net: nn.Module, prefix: str = "") -> list[str]:
    """The normalisation layers, in order of definition."""
    return [name for name, module in net.named_modules() if isinstance(module, NORMS) and name.startswith(prefix)]


def _resnet(net: nn.Module) -> list[str]:
    """The first convolution, and every normalisation layer of the blocks: 36 in ResNet-34."""
    return ["conv1", *(name for name in norms(net) if name != "bn1")]


SPLITS = {
    "resnet34": Splits(_resnet),
    "wrn40-2": Splits(lambda net: [*norms(net), "avgpool"]),
    "bit-s-r101x1": Splits(lambda net: norms(net, "body.block4."), feature="before_head"),
    # Not in the paper:
    "resnet18_32x32": Splits(_resnet),
    "resnet50": Splits(lambda net: norms(net, "layer4."), feature="layer4"),
}
