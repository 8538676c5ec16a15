"""The naive reference at split points as the package found them: also at functional calls, and on any axis.

As ``tests/helpers/oracle.py``, whose walk it uses: one split at a time, whole forwards of the untouched network,
autograd. The package says only where a split is and which of its dimensions is which; no gradient of it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openood_sandi.engine.split_point import Split
from tests.helpers.oracle import Options, gradient, hooked, ones_at_largest, walk

Act = Callable[[Tensor], "Tensor | None"]


class _AtCall(TorchFunctionMode):
    """Calls ``act`` with the result of the torch call number ``index`` of a pass; what it returns replaces that."""

    def __init__(self, index: int, act: Act) -> None:
        super().__init__()
        self._index, self._act, self._calls = index, act, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            return result
        self._calls += 1
        if self._calls != self._index + 1:
            return result
        replacement = self._act(result)
        if replacement is not None and args and result is args[0]:
            return result.copy_(replacement)  # whoever holds the tensor sees what was written into it
        return result if replacement is None else replacement


@contextmanager
def at(net: nn.Module, split: Split, act: Act) -> Iterator[None]:
    """``act`` sees, and may replace, what ``split`` holds in the passes inside."""
    site = split.site

    def uncounted(tensor: Tensor) -> Tensor | None:
        with torch._C.DisableTorchFunction():
            return act(tensor)

    with _AtCall(site.index, uncounted) if site.module is None else hooked(net, site.name, uncounted):
        yield


def activation(net: nn.Module, x: Tensor, split: Split) -> Tensor:
    seen: list[Tensor] = []
    x = x.clone()  # some networks write into their images
    with torch.no_grad(), at(net, split, lambda z: seen.append(z.clone())):
        net(x)
    return seen[0]


def forward_with(net: nn.Module, x: Tensor, split: Split, z: Tensor, feature: Split | None) -> tuple[Tensor, Tensor]:
    """Logits and F (the logits again, if no ``feature`` is named) of the network whose split holds z."""
    seen: list[Tensor] = []
    x = x.clone()
    with at(net, split, lambda _: z.clone()):
        if feature is None:
            logits = net(x)
            return logits, logits
        with at(net, feature, lambda f: seen.append(f.clone())):
            return net(x), seen[0]


@dataclass
class Naive:
    """g_1..g_T at splits of ``net`` on images ``x``, by the attack of ``options`` (variants Z and A)."""

    net: nn.Module
    x: Tensor
    feature: Split | None = None
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.logits = self.net(self.x.clone())

    def gradients(self, split: Split) -> list[Tensor]:
        """g_i of variant Z, or of A's numerator (Eq. 12), at ``split``."""
        attribute = self._inner if self.feature is not None else lambda logits: logits.max(1).values.sum()
        return self._walk(split, attribute, self.feature)

    def output_gradients(self) -> list[Tensor]:
        """g_i at F, of A's denominator."""
        assert self.feature is not None
        return self._walk(self.feature, lambda logits: logits.log_softmax(1).sum(), None)

    def _walk(self, split: Split, attribute: Callable[[Tensor], Tensor], feature: Split | None) -> list[Tensor]:
        labels = self.logits.argmax(1)

        def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, attributed = forward_with(self.net, self.x, split, z, feature)
            return attribute(attributed), F.cross_entropy(logits, labels, reduction="sum"), logits

        return walk(activation(self.net, self.x, split), forward, self.options, labels)[1]

    def _inner(self, features: Tensor) -> Tensor:
        assert self.feature is not None
        return (self._top_channels() * self.feature.by_channel(features).mean(2)).sum()

    def _top_channels(self) -> Tensor:
        if not hasattr(self, "_top"):
            assert self.feature is not None
            z = activation(self.net, self.x, self.feature).requires_grad_()
            slope = gradient(forward_with(self.net, self.x, self.feature, z, None)[0].sum(), z)
            self._top = ones_at_largest(self.feature.by_channel(slope).mean(2), self.options.top_fraction)
        return self._top


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, of the largest expected value; infinite where the shapes or numbers of tensors differ."""
    if [g.shape for g in found] != [g.shape for g in expected]:
        return float("inf")
    scale = max(float(g.abs().max()) for g in expected)
    return max(float((g - e).abs().max()) for g, e in zip(found, expected, strict=True)) / (scale or 1.0)
