"""A fault of torch's batch norm with one image, seen from 2.6 to 2.14 on CPUs, and the way round it.

In eval mode its backward pass is wrong where the gradient that comes in is that of a single image, in another memory
order than the result, and has come through a view, which makes up the stride of a dimension of length 1. It is right
for a gradient that lies in memory as the result does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["RightGradients", "with_right_gradient"]


class RightGradients(TorchFunctionMode):
    """Within it, every batch norm of one image has the right gradient."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "batch_norm":
            with_right_gradient(result)
        return result


def with_right_gradient(result: object) -> None:
    """Has the gradient of a batch norm's result (B, C, ...) laid out as that is, where it is of one image."""
    if isinstance(result, Tensor) and result.requires_grad and len(result) == 1:
        result.register_hook(partial(_with_strides, result.stride()))  # type: ignore[no-untyped-call]


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    laid_out = torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device)
    return laid_out.copy_(gradient)
