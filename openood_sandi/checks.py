"""What :class:`openood_sandi.SandI` asks of its options, network and images, and what it says where they differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from openood_sandi.errors import ReplayError

_CHOICES = {
    "variant": ("auto", "Z", "A"),
    "combine": ("count", "union", "intersection"),
    "attribution": ("max_logit", "cross_entropy"),
    "ascent": ("cross_entropy", "max_logit"),
    "top_over": ("channels", "labels"),
}


def require_choice(**options: str) -> None:
    for option, value in options.items():
        if value not in _CHOICES[option]:
            raise ValueError(f"{option}={value!r}: expected one of {', '.join(map(repr, _CHOICES[option]))}")


def require_count(**options: int) -> None:
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{option}={value!r}: expected a whole number, at least 1")


def require_positive(**options: float) -> None:
    for option, value in options.items():
        if not _is_number(value) or not value > 0 or (math.isinf(value) and option != "epsilon"):
            raise ValueError(f"{option}={value!r}: expected a positive number")


def require_share(**options: float) -> None:
    for option, value in options.items():
        if not _is_number(value) or not 0 < value <= 1:
            raise ValueError(f"{option}={value!r}: expected a share, above 0 and at most 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def eager_network(net: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is {type(net).__name__}, expected an eager torch.nn.Module")
    while True:
        compiled = getattr(net, "_orig_mod", None)  # torch.compile's wrapper
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        elif isinstance(compiled, nn.Module):
            net = compiled
        else:
            break
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError("net is a TorchScript module, whose layers cannot be split; pass the eager network behind it")
    return net


def require_images(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, expected a tensor of images (B, C, H, W)")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x is {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}, expected floating-point images "
            "(B, C, H, W), normalised as the network was trained"
        )
    if len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: the batch is empty")


def require_eval(net: nn.Module) -> None:
    changing = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    training = [name for name, module in net.named_modules() if module.training and isinstance(module, changing)]
    if training:
        raise ValueError(f"the network is in train mode (layer {training[0]!r}); call net.eval() first")


def require_logits(output: object) -> None:
    if not isinstance(output, Tensor) or output.dim() != 2 or not output.is_floating_point():
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ReplayError(f"the network returns {what}, expected logits (B, classes); wrap it so that it returns those")


def require_same(plain: Tensor, recorded: Tensor) -> None:
    """The recorded forward must be the network's own: that finds randomness and writes through views."""
    tolerance = 1e3 * torch.finfo(plain.dtype).eps
    scale = float(plain.nan_to_num(0.0, 0.0, 0.0).abs().max())
    if not torch.allclose(plain, recorded, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
        raise ReplayError(
            "two passes over the same images differ: the network is random in eval mode (dropout that stays active, "
            "sampling), or writes into a slice of a tensor that it uses again; make its forward deterministic "
            "and out of place there"
        )
