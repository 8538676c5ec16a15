"""Weights from files: state dicts of torch, safetensors or NumPy. No pickled code is ever run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["SourceError", "State", "classes", "load", "misfits", "read", "renamed"]

NESTED = ("state_dict", "model_state_dict", "model", "net", "network")
"""Keys under which training scripts put the state dict."""
SHOWN = 3  # keys of each kind in an error

State = dict[str, Tensor]


class SourceError(ValueError):
    """The data, network or weights asked for cannot be had; the message says what to do."""


def read(path: Path) -> State:
    """The state dict in a file, by what its name ends with: ``.safetensors``, ``.npz``, or else torch's own format.

    One nested under a usual key is taken out, and the prefix "module." of data-parallel training taken off. Raises
    SourceError where the file cannot be read, or holds something else.
    """
    try:
        content = _content(path)
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist; --checkpoint takes a file of weights.") from error
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path} is no checkpoint, or holds code besides weights; save the network's state_dict() alone."
        ) from error
    except Exception as error:  # a damaged file may fail in any way
        line = (str(error) or type(error).__name__).partition("\n")[0]
        raise SourceError(f"{path} cannot be read as a checkpoint: {line}.") from error
    while isinstance(content, Mapping):
        inner = [content[key] for key in NESTED if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = f"{list(content)[:SHOWN]} ..." if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise SourceError(f"{path} holds no state dict, names to tensors, but {found}.")
    state: State = dict(content)
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return torch.load(path, map_location="cpu", weights_only=True)


def classes(net: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """How many classes ``state`` has: the rows of what is the last matrix or kernel in ``net``. None if it has none."""
    head = [name for name, tensor in net.state_dict().items() if tensor.dim() > 1][-1]
    weight = renamed(net, state).get(head)
    return None if weight is None or weight.dim() < 2 else weight.shape[0]


def misfits(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``state`` from being that of ``net``, one line for each kind: missing, unexpected, mis-shaped."""
    own = net.state_dict()
    reshaped = [name for name in own if name in state and state[name].shape != own[name].shape]
    found = {
        # Older files have no counts of batches, which nothing uses in eval mode.
        "missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}" for n in reshaped],
    }
    return [f"{kind}: {_some(names)}" for kind, names in found.items() if names]


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def load(
    net: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    others: Callable[[], Iterable[tuple[str, nn.Module]]] = tuple,
) -> None:
    """Put ``state``, of the file ``path``, into ``net``; half precision becomes the network's.

    Raises SourceError where it does not fit, naming those of ``others`` that it does fit.
    """
    state = renamed(net, state)
    wrong = misfits(net, state)
    if wrong:
        fitting = [name for name, other in others() if not misfits(other, renamed(other, state))]
        hint = f" They are those of {' or '.join(fitting)}." if fitting else ""
        raise SourceError(f"The weights in {path} do not fit the network.{hint}\n  " + "\n  ".join(wrong))
    net.load_state_dict(state, strict=False)  # strict but for the counts of batches


def renamed(net: nn.Module, state: Mapping[str, Tensor]) -> State:
    """``state`` with its last layer "linear", as some CIFAR networks call it, named "fc" if ``net`` calls it so."""
    own = net.state_dict()
    if "fc.weight" in own and "fc.weight" not in state:
        return {f"fc.{name[7:]}" if name.startswith("linear.") else name: tensor for name, tensor in state.items()}
    return dict(state)
