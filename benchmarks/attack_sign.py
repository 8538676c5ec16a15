"""What the attack of S&I-Z can change, and which way it goes there.

    python benchmarks/attack_sign.py "--data cifar10 --data-root data --network resnet20" --out OUT

Eq. 9 moves every position of a split by eta times the sign of a gradient. S&I-Z, Eq. 11, counts where gradients are not
zero, which at a rectifier is where it is open. A closed position has no gradient, and never moves; an open one, of
value a > 0, can close only where float32's a - eta is not above 0. Those positions are counted here, and of them the
signs: the attack closes a position whose gradient is negative, and leaves it open where it is positive.

One forward and one backward pass an image: the first step of the attack starts at the clean activations.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from comparison.cases import Study
from comparison.console import progress
from comparison.suite import Suite
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openood_sandi.detectors.sandi.activation_shares import activation_input

TEXT = """\
Positions of all rectifiers' inputs, before the last pool. "Can change": open positions that a step of eta down would
close, in % of all; "an image": how many of them an image has on average. Of them, % that the step moves down, which
closes them, up, and not at all. "Per mille of open": those that close, of all open positions: the most that the attack
takes away from a count at T = 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    study = Study("benchmarks/attack_sign.py", __doc__)
    study.parser.add_argument("--eta", type=float, default=1e-3, help="the step; default, the paper's: %(default)s")
    options = study.start(sys.argv[1:] if arguments is None else arguments)
    rows = [
        {"network": name, "eta": options.eta, **row}
        for name, suite in study.suites()
        for row in _counted(suite, options.eta, options.batch_size)
    ]
    study.write("Where the attack can change a gradient's pattern", TEXT, {"positions": pd.DataFrame(rows)})
    return 0


def _counted(suite: Suite, eta: float, batch_size: int) -> list[dict[str, object]]:
    found = []
    for images in suite.test_sets:
        counts: Counter[str] = Counter()
        for x, _ in progress(images.loader(batch_size), images.name, "batches"):
            counts += signs(suite.network, x, eta)
        can = counts["can"]
        found.append(
            {
                "set": images.name,
                "images": len(images),
                "can change": 100 * can / counts["positions"],
                "an image": can / len(images),
                "down": 100 * counts["down"] / can,
                "up": 100 * counts["up"] / can,
                "not at all": 100 * (can - counts["down"] - counts["up"]) / can,
                "per mille of open": 1000 * counts["down"] / counts["open"],
            }
        )
    return found


def signs(net: nn.Module, x: Tensor, eta: float) -> Counter[str]:
    """Counts of positions of images ``x`` (B, C, H, W): in all, open, those that a step can close, their signs."""
    with torch.enable_grad(), _Inputs() as inputs:
        logits = net(x.detach().requires_grad_())
        loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
    gradients = torch.autograd.grad(loss, inputs.seen)
    counts: Counter[str] = Counter()
    for a, gradient in zip(inputs.seen, gradients, strict=True):
        value = a.detach()
        can = (value > 0) & (value - eta <= 0)
        counts += Counter(
            positions=value.numel(),
            open=int((value > 0).sum()),
            can=int(can.sum()),
            down=int((gradient[can] < 0).sum()),
            up=int((gradient[can] > 0).sum()),
        )
    return counts


class _Inputs(TorchFunctionMode):
    """The inputs of the activations on maps, of which none is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = activation_input(func, args, kwargs)
        if given is None:
            return func(*args, **kwargs)
        if given[0].dim() == 4 and given[0].shape[2:] != (1, 1):
            self.seen.append(given[0])
        if func.__name__.rstrip("_") != "relu":
            raise ValueError(f"the network calls {func.__name__}: expected one whose activations are all ReLU")
        return torch.relu(given[0])  # out of place, also where the network says in place


if __name__ == "__main__":
    sys.exit(main())
