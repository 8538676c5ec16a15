"""What a call must leave as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def surroundings(net: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything that a call could leave changed, in a form that compares by ``==``."""
    found: dict[str, Any] = {
        "random numbers": torch.get_rng_state().tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "modes": torch._C._len_torch_function_stack(),
        "dtype": torch.get_default_dtype(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "x": (x.requires_grad, x.grad is None, x._version, x.sum().item()),
    }
    for name, module in net.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if "hook" in key and hasattr(value, "keys")}
        found[f"module {name}"] = (module.training, hooks, sorted(vars(module)), id(module.forward.__func__))
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.flatten().tolist()
        found[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor._version, tensor.flatten().tolist(), grad)
    return found
