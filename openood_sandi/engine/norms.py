"""Which modules are normalisation layers, and how many channels they have."""

from __future__ import annotations

import re

from torch import Tensor, nn

from openood_sandi.engine.passes import Layer

__all__ = ["channels_of", "is_normalisation"]

_CHANNELS_SECOND: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # batch, instance, group
_NAMED = re.compile(r"Norm(?![a-z])")


def is_normalisation(layer: Layer) -> bool:
    """Whether the module is a normalisation layer of the forward pass: it returns a tensor of the shape it is given.

    Torch's own classes and what derives from them, and others that are named so (FrozenBatchNorm2d, RMSNorm) and have
    no parameters but vectors, of their own. What normalises weights (``parametrizations.spectral_norm``) is none.
    """
    given, output, module = layer.given, layer.output, layer.module
    if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.shape != output.shape:
        return False
    if "parametrizations" in layer.name.split("."):
        return False
    if isinstance(module, (*_CHANNELS_SECOND, nn.LayerNorm, nn.RMSNorm)):
        return True
    owned = list(module.parameters(recurse=False))
    vectors = all(_is_vector(parameter) for parameter in owned)
    return bool(_NAMED.search(type(module).__name__)) and vectors and len(owned) == len(list(module.parameters()))


def normalises_second(module: nn.Module) -> bool:
    """Whether the layer's channels are dimension 1, whatever the other dimensions are."""
    return isinstance(module, _CHANNELS_SECOND)


def channels_of(module: nn.Module) -> int | None:
    """How many channels a normalisation layer has; None where nothing it holds tells."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):  # a kernel that is a vector counts positions
        return None
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    lengths = {tensor.numel() for tensor in held if _is_vector(tensor) and tensor.numel() > 1}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        lengths = {module.normalized_shape[0]}
    return lengths.pop() if len(lengths) == 1 else None


def _is_vector(tensor: Tensor) -> bool:
    return sum(length > 1 for length in tensor.shape) <= 1
