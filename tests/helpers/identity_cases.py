"""A network that leans on all that Python offers, and what can be changed of it, for tests of the digests.

Run as a script with the name of a change it prints the digests: ``python identity_cases.py FOLDER [CHANGE]``; the
folder has the modules that :func:`write_modules` has written.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORK = """
import torch
from torch import nn
import identity_helper
from identity_helper import clip

SCALE = 2.0
NAMES = {"alpha", "beta", "gamma", "delta"}

class Net(nn.Module):
    power = 2

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(12)
        self.act, self.other = (lambda x: x.relu()), (lambda x: x.tanh())

    def forward(self, x):
        if "alpha" in {"alpha", "omega", "psi"} and NAMES:
            x = x * SCALE
        return self.head(self.act(self.norm(clip(x.flatten(1)) ** self.power)))

def transform(image):
    import identity_late
    return identity_late.shift(image)

def collate(items):
    return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
"""
HELPER = "import torch\nLIMIT = 3.0\ndef clip(x):\n    return x.clamp(-LIMIT, LIMIT)\n"
LATE = "def shift(image):\n    return image + 1\n"


def write_modules(folder: Path, network: str = NETWORK, helper: str = HELPER, late: str = LATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("identity_net", network), ("identity_helper", helper), ("identity_late", late)):
        (folder / f"{name}.py").write_text(text)
    return folder


def made() -> tuple[Any, Any]:
    """(the module, the network of seed 0)"""
    import torch

    module = importlib.import_module("identity_net")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return module, module.Net().eval()


def _weight(module: Any, net: Any) -> None:
    import torch

    with torch.no_grad():
        net.head.weight[0, 0] += 1e-3


def _hook(kind: str) -> Callable[[Any, Any], None]:
    return lambda module, net: getattr(net.norm, f"register_{kind}")(lambda *args: None) and None


def _global_hook(kind: str) -> Callable[[Any, Any], None]:
    def change(module: Any, net: Any) -> None:
        from torch.nn.modules import module as of_all

        getattr(of_all, f"register_module_{kind}")(lambda *args: None)

    return change


def _forward(module: Any, net: Any) -> None:
    forward = type(net).forward
    type(net).forward = functools.wraps(forward)(lambda self, x: forward(self, x) * 2)


def _library_method(module: Any, net: Any) -> None:
    forward = type(net.norm).forward
    type(net.norm).forward = functools.wraps(forward)(lambda self, x: forward(self, x) * 2)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "weight": _weight,
    "another lambda of the same line": lambda module, net: setattr(net, "act", net.other),
    "forward of the class": _forward,
    "forward of the instance": lambda module, net: setattr(net, "forward", lambda x: x),
    "method of a library's class": _library_method,
    "class attribute": lambda module, net: setattr(type(net), "power", 3),
    "module global": lambda module, net: setattr(module, "SCALE", 3.0),
    "set in a module global": lambda module, net: module.NAMES.add("epsilon"),
    "global of the helper": lambda module, net: setattr(module.identity_helper, "LIMIT", 4.0),
    "function of the helper": lambda module, net: setattr(module, "clip", lambda x: x),
    "tied weights' hook": lambda module, net: net.head.weight.register_hook(lambda grad: grad * 2),
    **{f"{kind} hook": _hook(f"{kind}_hook") for kind in ("forward", "forward_pre", "full_backward")},
    "backward pre hook": _hook("full_backward_pre_hook"),
    **{f"global {kind}": _global_hook(kind) for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook")},
    "mode": lambda module, net: net.train(),
}


def digests(change: str = "") -> str:
    """Of network and functions, in one line."""
    from openood_sandi.runs import keys

    module, net = made()
    if change:
        CHANGES[change](module, net)
    return f"{keys.network(net)} {keys.state({'transform': module.transform, 'collate': module.collate})}"


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    if "--other-order" in sys.argv:
        import identity_late  # type: ignore[import-not-found]  # noqa: F401
        import torchvision  # noqa: F401
    print(digests())
