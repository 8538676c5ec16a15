"""Checkpoints that do not fit the network OpenOOD reads them into.

OpenOOD reads them with ``strict=False`` and drops what torch says of the keys; where shapes differ it leaves the last
layer out. Such a network has random weights, and its scores mean nothing. Here the keys are looked at: there is a
warning, and this package's postprocessors refuse the network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from openood_sandi.plugin.warning import warn

__all__ = ["require_whole", "watched"]

#: What is wrong with networks that were not read in full.
_misfits: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def watched(get_network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """OpenOOD's ``get_network``, with a warning where a checkpoint leaves some of the network as it was made."""

    @functools.wraps(get_network)
    def get_watched_network(config: Any) -> Any:
        # a network made without pretrained weights need not name a file
        checkpoint = getattr(config, "checkpoint", None)
        with _misfits_noted(f"the checkpoint {checkpoint!r} does not fit the network {config.name!r}"):
            return get_network(config)

    return get_watched_network


@contextmanager
def _misfits_noted(what: str) -> Iterator[None]:
    own = nn.Module.load_state_dict

    @functools.wraps(own)
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keys = own(self, *args, **kwargs)
        # counts of training batches, which no score depends on and old checkpoints lack
        missing = [key for key in keys.missing_keys if not key.endswith("num_batches_tracked")]
        if missing:
            _misfits[self] = f"{what}: it has no {_some(missing)}" + (
                f", but {_some(keys.unexpected_keys)}" if keys.unexpected_keys else ""
            )
            warn(f"{_misfits[self]}. What is missing has random weights", stacklevel=3)
        return keys

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.load_state_dict = own  # type: ignore[method-assign]


def _some(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def require_whole(net: nn.Module) -> None:
    """Raises ValueError for a network that OpenOOD read from a checkpoint that lacks some of its weights."""
    if net in _misfits:
        raise ValueError(
            f"{_misfits[net]}. Scores of random weights mean nothing: name the network that the file was saved from, "
            "with its number of classes, or another file in network.checkpoint"
        )
