"""A fault of torch's batch norm with one image, seen to 2.14 on CPUs, and the way round it.

In eval mode its backward pass is wrong where the gradient that comes in is that of a single image, in channels-last
order, and has come through a view, which makes up the stride of a dimension of length 1. It is right for a gradient
that lies in memory as dimensions are counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["with_right_gradient"]


def with_right_gradient(result: object) -> None:
    """Has the gradient of a batch norm's result (B, C, ...) laid out anew where that is of one image."""
    if isinstance(result, Tensor) and result.requires_grad and len(result) == 1:
        result.register_hook(_contiguous)  # type: ignore[no-untyped-call]


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.clone(memory_format=torch.contiguous_format)
