"""Other people's methods: what they are called, their options, and what they need. One table for all libraries.

Names, options and the values to choose from are those of OpenOOD's ``configs/postprocessors/*.yml``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Need = Literal["head", "blocks", "training", "validation", "OOD validation"]
NEEDS: dict[str, tuple[Need, ...]] = {
    "nothing": (),
    "training images": ("training",),
    **dict.fromkeys(("a linear head", "a linear head by default"), ("head",)),
}
"""Those of this package's detectors, by how they say it."""
"""A linear last layer; stages that can be run one by one; training images; ID and OOD validation images."""


@dataclass(frozen=True)
class Baseline:
    """A published detector as OpenOOD parametrises it."""

    title: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values to choose from on validation data."""
    needs: tuple[Need, ...] = ()


TEMPERATURES, NOISE = [1, 10, 100, 1000], [0.0014, 0.0028]
SHARES = [65, 70, 75, 80, 85, 90, 95]
GAMMAS, TOP = [0.01, 0.1, 0.5, 1, 2, 5, 10], [10, 50, 100, 200, 500, 1000]
TRAINING: tuple[Need, ...] = ("head", "training")

BASELINES = {
    "msp": Baseline("MSP", "Hendrycks and Gimpel, ICLR 2017"),
    "odin": Baseline(
        "ODIN",
        "Liang et al., ICLR 2018",
        {"temperature": 1000, "noise": 0.0014},
        {"temperature": TEMPERATURES, "noise": NOISE},
    ),
    "ebo": Baseline("energy", "Liu et al., NeurIPS 2020", {"temperature": 1}),
    "mls": Baseline("max logit", "Hendrycks et al., ICML 2022"),
    "gradnorm": Baseline("GradNorm", "Huang et al., NeurIPS 2021", needs=("head",)),
    "react": Baseline(
        "ReAct",
        "Sun et al., NeurIPS 2021",
        {"percentile": 90},
        {"percentile": [85, 90, 95, 99]},
        ("head", "validation"),  # for its threshold
    ),
    "rankfeat": Baseline(
        "RankFeat", "Song et al., NeurIPS 2022", {"accelerate": False, "temperature": 1}, needs=("head", "blocks")
    ),
    "scale": Baseline("SCALE", "Xu et al., ICLR 2024", {"percentile": 85}, {"percentile": SHARES}, ("head",)),
    "ash": Baseline("ASH", "Djurisic et al., ICLR 2023", {"percentile": 90}, {"percentile": SHARES}, ("head",)),
    "gen": Baseline("GEN", "Liu et al., CVPR 2023", {"gamma": 0.1, "M": 100}, {"gamma": GAMMAS, "M": TOP}),
    "knn": Baseline("KNN", "Sun et al., ICML 2022", {"K": 50}, {"K": [50, 100, 200, 500, 1000]}, TRAINING),
    "vim": Baseline("ViM", "Wang et al., CVPR 2022", {"dim": 256}, {"dim": [256, 1000]}, TRAINING),
    "fdbd": Baseline(
        "fDBD",
        "Liu and Qin, ICML 2024",
        {"distance_as_normalizer": True},
        {"distance_as_normalizer": [True, False]},
        TRAINING,
    ),
    "nci": Baseline("NCI", "Liu and Qin, CVPR 2025", {"alpha": 1e-4}, {"alpha": [1e-4, 1e-3, 0.01, 0.1]}, TRAINING),
}


def fitted(name: str, features: int | None, images: int | None) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Options and sweep of a baseline where there are so many penultimate features, and so many training images.

    ViM's principal space must be smaller than the features: as its paper does for networks with few, it has half of
    them where OpenOOD's 256 dimensions are too many. KNN looks no further than there are images.
    """
    options = dict(BASELINES[name].options)
    sweep = {option: list(values) for option, values in BASELINES[name].sweep.items()}
    if name == "vim" and features is not None:
        options["dim"] = min(options["dim"], features // 2)
        sweep["dim"] = [dim for dim in sweep["dim"] if dim < features]
    if name == "knn" and images is not None:
        sweep["K"] = [count for count in sweep["K"] if count <= images]
    return options, sweep
