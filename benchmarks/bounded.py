"""How near the bounds of S&I-Z are to its exact scores, what they prove, and what their middles cost in AUROC.

    python benchmarks/bounded.py "--data cifar10 --data-root data --network resnet20 --checkpoint FILE" \\
        --limit 100 --out OUT

Every image is scored exactly as well, at many times the cost of its bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from comparison.cases import Study
from comparison.console import positive
from comparison.metrics import detection
from comparison.suite import ImageSet, Suite
from torch import nn

from openood_sandi import SandI

TEXT = """\
`SandI(net, variant="Z", steps=T).bounds(x)` beside the exact score tau of the same batches, image by image.

- half-width: the largest, in % of tau.
- at: where tau lies between the bounds, 0 being the lower and 1 the upper one: mean and standard deviation.
- proved: the share of the images whose lower bound is proved, in %; the upper one always is.
- outside: how many images have tau outside their bounds, proved or estimated.
- above: the share of the images whose upper bound exceeds the threshold that 95 % of the ID images' tau do not, in %:
  they take the exact path, unless they are proved to be above.
- straddling: the share of the images whose bounds lie on both sides of it, in %: with `hard=False` only these do.
- AUROC, of tau and of the middle, in %, ID against this set."""


class Ends(NamedTuple):
    """Of a set's images, (N,) each."""

    tau: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    proved: npt.NDArray[np.bool_]

    @property
    def middle(self) -> npt.NDArray[np.float64]:
        return (self.low + self.high) / 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    study = Study("benchmarks/bounded.py", __doc__)
    study.parser.add_argument("--steps", type=positive, nargs="+", default=[2, 5], help="T; default: %(default)s")
    options = study.start(sys.argv[1:] if arguments is None else arguments)
    rows = [
        {"network": name, **row}
        for name, suite in study.suites()
        for steps in options.steps
        for row in _rows(suite, steps, options.batch_size)
    ]
    study.write("How near bounds of S&I-Z are", TEXT, {"bounds": pd.DataFrame(rows)})
    return 0


def _rows(suite: Suite, steps: int, batch_size: int) -> list[dict[str, object]]:
    ends = {images.name: _ends(suite.network, images, steps, batch_size) for images in suite.test_sets}
    known = ends[suite.in_distribution.name]
    threshold = float(np.quantile(known.tau, 0.95, method="inverted_cdf"))
    return [{"set": name, "T": steps, **_row(known, found, threshold)} for name, found in ends.items()]


def _ends(net: nn.Module, images: ImageSet, steps: int, batch_size: int) -> Ends:
    detector = SandI(net, variant="Z", steps=steps)
    parts = []
    for x, _ in images.loader(batch_size):
        bounds = detector.bounds(x)
        parts.append((detector(x)[1], bounds.low, bounds.high, bounds.proved))
    tau, low, high, proved = map(torch.cat, zip(*parts, strict=True))
    return Ends(tau.double().numpy(), low.double().numpy(), high.double().numpy(), proved.numpy())


def _row(known: Ends, found: Ends, threshold: float) -> dict[str, object]:
    tau, low, high, proved = found
    width = high - low
    at = (tau - low)[width > 0] / width[width > 0]
    row: dict[str, object] = {
        "images": len(tau),
        "half-width %": 100 * float((width / 2 / tau).max()),
        "at": float(at.mean()) if len(at) else float("nan"),
        "at sd": float(at.std()) if len(at) else float("nan"),
        "proved %": 100 * float(proved.mean()),
        "outside": int(((tau < low) | (tau > high)).sum()),
        "above %": 100 * float((high > threshold).mean()),
        "straddling %": 100 * float(((low <= threshold) & (high > threshold)).mean()),
    }
    if found is not known:
        row["AUROC tau"] = 100 * detection(known.tau, found.tau).auroc
        row["AUROC middle"] = 100 * detection(known.middle, found.middle).auroc
    return row


if __name__ == "__main__":
    sys.exit(main())
