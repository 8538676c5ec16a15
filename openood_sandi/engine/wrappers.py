"""Networks inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``, which are looked through."""

from __future__ import annotations

import logging
import weakref

from torch import nn

__all__ = ["innermost", "is_wrapper", "unwrapped"]

_log = logging.getLogger(__name__)

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_wrapper(thing: object) -> bool:
    """Whether ``thing`` is one of these around a network."""
    return _inside(thing) is not None


def innermost(net: nn.Module) -> nn.Module:
    """The network inside any number of wrappers; the network itself without one."""
    while (inner := _inside(net)) is not None:
        net = inner
    return net


def unwrapped(net: nn.Module) -> nn.Module:
    """:func:`innermost`; the log tells, once a network, that a wrapper for several devices is looked through."""
    inner = innermost(net)
    parallel = next((module for module in net.modules() if isinstance(module, _PARALLEL)), None)
    if parallel is not None and inner not in _told:
        _told.add(inner)
        _log.info(
            "%s is looked through: one device, that of the images, works here. To use several, start the script under "
            "torchrun, whose processes share a data set (docs/long_runs.md)",
            type(parallel).__name__,
        )
    return inner


def _inside(thing: object) -> nn.Module | None:
    if not isinstance(thing, nn.Module):
        return None
    # torch.compile's wrapper keeps the network under a name of its own
    inner = getattr(thing, "module" if isinstance(thing, _PARALLEL) else "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None
