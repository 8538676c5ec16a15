"""The windows of convolutions and pools, gone through backwards: which positions those that are True were made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Size, Tensor

from openood_sandi.detectors.sandi.alive import Where, everywhere_as_none
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
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    given: Pair

    @classmethod
    def of_convolution(cls, call: Call, given: Size, kernel: Size) -> Windows:
        """Those of a ``conv2d`` with a ``kernel`` (height, width) over an operand of shape ``given``."""
        dilation = _pair(argument(call, 5, "dilation", 1))
        padding = argument(call, 4, "padding", 0)
        if padding == "same":  # where that is odd, the greater half comes last
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        padding = 0 if padding == "valid" else padding
        stride = _pair(argument(call, 3, "stride", 1))
        return cls(_pair(tuple(kernel)), stride, _pair(padding), dilation, _pair(tuple(given[2:])))

    @classmethod
    def of_pool(cls, call: Call, given: Size) -> Windows:
        """Those of a ``max_pool2d`` or ``avg_pool2d`` over an operand of shape ``given``."""
        kernel = _pair(argument(call, 1, "kernel_size", None))
        stride = _pair(argument(call, 2, "stride", None) or kernel)
        dilation = argument(call, 4, "dilation", 1) if call.name == "max_pool2d" else 1
        return cls(kernel, stride, _pair(argument(call, 3, "padding", 0)), _pair(dilation), _pair(tuple(given[2:])))

    @property
    def are_apart(self) -> bool:
        """Whether no position lies in two of them."""
        return all(
            k == 1 or (k <= s and d == 1) for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    def __call__(self, where: Tensor) -> Where:
        """Which positions (B, K, H, W) lie in a window whose result is True, of results (B, K, h, w)."""
        for axis in range(2):
            where = self._along(axis, where)
        return everywhere_as_none(where.contiguous())

    def weighted(self, where: Tensor, nonzero: Tensor) -> Where:
        """As a call, where windows read only places whose weight is not zero.

        Args:
            where: (B or 1, K or 1, h, w).
            nonzero: (K, height, width) of the kernel.
        """
        (height, width), (sh, sw), (dh, dw) = where.shape[2:], self.stride, self.dilation
        out = where.new_zeros(len(where), len(nonzero), self._length(0, height), self._length(1, width))
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                rows = slice(i * dh, i * dh + (height - 1) * sh + 1, sh)
                columns = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
                out[:, :, rows, columns] |= where & nonzero[:, i, j, None, None]
        return everywhere_as_none(self._without_padding(out))

    def through_weights(self, where: Tensor, nonzero: Tensor, groups: int) -> Where:
        """As a call, where each weight (outputs, K / groups, height, width) of a convolution is zero or not."""
        options = {"stride": self.stride, "dilation": self.dilation, "groups": groups}
        counts = F.conv_transpose2d(where.float(), nonzero.float(), **options)  # of ways that do not meet a zero
        bottom, right = (self._length(axis, where.shape[axis + 2]) - counts.shape[axis + 2] for axis in range(2))
        return everywhere_as_none(self._without_padding(F.pad(counts > 0.5, (0, right, 0, bottom))))

    def _without_padding(self, where: Tensor) -> Tensor:
        (top, left), (height, width) = self.padding, self.given
        return where[:, :, top : top + height, left : left + width].contiguous()

    def _along(self, axis: int, where: Tensor) -> Tensor:
        dim, stride, size = axis + 2, self.stride[axis], where.shape[axis + 2]
        if self.kernel[axis] == stride == 1 and not self.padding[axis]:
            return where
        shape = list(where.shape)
        shape[dim] = self._length(axis, size)
        out = where.new_zeros(shape)
        for tap in range(self.kernel[axis]):
            start = tap * self.dilation[axis]
            out.narrow(dim, start, (size - 1) * stride + 1)[(slice(None),) * dim + (slice(None, None, stride),)] |= (
                where
            )
        return out.narrow(dim, self.padding[axis], self.given[axis])

    def _length(self, axis: int, results: int) -> int:
        """Of the positions with their padding, and beyond where windows do not reach the end."""
        windowed = (results - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1
        return max(windowed, self.padding[axis] + self.given[axis])


def _pair(value: object) -> Pair:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Sequence) and len(value) in (1, 2) and all(isinstance(item, int) for item in value):
        return value[0], value[-1]
    raise UnreadableError
