"""Settings of torch, for the whole process, that change the bits of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.backends.opt_einsum  # torch does so when einsum is first called, and the setting is not to change by that
from torch.nn.modules import module as of_all_modules

__all__ = ["arithmetic", "global_hooks"]

_torch: Any = torch
_backends = _torch.backends


def _precision(of: Any) -> str:
    """Of products of float32 numbers. None means the full one; ``set_float32_matmul_precision("highest")`` names it."""
    precision: str = of.fp32_precision
    return "ieee" if precision == "none" else precision


_READ: Mapping[str, Callable[[], object]] = {
    "default dtype": lambda: torch.get_default_dtype(),
    "default device": lambda: torch.get_default_device(),
    "float32 matmul precision": lambda: torch.get_float32_matmul_precision(),
    "deterministic algorithms": lambda: torch.are_deterministic_algorithms_enabled(),
    "mkldnn": lambda: _backends.mkldnn.enabled,
    "mkldnn deterministic": lambda: _backends.mkldnn.deterministic,
    "mkldnn TF32": lambda: _backends.mkldnn.allow_tf32,
    "mkldnn precision": lambda: _precision(_backends.mkldnn),
    "mkldnn convolution precision": lambda: _precision(_backends.mkldnn.conv),
    "mkldnn matmul precision": lambda: _precision(_backends.mkldnn.matmul),
    "nnpack": lambda: torch._C._get_nnpack_enabled(),
    "flash attention": lambda: _backends.cuda.flash_sdp_enabled(),
    "memory-efficient attention": lambda: _backends.cuda.mem_efficient_sdp_enabled(),
    "attention by mathematics": lambda: _backends.cuda.math_sdp_enabled(),
    "attention by cuDNN": lambda: _backends.cuda.cudnn_sdp_enabled(),
    "quantised engine": lambda: _backends.quantized.engine,
    "order of einsum": lambda: (_backends.opt_einsum.enabled, _backends.opt_einsum.strategy),
    # there is no function that tells; a denormal number that is doubled does
    "denormal numbers": lambda: bool(torch.tensor(2.0**-1060, dtype=torch.float64) * 2 > 0),
}
_READ_ELSEWHERE: Mapping[str, Callable[[], object]] = {
    "cuDNN": lambda: _backends.cudnn.enabled,
    "cuDNN benchmark": lambda: _backends.cudnn.benchmark,
    "cuDNN deterministic": lambda: _backends.cudnn.deterministic,
    "cuDNN TF32": lambda: _backends.cudnn.allow_tf32,
    "cuDNN convolution precision": lambda: _precision(_backends.cudnn.conv),
    "CUDA matmul TF32": lambda: _backends.cuda.matmul.allow_tf32,
    "CUDA matmul precision": lambda: _precision(_backends.cuda.matmul),
    "CUDA matmul in reduced float16": lambda: _backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    "CUDA matmul in reduced bfloat16": lambda: _backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    "CUDA matmul accumulates float16": lambda: _backends.cuda.matmul.allow_fp16_accumulation,
}
"""What decides nothing on a CPU; OpenOOD, for one, sets some of it when it is imported."""
_HOOKS = (
    *("_global_forward_pre_hooks", "_global_forward_hooks"),
    *("_global_backward_pre_hooks", "_global_backward_hooks"),
)


def arithmetic(device: torch.device) -> dict[str, str]:
    """Every setting that decides something on ``device`` by name, in words."""
    elsewhere = {} if device.type == "cpu" else _READ_ELSEWHERE
    return {name: _in_words(read) for name, read in {**_READ, **elsewhere, **_autocast(device)}.items()}


def global_hooks() -> list[object]:
    """What torch calls at every module of every network, and at every call: hooks, and modes that are entered."""
    hooks = [hook for kind in _HOOKS for hook in getattr(of_all_modules, kind, {}).values()]
    modes = [
        *_torch.overrides._get_current_function_mode_stack(),
        *_torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    ]
    return [*hooks, *(mode for mode in modes if type(mode).__name__ != "DeviceContext")]  # that is told above


def _autocast(device: torch.device) -> dict[str, Callable[[], object]]:
    def enabled() -> bool:
        try:
            return torch.is_autocast_enabled(device.type)
        except TypeError:  # before torch 2.4
            return torch.is_autocast_enabled() if device.type == "cuda" else torch.is_autocast_cpu_enabled()

    def dtype() -> torch.dtype | None:
        if not enabled():
            return None  # it may be anything then
        try:
            return torch.get_autocast_dtype(device.type)
        except AttributeError:  # before torch 2.4
            return torch.get_autocast_gpu_dtype() if device.type == "cuda" else torch.get_autocast_cpu_dtype()

    return {"autocast": enabled, "autocast dtype": dtype}


def _in_words(read: Callable[[], object]) -> str:
    try:
        return str(read())
    except (AttributeError, RuntimeError, AssertionError) as error:  # this torch, or this build, lacks it
        return type(error).__name__
