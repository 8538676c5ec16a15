"""Networks with a part under ``torch.no_grad()``: gradients stopped on purpose, frozen stems, and what is neither."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.trap_networks import WIDTH, Block, conv


class Inside(Block):
    """With a second block, norm2, which stands behind the stem; ``region`` is what the frozen ones run it under."""

    region: type[contextlib.AbstractContextManager[None]] = torch.no_grad

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.norm2 = conv(), nn.BatchNorm2d(WIDTH)

    def second(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(x)))

    @classmethod
    def without_no_grad(cls) -> type[Inside]:
        return type(cls.__name__, (cls,), {"region": contextlib.nullcontext})


# --- a tensor under no_grad from one that reaches the logits with its gradient too: a constant


class StraightThrough(Inside):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        y = y * 3
        with torch.no_grad():
            error = y.round() - y
        return y + error + x


class QuantisedInput(Inside):
    """What enters the region is used nowhere else, but comes from what is."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        scaled = y.abs() * 2
        with torch.no_grad():
            largest = scaled.amax((1, 2, 3), keepdim=True)
        return y / largest + x


class Nested(Inside):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            with torch.no_grad():
                largest = y.abs().amax()
            largest = largest + x.abs().amax()
        return y / largest + x


class EnabledWithin(Inside):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            with torch.enable_grad():
                doubled = y * x
            largest = y.abs().amax()
        return doubled / largest + x


class Decorated(Inside):
    @torch.no_grad()
    def gate(self, y: Tensor) -> Tensor:
        return y.sigmoid()

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.gate(y) + x * self.gate(x)


class SetAndReset(Inside):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        largest = y.amax()
        torch.set_grad_enabled(before)
        return y / largest + x


class WritesInside(Inside):
    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            kept = torch.zeros_like(y)
            kept[y > 0] = 1
            kept.mul_(2)
        return y * kept + x


class Teacher(Inside):
    """A module runs inside, without a split there."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.second(y)
        return y + target


STOPPED: list[type[nn.Module]] = [
    *(StraightThrough, QuantisedInput, Nested, EnabledWithin, Decorated, SetAndReset, WritesInside, Teacher)
]


# --- nothing but the images enters: the same function without no_grad, splits inside and behind


class FrozenTwoMaps(Inside):
    """Both maps of the frozen stem are used behind it."""

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            first = F.relu(self.norm0(self.stem(x)))
            second = self.second(first)
        y = F.relu(self.norm1(self.conv1(second))) + first
        return self.head(self.feature(self.norm9(self.last(y))).mean((2, 3)))


class FrozenInParts(Inside):
    """One region after the other."""

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            x = F.relu(self.norm0(self.stem(x)))
        with self.region():
            x = self.second(x)
        return self.head(self.feature(self.norm9(self.last(self.middle(x)))).mean((2, 3)))


class FrozenThenStopped(Inside):
    """A stop-gradient behind a frozen stem."""

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            x = self.second(F.relu(self.norm0(self.stem(x))))
        x = self.middle(x)
        with torch.no_grad():
            largest = x.amax((1, 2, 3), keepdim=True)
        return self.head(self.feature(self.norm9(self.last(x / largest))).mean((2, 3)))


FROZEN: list[type[Inside]] = [FrozenTwoMaps, FrozenInParts, FrozenThenStopped]


# --- neither


class SplitInside(Inside):
    """norm2 under no_grad, from a tensor that is used outside as well."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.second(x)
        return y + target


class FrozenAndUsedAgain(Inside):
    """Is the largest value a stop-gradient, or frozen as well?"""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.second(F.relu(self.norm0(self.stem(x))))
        with torch.no_grad():
            largest = x.amax()
        return self.head(self.feature(self.norm9(self.last(self.middle(x / largest)))).mean((2, 3)))


class InPlaceInside(Inside):
    """The gradient passes a write under no_grad as if it were none."""

    def middle(self, x: Tensor) -> Tensor:
        return super().middle(self.second(x))

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            y.clamp_(max=1)
        return y + x


class Inference(Inside):
    def middle(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.second(x).clone()
        return super().middle(x.clone())


UNCLEAR: list[type[nn.Module]] = [SplitInside, FrozenAndUsedAgain, InPlaceInside, Inference]
