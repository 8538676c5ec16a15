"""The windows of convolutions and pools, gone through backwards: which positions those that are True were made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from openood_sandi.detectors.sandi.alive import Where, conjunction, everywhere_as_none
from openood_sandi.detectors.sandi.call_graph import UnreadableError, argument
from openood_sandi.engine.recorded import Call

__all__ = ["Windows"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Windows over the positions (H, W) of a map, one for each position of its result.

    Attributes:
        kernel, stride, padding, dilation: of the windows, vertically and horizontally.
        given: H and W of what they go over.
        results: how many windows there are, vertically and horizontally.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    given: Pair
    results: Pair

    @classmethod
    def of_convolution(cls, call: Call, given: Size, kernel: Size) -> Windows:
        """Those of a ``conv2d`` with a ``kernel`` (height, width) over an operand of shape ``given``."""
        dilation = _pair(argument(call, 5, "dilation", 1))
        padding = argument(call, 4, "padding", 0)
        if padding == "same":  # where that is odd, the greater half comes last
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        padding = 0 if padding == "valid" else padding
        stride = _pair(argument(call, 3, "stride", 1))
        return cls(_pair(tuple(kernel)), stride, _pair(padding), dilation, *_sizes(call, given))

    @classmethod
    def of_pool(cls, call: Call, given: Size) -> Windows:
        """Those of a ``max_pool2d`` or ``avg_pool2d`` over an operand of shape ``given``."""
        kernel = _pair(argument(call, 1, "kernel_size", None))
        stride = _pair(argument(call, 2, "stride", None) or kernel)
        dilation = argument(call, 4, "dilation", 1) if call.name == "max_pool2d" else 1
        return cls(kernel, stride, _pair(argument(call, 3, "padding", 0)), _pair(dilation), *_sizes(call, given))

    @property
    def are_apart(self) -> bool:
        """Whether no position lies in two of them."""
        return all(
            k == 1 or (k <= s and d == 1) for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    @property
    def beyond(self) -> Pair:
        """How far they reach beyond the last row and column."""
        (height, width), (top, left), (down, right) = self._lengths, self.padding, self.given
        return height - top - down, width - left - right

    @property
    def are_ceiled(self) -> bool:
        """Whether, as with ``ceil_mode`` alone, some reach beyond the padding."""
        return any(beyond > padding for beyond, padding in zip(self.beyond, self.padding, strict=True))

    def __call__(self, where: Tensor) -> Where:
        """Which positions (B, K, H, W) lie in a window whose result is True, of results (B, K, h, w)."""
        if self.kernel == self.stride == (1, 1) and self.padding == (0, 0):
            return everywhere_as_none(where)
        down, right = self._steps
        line = self._in_line(where)
        for step, places in ((right, self.kernel[1]), (down, self.kernel[0])):
            before, line = line, line.clone() if places > 1 else line
            for place in range(1, places):
                line.view(-1)[place * step :] |= before.view(-1)[: -place * step]
        return everywhere_as_none(self._as_map(line))

    def reading(self, read: Tensor) -> Callable[[Tensor], Where]:
        """What a call does, where windows read some of their places only: ``read`` (K, height, width) of the kernel."""
        some, every = read.flatten(1).any(1), read.flatten(1).all(1)
        are_some_dead, partly = not bool(some.all()), (some & ~every).nonzero()[:, 0]
        kernels = read[partly, None].float()

        def reached(where: Tensor) -> Where:
            found = self(conjunction(where, some[:, None, None]) if are_some_dead else where)
            if not len(partly):
                return found
            part = (where if where.shape[1] == 1 else where[:, partly]).expand(-1, len(partly), -1, -1)
            found = where.new_ones(1, 1, *self.given) if found is None else found
            found = found.expand(len(where), len(read), -1, -1).contiguous()
            found[:, partly] = self._through_kernels(part, kernels)
            return everywhere_as_none(found)

        return reached

    def _through_kernels(self, where: Tensor, kernels: Tensor) -> Tensor:
        """As a call, of channels (B, n, h, w) with kernels (n, 1, height, width) of ones and zeros of their own."""
        ways = F.conv_transpose2d(  # that do not meet a zero
            where.float(), kernels, stride=self.stride, dilation=self.dilation, groups=len(kernels)
        )
        bottom, right = (length - size for length, size in zip(self._lengths, ways.shape[2:], strict=True))
        return self._without_padding(F.pad(ways > 0.5, (0, right, 0, bottom)))

    def through_weights(self, where: Tensor, unclear: Tensor, nonzero: Tensor) -> Tensor:
        """As a call, for some results alone, of a convolution each of whose weights is zero or not.

        Args:
            where: (B, outputs, h, w).
            unclear: (B, h, w): which results to go through.
            nonzero: (groups, outputs / groups, K / groups, height, width).
        """
        groups, _, inputs, *kernel = nonzero.shape
        image, y, x = unclear.nonzero().T
        open_ = where[image, :, y, x].float().view(len(image), groups, -1)
        out = where.new_zeros(len(where), groups * inputs, *self._lengths)
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                ways = torch.einsum("ngo,goc->ngc", open_, nonzero[..., i, j].float())  # that do not meet a zero
                row, column = y * self.stride[0] + i * self.dilation[0], x * self.stride[1] + j * self.dilation[1]
                out[image, :, row, column] |= ways.flatten(1) > 0.5
        return self._without_padding(out)

    # Maps are laid out in lines, each row with its padding and each channel with its own, so that to shift all of them
    # is to start elsewhere: one pass over one stretch of memory for each place of a window.

    @property
    def _steps(self) -> Pair:
        """How far in a line it is to a window's next place below, and to the right."""
        return self.dilation[0] * self._lengths[1], self.dilation[1]

    @property
    def _lengths(self) -> Pair:
        """Of the positions with their padding, and beyond where windows do not reach the end."""
        return self._length(0), self._length(1)

    def _length(self, axis: int) -> int:
        windowed = (self.results[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1
        return max(windowed, self.padding[axis] + self.given[axis])

    def _in_line(self, where: Tensor) -> Tensor:
        """Results (B, K, h, w) as (B, K, places), each where the first place of its window is."""
        (height, width), (down, right) = self._lengths, self.stride
        rows, columns = ((results - 1) * step + 1 for results, step in zip(self.results, self.stride, strict=True))
        line = where.new_zeros(*where.shape[:2], height, width)
        line[:, :, :rows:down, :columns:right] = where
        return line.flatten(2)

    def _as_map(self, line: Tensor) -> Tensor:
        return self._without_padding(line.view(*line.shape[:2], *self._lengths))

    def _without_padding(self, where: Tensor) -> Tensor:
        (top, left), (height, width) = self.padding, self.given
        return where[:, :, top : top + height, left : left + width].contiguous()


def _sizes(call: Call, given: Size) -> tuple[Pair, Pair]:
    """H and W of a call's operand and of its result."""
    if call.result.dim() != 4:
        raise UnreadableError
    return _pair(tuple(given[2:])), _pair(tuple(call.result.shape[2:]))


def _pair(value: object) -> Pair:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Sequence) and len(value) in (1, 2) and all(isinstance(item, int) for item in value):
        return value[0], value[-1]
    raise UnreadableError
