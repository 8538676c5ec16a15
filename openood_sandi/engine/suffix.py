"""The rest of a network after one of its modules, to first order: f(F + d) ~ f(F) + (df/dF) d, in one forward pass.

The module's output is cut off from what led to it and handed on as the variable F, so everything up to it costs no
memory. A backward pass is linear in the weights u that it gives to the logits, u df/dF, and its own derivative by u
along d is (df/dF) d: the directional derivative, by the suffix's operations alone, without a second forward pass.
"""

from __future__ import annotations

import difflib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from openood_sandi.engine import checks
from openood_sandi.engine.threads import in_this_thread

__all__ = ["Sensitivity", "sensitivity"]

_kernel_of_attention = threading.Lock()
"""That choice is the whole process's: threads that make it at once would leave each other's behind."""


@dataclass(frozen=True)
class Sensitivity:
    """How the logits of a batch depend on the output F of one of the network's modules."""

    feature: Tensor
    """F, (B, ...)."""
    logits: Tensor
    """f(F), (B, C)."""
    gradient: Tensor
    """The derivative of the predicted class's logit by F, (B, ...)."""
    _weights: Tensor  # u above, of which gradient is a linear function
    _backward: Tensor  # gradient, with its graph

    def logits_moved(self, direction: Tensor) -> Tensor:
        """The logits (B, C) at F + ``direction`` (B, ...), to first order."""
        with torch.inference_mode(False):
            (change,) = torch.autograd.grad(
                self._backward, self._weights, direction, retain_graph=True, materialize_grads=True
            )
        return self.logits + change


def sensitivity(net: nn.Module, layer: str, x: Tensor) -> Sensitivity:
    """Runs a network on images ``x`` (B, C, H, W) and differentiates it from one of its modules on.

    Args:
        net: a classifier in eval mode; it is left as found.
        layer: the module's name; "name#2" is its second call in a forward pass.
        x: the images, on the network's device.

    Raises:
        ValueError: there is no such module or call, it returns no floating-point tensor (B, ...), or the logits do not
            depend on it in a way that can be differentiated.
    """
    checks.require_images(x)
    net = checks.eager_network(net)
    checks.require_eval(net)
    # the math kernel is the attention that can be differentiated twice
    with torch.inference_mode(False), _kernel_of_attention, sdpa_kernel(SDPBackend.MATH):
        feature, logits = _cut(net, layer, x.clone() if x.is_inference() else x)
        weights = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1).requires_grad_()
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits, feature, weights, create_graph=True, allow_unused=True)
    if gradient is None or not gradient.requires_grad:
        raise ValueError(
            f"layer={layer!r}: the logits have no derivative by its output; name a module before the logits"
        )
    return Sensitivity(feature.detach(), logits.detach(), gradient.detach(), weights, gradient)


def _cut(net: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output of the module, as a variable, and the logits that were computed from it."""
    name, _, number = layer.partition("#") if layer.partition("#")[2].isdecimal() else (layer, "", "1")
    module, wanted = _module(net, name), int(number)
    found: list[Tensor] = []
    calls = 0

    def cut(_: nn.Module, __: object, output: object) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls != wanted:
            return None
        found.append(_variable(layer, output))
        torch.set_grad_enabled(True)  # until no_grad below ends
        return found[0].clone()  # which a layer behind may write into

    handle = module.register_forward_hook(in_this_thread(cut))
    try:
        with torch.no_grad():
            logits = net(x)
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"layer={layer!r}: module {name!r} is called {calls} time(s) in a forward pass")
    checks.require_logits(logits)
    return found[0], logits


def _module(net: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(net.named_modules())
    if name not in modules or not name:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.4) or [*modules][-4:]
        raise ValueError(f"layer={name!r}: the network has no module of that name; did you mean {' or '.join(near)}?")
    return modules[name]


def _variable(layer: str, output: object) -> Tensor:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
        kind = (
            f"a tensor of {output.dtype}, {tuple(output.shape)}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        raise ValueError(
            f"layer={layer!r} returns {kind}, expected one floating-point tensor (B, ...); name a submodule of it that "
            "returns one"
        )
    return output.detach().requires_grad_()
