"""This package's detectors: S&I and GAIA as published, ablations, settings worth knowing; GSC and Prototype Fusion."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch

from openood_sandi import GradientShortCircuit, PrototypeFusion, SandI, SandIC
from openood_sandi.detectors.options import options_of
from openood_sandi.plugin import registry

from ..suite import Suite
from .baselines import NEEDS, Need
from .method import Method, Offer, Scorer
from .network import NetworkParts
from .shared import SharedMeans, SharedNetwork, SharedSandIC

Z, A = {"variant": "Z"}, {"variant": "A"}
NO_ATTACK, NO_SPLITTING = {"steps": 1}, {"splitting": False}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    # as published
    "gaia-z": ("GAIA-Z", {**Z, **NO_ATTACK}),
    "gaia-a": ("GAIA-A", {**A, **NO_ATTACK, "top_fraction": 1.0}),
    "sandi-z": ("S&I-Z", Z),
    "sandi-a": ("S&I-A", A),
    # the paper's ablations, its Tables 3 to 5; for Z, no attack is GAIA-Z; without steps there is nothing to split for,
    # so that its third ablation is the first one here
    "sandi-z-no-attack": ("S&I-Z without attack", {**Z, **NO_ATTACK}),
    "sandi-z-no-splitting": ("S&I-Z without splitting", {**Z, **NO_SPLITTING}),
    "sandi-z-neither": ("S&I-Z with neither", {**Z, **NO_ATTACK, **NO_SPLITTING}),
    "sandi-a-no-attack": ("S&I-A without attack", {**A, **NO_ATTACK}),
    "sandi-a-no-splitting": ("S&I-A without splitting", {**A, **NO_SPLITTING}),
    "sandi-a-neither": ("S&I-A with neither", {**A, **NO_ATTACK, **NO_SPLITTING}),
    # where to split
    "gaia-z-last-stage": ("GAIA-Z, last stage", {**Z, **NO_ATTACK, "splits": "last_stage"}),
    "gaia-a-all": ("GAIA-A, all layers", {**A, **NO_ATTACK, "top_fraction": 1.0, "splits": "all"}),
    "sandi-z-last-stage": ("S&I-Z, last stage", {**Z, "splits": "last_stage"}),
    "sandi-a-all": ("S&I-A, all layers", {**A, "splits": "all"}),
    # how to combine the gradients of Z
    "sandi-z-union": ("S&I-Z, union", {**Z, "combine": "union"}),
    "sandi-z-intersection": ("S&I-Z, intersection", {**Z, "combine": "intersection"}),
    # how far to walk: the step sizes of the authors' additional results, and far greater ones
    **{
        f"sandi-z-eta{eta}": (f"S&I-Z, step {eta}", {**Z, "step_size": eta})
        for eta in (0.0005, 0.0015, 0.002, 0.01, 0.1)
    },
    **{f"sandi-a-eta{eta}": (f"S&I-A, step {eta}", {**A, "step_size": eta}) for eta in (0.01, 0.1)},
    **{f"sandi-z-t{steps}": (f"S&I-Z, T={steps}", {**Z, "steps": steps}) for steps in (3, 5)},
    **{f"sandi-a-t{steps}": (f"S&I-A, T={steps}", {**A, "steps": steps}) for steps in (3, 5)},
}
"""Title and options of :class:`openood_sandi.SandI` by name."""


def offer(suite: Suite, parts: NetworkParts) -> Offer:
    """All of them; where S&I finds no place to split a network, it says so when it scores."""
    methods: dict[str, Method] = {}
    absent: dict[str, str] = {}

    def add(
        name: str, title: str, detector: Callable[..., Any], options: Mapping[str, Any], needs: tuple[Need, ...] = ()
    ) -> None:
        lacking = parts.lacks(needs)
        if lacking:
            absent[name] = lacking
        else:
            fitted_on = (*needs, "validation") if "training" in needs else needs
            decisive = {**options, **parts.fingerprints(fitted_on)}
            bound = functools.partial(_build, detector=detector, options=options)
            methods[name] = Method(name, title, "openood-sandi", decisive, bound, first=detector is SandIC)

    for name, (title, options) in SETTINGS.items():
        add(name, title, SandI, options)
    for variant, options in (("Z", Z), ("A", A)):
        name = f"sandi-{variant.lower()}-paper"
        if suite.paper_splits:
            layers = {"splits": list(suite.paper_splits), "feature": suite.paper_feature or "auto"}
            add(name, f"S&I-{variant}, the paper's layers", SandI, {**options, **layers})
        else:
            absent[name] = f"the paper does not say where to split {suite.network_name}"
    for info in registry.infos().values():
        if info.name not in ("sandi", "gaia"):  # those are above, by their variants
            detector = pkgutil.resolve_name(info.detector)
            add(info.name, info.label, detector, options_of(detector), NEEDS[info.needs])
    return methods, absent


def _build(
    suite: Suite, device: torch.device, batch_size: int, *, detector: Callable[..., Any], options: Mapping[str, Any]
) -> Scorer:
    network = suite.network.to(device)
    image = suite.in_distribution.dataset[0][0].unsqueeze(0).to(device)
    if detector is GradientShortCircuit:
        network = SharedNetwork(network, image)
    elif detector is PrototypeFusion:
        means = SharedMeans(network, image, int(options["layers"].removeprefix("last_")))
        network, options = means, {**options, "layers": means.names}
    made = (SharedSandIC if detector is SandIC else detector)(network, **options)
    if getattr(made, "fitted", ()):  # others would only get a threshold
        assert suite.training is not None
        held = suite.validation[0].to_fit_on(batch_size) if suite.validation else None
        made.fit(suite.training.to_fit_on(batch_size), held)
    scorer: Scorer = made
    return scorer
