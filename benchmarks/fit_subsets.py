"""How much S&I-C depends on which training images it is fitted to, and on its gate.

    python benchmarks/fit_subsets.py "--data cifar10 --data-root data --network resnet20" --out OUT

Fits it to seeded subsets of the training images, of so many a class, and to all of them; means and deviations always
come from the same validation images. Fitted to all, it is scored with other gates than the default, too, from which
nothing is chosen. Every image passes the network once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from comparison.cases import Study
from comparison.console import positive
from comparison.metrics import detection
from comparison.suite import Suite
from comparison.summaries import FromSummaries, rows
from torch import Tensor

from openood_sandi.detectors.sandi.calibrated_summary import Summary

TEXT = """\
AUROC in %, near and far: means over the sets of the group; "ID lost": % of the ID test images above the threshold that
keeps 95 % of the validation images. Mean and standard deviation are over subsets of the training images, drawn by
seed; the network, the validation images and the test images stay the same. Energy and max logit are of the same
passes, and need no training images."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    study = Study("benchmarks/fit_subsets.py", __doc__)
    study.parser.add_argument("--per-class", type=positive, nargs="+", default=[20, 50], metavar="N")
    study.parser.add_argument("--subsets", type=positive, default=5, help="of each size; default: %(default)s")
    study.parser.add_argument("--gates", type=float, nargs="*", default=[1.0, 2.0, 2.5, 3.0], metavar="Q")
    options = study.start(sys.argv[1:] if arguments is None else arguments)
    found = []
    for name, suite in study.suites():
        for row in _studied(suite, options.per_class, options.subsets, options.gates, options.batch_size):
            found.append({"network": name, **row})
    every = pd.DataFrame(found)
    study.write("S&I-C on subsets of the training images", TEXT, {"summary": _summary(every), "every fit": every})
    return 0


def subset(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Places (M,) of ``per_class`` images of each class among ``labels`` (N,), or of all of a class with fewer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:per_class] for label in range(int(labels.max()) + 1)])


def _studied(
    suite: Suite, sizes: Sequence[int], subsets: int, gates: Sequence[float], batch_size: int
) -> list[dict[str, object]]:
    assert suite.training is not None and suite.validation is not None, "expected training and validation images"
    first = next(iter(suite.in_distribution.loader(1)))[0]
    detector = FromSummaries(suite.network, first)
    train, labels = detector.read(suite.training.to_fit_on(batch_size), "training")
    held, _ = detector.read(suite.validation[0].to_fit_on(batch_size), "validation")
    tests = {images.name: detector.read(images.loader(batch_size), images.name)[0] for images in suite.test_sets}
    usual, every = detector.gate, torch.arange(len(labels))
    fits: list[tuple[str, int | None, Tensor, float]] = [("all", None, every, usual)]
    fits += [(f"all, gate {gate}", None, every, gate) for gate in gates]
    fits += [(f"{size} a class", seed, subset(labels, size, seed), usual) for size in sizes for seed in range(subsets)]
    known = {"energy": "energy", "max logit": "max_logit"}
    found: list[dict[str, object]] = []
    for title, part in known.items():
        values = {name: getattr(each, part).numpy() for name, each in {**tests, "": held}.items()}
        found.append({"fitted to": f"{title}", "images": 0, "seed": None, **_row(suite, values)})
    for title, seed, chosen, detector.gate in fits:
        detector.fit_to(rows(train, chosen), labels[chosen], held)
        values = {name: detector.scores(each) for name, each in _and_held(tests, held).items()}
        found.append({"fitted to": title, "images": len(chosen), "seed": seed, **_row(suite, values)})
    return found


def _and_held(tests: Mapping[str, Summary], held: Summary) -> dict[str, Summary]:
    return {**tests, "": held}


def _row(suite: Suite, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of scores by set, "" for the validation images'."""
    known = scores[suite.in_distribution.name]
    auroc = {one.name: 100 * detection(known, scores[one.name]).auroc for one in suite.out_of_distribution}
    groups = {
        group: float(np.mean([auroc[one.name] for one in suite.out_of_distribution if one.group == group]))
        for group in ("near", "far")
        if any(one.group == group for one in suite.out_of_distribution)
    }
    threshold = np.quantile(scores[""], 0.95, method="inverted_cdf")
    return {**groups, **auroc, "ID lost": float(100 * np.mean(known > threshold))}


def _summary(every: pd.DataFrame) -> pd.DataFrame:
    """Means and, of several fits, standard deviations as text."""
    values = [name for name in every if name in ("near", "far", "ID lost")]
    grouped = every.groupby(["network", "fitted to", "images"], sort=False)[values]
    mean, deviation = grouped.mean(), grouped.std(ddof=1)
    text = mean.map("{:.2f}".format)
    several = deviation.notna()
    return text.where(~several, text + " ± " + deviation.map("{:.2f}".format)).reset_index()


if __name__ == "__main__":
    sys.exit(main())
