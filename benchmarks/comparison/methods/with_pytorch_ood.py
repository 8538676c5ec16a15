"""The same methods run by pytorch-ood, with the options of the same names.

Its scores are OpenOOD's up to a constant factor (fDBD, GEN, GradNorm) or a square root (KNN), which change no
metric, and up to rounding. Two methods differ: its GEN keeps probabilities at least 1e-7 away from 0 and 1, which
tells among very confident predictions; its RankFeat changes the last feature map only, where OpenOOD averages
the logits of the last two.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi.engine.features import Penultimate

from ..suite import ImageSet, Suite
from .baselines import BASELINES
from .method import Method, Offer, Scorer
from .network import Blocks, NetworkParts, as_linear, frozen, mean_over_positions, outputs_of
from .shared import SharedNetwork

logging.getLogger("pytorch_ood").addHandler(logging.NullHandler())


Predict = Callable[[Tensor], Tensor]
IMAGES = ("odin", "rankfeat")
"""Detectors that take the images themselves."""


def offer(suite: Suite, parts: NetworkParts) -> Offer:
    """pytorch-ood's methods with options as given in :mod:`.baselines`."""
    methods: dict[str, Method] = {}
    absent: dict[str, str] = {}
    problem = import_problem()
    for name, baseline in BASELINES.items():
        lacking = problem or parts.cannot_run(name)
        options, _ = parts.options(name)
        if lacking:
            absent[name] = lacking
            continue
        decisive = {**options, **parts.fingerprints(baseline.needs)}
        build = functools.partial(_build, name=name, options=options)
        methods[name] = Method(name, baseline.title, "pytorch-ood", decisive, build)
    return methods, absent


@functools.cache
def import_problem() -> str | None:
    """Why pytorch-ood cannot be imported, None if it can."""
    try:
        import pytorch_ood.detector  # noqa: F401
    except ImportError as error:
        return f"pytorch-ood does not import ({error}): pip install pytorch-ood"
    return None


def _build(suite: Suite, device: torch.device, batch_size: int, *, name: str, options: Mapping[str, Any]) -> Scorer:
    network = suite.network.to(device)
    parts = NetworkParts(suite)
    if name not in IMAGES:
        network = SharedNetwork(network, parts.image)
    penultimate = Penultimate(network)

    def features(images: ImageSet) -> tuple[Tensor, Tensor]:
        """Penultimate features (N, D) and labels (N,) of a set, on the CPU."""
        found = [(penultimate(batch.to(device))[0].cpu(), labels) for batch, labels in images.to_fit_on(batch_size)]
        return torch.cat([some for some, _ in found]), torch.cat([labels for _, labels in found])

    def read(images: Tensor) -> tuple[Tensor, Tensor]:
        """What the detector is given, and the logits."""
        if name in LOGITS:
            logits: Tensor = network(images)
            return logits, logits
        return penultimate(images) if name not in IMAGES else (images, network(images))

    predict: Predict
    if name in IMAGES:
        predict = _odin(network, options, suite) if name == "odin" else _rankfeat(network, parts)
    elif name in LOGITS:
        predict = _of_logits(name, options)
    else:
        assert parts.head is not None
        detector, predict = _of_features(name, as_linear(parts.head), options)
        if name == "react" and suite.validation:
            detector.fit_feature_maps(*features(suite.validation[0]))
        elif detector.requires_fit:
            assert suite.training is not None
            detector.to(device).fit_features(*features(suite.training))

    def score(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            given, logits = read(images)
        with frozen(network), torch.set_grad_enabled(name in IMAGES):
            return logits.argmax(1), predict(given).detach()

    return score


def _odin(network: nn.Module, options: Mapping[str, Any], suite: Suite) -> Predict:
    from pytorch_ood.detector import ODIN

    std = list(suite.normalisation[1])
    predict: Predict = ODIN(network, eps=options["noise"], temperature=options["temperature"], norm_std=std).predict
    return predict


def _rankfeat(network: nn.Module, parts: NetworkParts) -> Predict:
    from pytorch_ood.detector import RankFeat

    blocks = Blocks(network, parts.image)
    assert parts.head is not None
    linear = as_linear(parts.head)

    def last_map(images: Tensor) -> Tensor:
        with torch.no_grad(), outputs_of(network, [blocks.after]) as found:
            network(images)
        return found[blocks.after]

    predict: Predict = RankFeat(last_map, lambda maps: linear(mean_over_positions(maps).flatten(1))).predict
    return predict


LOGITS: dict[str, tuple[str, dict[str, str]]] = {
    "msp": ("MaxSoftmax", {}),
    "mls": ("MaxLogit", {}),
    "ebo": ("EnergyBased", {"t": "temperature"}),
    "gen": ("GEN", {"gamma": "gamma", "M": "M"}),
}
"""Classes of detectors that take the logits, and their options with the names that OpenOOD has for them."""


def _of_logits(name: str, options: Mapping[str, Any]) -> Predict:
    from pytorch_ood import detector

    kind, names = LOGITS[name]
    given = {theirs: options[ours] for theirs, ours in names.items()}
    predict: Predict = getattr(detector, kind)(model=None, **given).predict_logits
    return predict


def _of_features(name: str, linear: nn.Linear, options: Mapping[str, Any]) -> tuple[Any, Predict]:
    """A detector of penultimate features, to be fitted, and what it predicts of them."""
    from pytorch_ood import detector as library

    def head(maps: Tensor) -> Tensor:
        logits: Tensor = linear(maps.flatten(1))
        return logits

    share = options.get("percentile", 0) / 100
    detector: Any = {
        "gradnorm": lambda: library.GradNorm(linear, param_filter=lambda parameter: parameter == "weight"),
        "react": lambda: library.ReAct(None, head, percentile=share),
        "ash": lambda: library.ASH(None, head, variant="ash-b", percentile=share),
        "scale": lambda: library.SCALE(None, head, percentile=share),
        "knn": lambda: library.KNN(None, k=options["K"]),
        "vim": lambda: library.ViM(None, options["dim"], linear.weight, linear.bias),
        "fdbd": lambda: library.fDBD(None, linear),
        "nci": lambda: library.NCI(None, linear, alpha=options["alpha"]),
    }[name]()
    if name in ("ash", "scale"):  # of maps with one position
        return detector, lambda features: detector.predict_feature_maps(features[:, :, None, None])
    method = {"gradnorm": "predict", "react": "predict_feature_maps"}.get(name, "predict_features")
    return detector, getattr(detector, method)
