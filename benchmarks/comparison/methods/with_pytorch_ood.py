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

logging.getLogger("pytorch_ood").addHandler(logging.NullHandler())


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
    if name in _OF_INPUTS:
        return _predicting(network, _OF_INPUTS[name](network, options, suite, parts))
    if name in _OF_LOGITS:
        predict = _OF_LOGITS[name](options)

        @torch.no_grad()
        def score_logits(images: Tensor) -> tuple[Tensor, Tensor]:
            logits = network(images)
            return logits.argmax(1), predict(logits)

        return score_logits
    penultimate = Penultimate(network)
    assert parts.head is not None
    detector, predict = _OF_FEATURES[name](as_linear(parts.head), options)
    if name == "react":
        assert suite.validation is not None
        detector.fit_feature_maps(*_all_features(penultimate, suite.validation[0], device, batch_size))
    elif detector.requires_fit:
        assert suite.training is not None
        features, labels = _all_features(penultimate, suite.training, device, batch_size)
        detector.to(device).fit_features(features, labels)

    @torch.no_grad()
    def score_features(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = penultimate(images)
        return logits.argmax(1), predict(features)

    return score_features


def _predicting(network: nn.Module, predict: Callable[[Tensor], Tensor]) -> Scorer:
    """A detector that takes the images themselves; the classes are the network's."""

    def score(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            pred = network(images).argmax(1)
        with frozen(network):
            return pred, predict(images).detach()

    return score


def _all_features(
    penultimate: Penultimate, images: ImageSet, device: torch.device, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Penultimate features (N, D) and labels (N,) of a set, on the CPU."""
    found = [(penultimate(batch.to(device))[0].cpu(), labels) for batch, labels in images.loader(batch_size)]
    return torch.cat([features for features, _ in found]), torch.cat([labels for _, labels in found])


# ---------------------------------------------------------------------------------------- detectors by name


def _odin(
    network: nn.Module, options: Mapping[str, Any], suite: Suite, parts: NetworkParts
) -> Callable[[Tensor], Tensor]:
    from pytorch_ood.detector import ODIN

    std = list(suite.normalisation[1])
    detector = ODIN(network, eps=options["noise"], temperature=options["temperature"], norm_std=std)
    return detector.predict  # type: ignore[no-any-return]


def _rankfeat(
    network: nn.Module, options: Mapping[str, Any], suite: Suite, parts: NetworkParts
) -> Callable[[Tensor], Tensor]:
    from pytorch_ood.detector import RankFeat

    blocks = Blocks(network, parts.image)
    assert parts.head is not None
    linear = as_linear(parts.head)

    def last_map(images: Tensor) -> Tensor:
        with torch.no_grad(), outputs_of(network, [blocks.after]) as found:
            network(images)
        return found[blocks.after]

    return RankFeat(last_map, lambda maps: linear(mean_over_positions(maps).flatten(1))).predict  # type: ignore


_OF_INPUTS: dict[str, Callable[[nn.Module, Mapping[str, Any], Suite, NetworkParts], Callable[[Tensor], Tensor]]] = {
    "odin": _odin,
    "rankfeat": _rankfeat,
}


def _of_logits(name: str, **names: str) -> Callable[[Mapping[str, Any]], Callable[[Tensor], Tensor]]:
    """The class of that name, its options under the names that OpenOOD has for them."""

    def build(options: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        from pytorch_ood import detector

        given = {theirs: options[ours] for theirs, ours in names.items()}
        return getattr(detector, name)(model=None, **given).predict_logits  # type: ignore[no-any-return]

    return build


_OF_LOGITS = {
    "msp": _of_logits("MaxSoftmax"),
    "mls": _of_logits("MaxLogit"),
    "ebo": _of_logits("EnergyBased", t="temperature"),
    "gen": _of_logits("GEN", gamma="gamma", M="M"),
}


def _of_features(linear: nn.Linear, options: Mapping[str, Any], name: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    from pytorch_ood import detector as library

    def one_position(features: Tensor) -> Tensor:
        return features[:, :, None, None]

    def head(maps: Tensor) -> Tensor:
        logits: Tensor = linear(maps.flatten(1))
        return logits

    detector: Any
    if name == "gradnorm":
        detector = library.GradNorm(linear, param_filter=lambda parameter: parameter == "weight")
        return detector, detector.predict
    if name == "react":
        detector = library.ReAct(None, head, percentile=options["percentile"] / 100)
        return detector, detector.predict_feature_maps
    if name == "ash":
        detector = library.ASH(None, head, variant="ash-b", percentile=options["percentile"] / 100)
        return detector, lambda features: detector.predict_feature_maps(one_position(features))
    if name == "scale":
        detector = library.SCALE(None, head, percentile=options["percentile"] / 100)
        return detector, lambda features: detector.predict_feature_maps(one_position(features))
    detector = {
        "knn": lambda: library.KNN(None, k=options["K"]),
        "vim": lambda: library.ViM(None, options["dim"], linear.weight, linear.bias),
        "fdbd": lambda: library.fDBD(None, linear),
        "nci": lambda: library.NCI(None, linear, alpha=options["alpha"]),
    }[name]()
    return detector, detector.predict_features


_OF_FEATURES = {
    name: functools.partial(_of_features, name=name)
    for name in ("gradnorm", "react", "ash", "scale", "knn", "vim", "fdbd", "nci")
}
