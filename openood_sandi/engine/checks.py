"""What is asked of networks and images, and what is said where they differ."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import is_out_of_memory
from openood_sandi.engine.threads import in_this_thread
from openood_sandi.engine.wrappers import unwrapped

_log = logging.getLogger(__name__)

# Normalised images lie within a few units of zero, images in 0..255 do not.
_UNLIKELY = 32


def eager_network(net: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is {_kind(net)}, expected an eager torch.nn.Module")
    net = unwrapped(net)
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError("net is a TorchScript module, whose layers cannot be split; pass the eager network behind it")
    for name, module in net.named_modules():
        kind = type(module)
        if ".nn.quantized." in kind.__module__ or ".nn.intrinsic.quantized." in kind.__module__:
            raise TypeError(
                f"net is quantised (layer {name!r} is {kind.__module__}.{kind.__name__}), and quantised layers have no "
                "gradients; pass the floating-point network that it was made from"
            )
    return net


def called_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``net`` by name that Python calls, so that hooks can be set: TorchScript's are none."""
    return (named for named in net.named_modules() if not isinstance(named[1], torch.jit.ScriptModule))


def require_images(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {_kind(x)}, expected a tensor of images (B, C, H, W)")
    if x.dim() != 4 or not x.is_floating_point() or x.layout != torch.strided:
        raise ValueError(
            f"x is {_describe(x)}, expected a dense floating-point tensor of images (B, C, H, W), normalised as those "
            "that the network was trained on"
        )
    if len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: the batch is empty")


def require_eval(net: nn.Module) -> None:
    training = [name for name, module in net.named_modules() if module.training and _differs_in_training(module)]
    if training:
        raise ValueError(f"the network is in train mode (layer {training[0]!r}); call net.eval() first")


def _differs_in_training(module: nn.Module) -> bool:
    """Whether its forward pass depends on its mode: batch norms, dropout, stochastic depth by any name."""
    name = type(module).__name__
    named_so = "Drop" in name or name == "StochasticDepth"
    return named_so or isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd))


def require_accepted(net: nn.Module, x: Tensor) -> None:
    """Raises if the network, left to itself, fails on the first of the images, with what its failing layer expects."""
    entered: list[str] = []
    try:
        with torch.no_grad(), _hooks(net, lambda name, _: entered.append(name), lambda *_: entered.pop()):
            net(x[:1])
    except Exception as error:
        if is_out_of_memory(error):
            return
        layer = net.get_submodule(entered[-1]) if entered else net
        weight = next(layer.parameters(recurse=False), None)
        expected = "" if weight is None else f", whose weight is {_describe(weight)}"
        raise ValueError(
            f"the network does not take x, {_describe(x)}: {str(error) or type(error).__name__}. It failed in "
            f"{_label(net, entered[-1] if entered else '')}{expected}. Expected images (B, C, H, W) of the size, "
            "channels, dtype and device that the network takes"
        ) from error


def warn_of_range(x: Tensor) -> None:
    """Images in 0..255 are scored like any others, and wrongly so if the network was trained on normalised ones."""
    largest = float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())
    if largest > _UNLIKELY:
        _log.warning(
            "the images reach %.4g; normalised ones stay within about 3. If these are pixels in 0..255, scale and "
            "normalise them as those that the network was trained on",
            largest,
        )


def not_finite(net: nn.Module, x: Tensor) -> list[str]:
    """For each of the images ``x`` (B, C, H, W) whose logits are not finite, where NaN or infinity comes from."""
    found: list[str] = []
    for number, image in enumerate(torch.split(x.detach(), 1)):
        first: list[str] = []

        def note(name: str, output: object, first: list[str] = first) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                first.append(name)

        wrong = int(image.numel() - image.isfinite().sum())
        with torch.no_grad(), _hooks(net, lambda *_: None, note):
            logits = net(image)
        if logits.isfinite().all():
            continue
        if wrong:
            found.append(f"image {number} of the batch holds {wrong} value(s) that are NaN or infinite")
        else:
            found.append(
                f"image {number} of the batch is finite, but the output of {_label(net, first[0])} is NaN or infinite"
            )
    return found


@contextmanager
def _hooks(
    net: nn.Module, enter: Callable[[str, object], object], leave: Callable[[str, object], object]
) -> Iterator[None]:
    """Calls ``enter(name, arguments)`` and ``leave(name, output)`` at every module of this thread's passes inside."""
    handles = []
    try:
        for name, module in called_modules(net):
            entering = in_this_thread(lambda _, args, name=name: _void(enter(name, args)))
            leaving = in_this_thread(lambda _, args, out, name=name: _void(leave(name, out)))
            handles += [module.register_forward_pre_hook(entering), module.register_forward_hook(leaving)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _void(_: object) -> None:
    """Nothing, which as a hook's result changes nothing."""


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _label(net: nn.Module, name: str) -> str:
    kind = type(net.get_submodule(name)).__name__
    return f"layer {name!r} ({kind})" if name else f"the network itself ({kind})"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)} on {tensor.device}"


def require_logits(output: object) -> None:
    if not isinstance(output, Tensor) or output.dim() != 2 or not output.is_floating_point():
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ReplayError(
            f"the network returns {what}, expected logits (B, classes); wrap it so that it returns those, or say by "
            "logits=FUNCTION how they are taken out of what it returns"
        )
    if output.shape[1] < 2:
        raise ValueError(
            "the network returns one logit for each image, expected logits of two classes or more: with one class "
            "there is no cross-entropy to ascend; wrap a binary classifier so that it returns a logit for each class"
        )


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
