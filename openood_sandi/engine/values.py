"""Python data that a network takes from a perturbed tensor: right only if every perturbed copy gives the recorded one.

What tells of a tensor's form is the same for all copies. Anything else may depend on their values, by whatever name it
is called, and with it the way that the network goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from openood_sandi.engine import lanes
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import is_out_of_memory

__all__ = ["require_recorded", "tells_of_form"]

_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "names", "requires_grad", "is_leaf"),
    *("retains_grad", "grad_fn", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_xla", "is_xpu", "is_ipu", "is_mtia"),
    *("is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_nested", "is_vulkan", "is_maia", "is_ort"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
    *("__len__", "type", "has_names", "dim_order", "is_contiguous", "is_floating_point", "is_complex", "is_signed"),
    *("is_tensor", "is_same_size", "is_inference", "is_conj", "is_neg", "is_pinned", "is_shared", "is_coalesced"),
    *("can_cast", "result_type", "promote_types", "dense_dim", "sparse_dim", "_is_view", "_nested_tensor_size"),
)
_OF_FORM = frozenset((*(f"{name}.__get__" for name in _ATTRIBUTES), *_METHODS))


def tells_of_form(name: str) -> bool:
    """Whether the call of this name asks for what all copies of a tensor have in common: shape, dtype, device."""
    return name in _OF_FORM


def require_recorded(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], recorded: Any
) -> None:
    """Raises ReplayError unless ``func`` gives ``recorded``, which holds no tensor, for every lane of its arguments."""
    try:
        for lane_args, lane_kwargs in lanes.one_by_one((args, kwargs)):
            if not _same(func(*lane_args, **lane_kwargs), recorded):
                raise ReplayError("it differs from one perturbed copy to the next")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ReplayError(
            f"the network turns a perturbed tensor into Python data ({name}): {error}; "
            f"keep it a tensor in the network's forward, or choose split points behind that place"
        ) from error


def _same(found: Any, recorded: Any) -> bool:
    if type(found) is not type(recorded):
        return False
    if isinstance(recorded, (list, tuple)):
        return len(found) == len(recorded) and all(map(_same, found, recorded))
    if isinstance(recorded, float) and math.isnan(recorded):
        return math.isnan(found)
    equal = found == recorded
    return bool(equal.all() if hasattr(equal, "all") else equal)
