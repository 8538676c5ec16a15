"""What S&I-C costs: fitting it beside plain passes over the same images, and scoring one image.

    python benchmarks/fit_cost.py "--data cifar10 --data-root data --network resnet20" --limit 200 --out OUT

Both take turns, on one thread, and what is told is processor time, so that it matters less what else the machine does.
A fit takes the same time for each image however many there are: it keeps sums.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from comparison import cost
from comparison.cases import Study
from comparison.console import positive
from comparison.suite import Suite
from torch import Tensor, nn

from openood_sandi import SandIC

TEXT = """\
Processor time over that of a plain pass of the network without gradients over the same images in the same batches,
from memory: median, lower and upper quartile over turns. "fit": `SandIC(net).fit(images)` with and without labels, with
the search for the network's activations and a tenth of the images kept out. "score": one batch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    study = Study("benchmarks/fit_cost.py", __doc__)
    study.parser.add_argument("--images", type=positive, default=2000, help="to fit to; default: %(default)s")
    study.parser.add_argument("--turns", type=positive, default=5, help="default: %(default)s")
    options = study.start(sys.argv[1:] if arguments is None else arguments)
    rows = [
        {"network": name, **row}
        for name, suite in study.suites()
        for row in _timed(suite, options.images, options.batch_size, options.turns)
    ]
    study.write("What S&I-C costs", TEXT, {"time": pd.DataFrame(rows)})
    return 0


def _timed(suite: Suite, fitted_to: int, batch_size: int, turns: int) -> list[dict[str, object]]:
    assert suite.training is not None, "expected training images"
    batches = list(suite.training.limited(fitted_to).to_fit_on(batch_size))
    images, net = torch.cat([x for x, _ in batches]), suite.network
    torch.set_num_threads(1)
    found: list[dict[str, object]] = []
    for title, given in (("labels", batches), ("no labels", [x for x, _ in batches])):
        detector = SandIC(net)
        fit, plain = functools.partial(_fit, detector, given), _Plain(net, batch_size)
        taken = cost.measure(plain, fit, images, turns=turns, clock=time.process_time)
        found.append({"what": f"fit, {title}", "images": len(images), **_row(taken)})
        for count in (1, batch_size):
            taken = cost.measure(net, detector, images[:count], clock=time.process_time)
            found.append({"what": f"score, {title}", "images": count, **_row(taken)})
    return found


def _fit(detector: SandIC, given: list[Any], _: Tensor) -> None:
    detector.fit(given)


class _Plain(nn.Module):
    """The network over many images, in batches."""

    def __init__(self, net: nn.Module, batch_size: int) -> None:
        super().__init__()
        self._net, self._batch_size = net, batch_size

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self._net(batch) for batch in torch.split(x, self._batch_size)]


def _row(found: cost.Cost) -> dict[str, float]:
    lower, median, upper = found.forwards
    return {"forwards": median, "lower": lower, "upper": upper}


if __name__ == "__main__":
    sys.exit(main())
