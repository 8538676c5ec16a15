"""How many images S&I-Z reads off rectifiers, network by network.

    python benchmarks/proved_share.py "--data cifar10 --data-root data --network resnet20" \\
        "--data imagenet --data-root data --network torchvision:resnet50 --checkpoint random" --limit 200 --out OUT

The others have every gradient computed, at several times the cost. What is proved depends on a network's form and
width, on its exact zeros among weights, on the step, and on the images: each set of them has a row of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pandas as pd
from comparison.cases import Study
from comparison.console import positive
from comparison.suite import ImageSet
from torch import nn

from openood_sandi import SandI

TEXT = """\
`detector.proved_share` of `SandI(net, variant="Z", steps=T)`, a detector for each set, in %: the share of the images
whose patterns of gradients are read off rectifiers' masks. After batches that prove little some are computed unread,
and count as not proved."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    study = Study("benchmarks/proved_share.py", __doc__)
    study.parser.add_argument("--steps", type=positive, nargs="+", default=[1, 2], help="T; default: %(default)s")
    options = study.start(sys.argv[1:] if arguments is None else arguments)
    rows = [
        {"network": name, "set": images.name, "images": len(images), **_shares(suite.network, images, options)}
        for name, suite in study.suites()
        for images in suite.test_sets
    ]
    study.write("What S&I-Z reads off rectifiers", TEXT, {"proved": pd.DataFrame(rows)})
    return 0


def _shares(net: nn.Module, images: ImageSet, options: argparse.Namespace) -> dict[str, object]:
    found: dict[str, object] = {}
    for steps in options.steps:
        detector = SandI(net, variant="Z", steps=steps)
        for x, _ in images.loader(options.batch_size):
            detector(x)
        found |= {"split points": len(detector.split_names), f"T={steps}": 100 * detector.proved_share}
    return found


if __name__ == "__main__":
    sys.exit(main())
