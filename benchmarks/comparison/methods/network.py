"""What the libraries ask of a network, found in any classifier from the outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi.engine.features import LinearHead, Penultimate, hooked, stages

from ..suite import ImageSet, Suite
from .baselines import BASELINES, Need, fitted


class NetworkParts:
    """What a suite has of what methods need: the last layer, stages, and images other than those scored."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        first: Tensor = suite.in_distribution.dataset[0][0]
        self.image = first.unsqueeze(0).to(next(suite.network.parameters()).device)
        self.head: LinearHead | None = None
        self.fitted_on: dict[str, tuple[ImageSet, ...]] = {
            "training": (suite.training,) if suite.training else (),
            "validation": (suite.validation or ())[:1],
            "OOD validation": (suite.validation or ())[1:],
        }
        self._problems: dict[str, str] = {
            need: f"needs {need} images, which {suite.name} has none of here"
            for need, images in self.fitted_on.items()
            if not images
        }
        try:
            self.head = Penultimate(suite.network).head(self.image)
            Blocks(suite.network, self.image)
        except ValueError as error:
            self._problems |= dict.fromkeys(["blocks"] if self.head else ["head", "blocks"], str(error))

    @property
    def training_images(self) -> int | None:
        return len(self.suite.training) if self.suite.training else None

    def lacks(self, needs: Sequence[Need]) -> str | None:
        """Why a method with these needs cannot run; None if it can."""
        return next((self._problems[need] for need in needs if need in self._problems), None)

    def options(self, name: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Options and sweep of a baseline here."""
        return fitted(name, self.head.weight.shape[1] if self.head else None, self.training_images)

    def cannot_run(self, name: str) -> str | None:
        """Why a baseline cannot run; None if it can."""
        count, wanted = self.training_images, BASELINES[name].options.get("K", 0)
        if count is not None and count < wanted:
            return f"needs {wanted} training images, {self.suite.name} has {count} here"
        return self.lacks(BASELINES[name].needs)

    def fingerprints(self, needs: Sequence[Need]) -> dict[str, str]:
        """Of the images other than those scored that decide the scores of a method with these needs."""
        found = {need: self.fitted_on.get(need, ()) for need in needs}
        return {need: " ".join(part.contents for part in images) for need, images in found.items() if images}


class Blocks:
    """The end of a network in the pieces that RankFeat takes apart: ``head(mean(last(before)))``.

    Attributes:
        before, after: names of the modules that return the feature maps of the last two stages.
        last: turns the first of these maps into the second.

    Raises:
        ValueError: if the network cannot be taken apart so.
    """

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        names = stages(net, x)[-2:]
        if len(names) < 2:
            raise ValueError("needs feature maps at two resolutions at least, which this network lacks")
        self.before, self.after = names
        penultimate = Penultimate(net)
        penultimate.head(x)  # before the hooks are set
        with outputs_of(net, names) as maps:
            features, _ = penultimate(x)
        self.last = _between(net, self.before, self.after)
        if maps[self.after].dim() != 4 or not _close(mean_over_positions(maps[self.after]).flatten(1), features):
            raise ValueError("needs features that are the mean of the last feature map, which this network's are not")
        if not _turns(self.last, maps[self.before], maps[self.after]):
            raise ValueError(f"needs a last stage that is one module, which {self.after!r} is not")


def _between(net: nn.Module, before: str, after: str) -> nn.Module:
    """The module that ``after`` names, or what follows ``before`` in it if that is one of its children."""
    module = net.get_submodule(after)
    if isinstance(module, nn.Sequential) and before.startswith(after + "."):
        names = [name for name, _ in module.named_children()]
        child = before[len(after) + 1 :]
        if child in names:
            return module[names.index(child) + 1 :]
    return module


@torch.no_grad()
def _turns(module: nn.Module, given: Tensor, expected: Tensor) -> bool:
    with suppress(Exception):  # a module that takes something else may fail in any way
        return _close(module(given), expected)
    return False


def mean_over_positions(maps: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 1, 1)."""
    return F.adaptive_avg_pool2d(maps, 1)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.nan_to_num(0, 0, 0).abs().max())
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


@contextmanager
def outputs_of(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules in a forward pass, copied, by name."""
    found: dict[str, Tensor] = {}
    modules = {name: net.get_submodule(name) for name in names}
    with hooked(modules, lambda name, _, output: found.update({name: output.clone()})):
        yield found


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """No parameter takes gradients, which a method's backward pass would otherwise leave there."""
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class OpenOODNetwork(nn.Module):
    """Any classifier ``net`` with a linear last layer, found with ``x`` (B, C, H, W), as OpenOOD's networks are."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net = net
        self._penultimate = Penultimate(net)
        self.fc = as_linear(self._penultimate.head(x))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self._blocks: Blocks | None = None
        with suppress(ValueError):  # only RankFeat needs them, and is not offered without
            self._blocks = Blocks(net, x)

    def forward(self, x: Tensor, return_feature: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, classes), with the penultimate features (B, D) behind them if asked for."""
        if not return_feature:
            logits: Tensor = self.net(x)  # with gradients, which ODIN takes
            return logits
        features, logits = self._penultimate(x)
        return logits, features

    def intermediate_forward(self, x: Tensor, layer_index: int) -> Tensor:
        """The feature map of the last stage (4, as OpenOOD counts) or the one before (3)."""
        assert self._blocks is not None
        name = {3: self._blocks.before, 4: self._blocks.after}[layer_index]
        with outputs_of(self.net, [name]) as found:
            self.net(x)
        return found[name]

    def layer4(self, maps: Tensor) -> Tensor:
        assert self._blocks is not None
        result: Tensor = self._blocks.last(maps)
        return result

    def get_fc(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        return self.fc.weight.detach().cpu().numpy(), self.fc.bias.detach().cpu().numpy()

    def get_fc_layer(self) -> nn.Linear:
        return self.fc


def as_linear(head: LinearHead) -> nn.Linear:
    """The last layer as ``nn.Linear`` with a bias: itself, or its equal."""
    if isinstance(head.module, nn.Linear) and head.module.bias is not None:
        return head.module
    linear = nn.Linear(head.weight.shape[1], head.weight.shape[0], device=head.weight.device)
    linear.weight = nn.Parameter(head.weight, requires_grad=False)
    linear.bias = nn.Parameter(head.bias, requires_grad=False)
    return linear
