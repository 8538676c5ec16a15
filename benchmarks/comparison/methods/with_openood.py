"""Methods run by OpenOOD's own postprocessors, and its search for options on validation data.

Options and sweeps come from :mod:`.baselines`, or from this package's yml files; OpenOOD's classes do the rest.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from openood_sandi.named_networks import make_openood_importable
from openood_sandi.plugin import registry, standins

from ..suite import Suite
from .baselines import BASELINES, NEEDS, Need
from .method import Library, Method, Offer, Scorer
from .network import NetworkParts, OpenOODNetwork, frozen
from .shared import SharedNetwork

Options = Mapping[str, Any]
SHARED = ("msp", "ebo", "mls", "gen", "react", "ash", "scale", "knn", "vim", "fdbd", "nci")
"""Methods that read nothing but logits and penultimate features."""


def offer(suite: Suite, parts: NetworkParts) -> Offer:
    """OpenOOD's methods; and "NAME-search", with options chosen on validation data, of its own and this package's."""
    methods: dict[str, Method] = {}
    absent: dict[str, str] = {}
    problem = import_problem()

    def add(name: str, title: str, needs: Sequence[Need], options: dict[str, Any], sweep: dict[str, list[Any]]) -> None:
        searched = name + "-search" if sweep else name
        needs = (*needs, "validation", "OOD validation") if sweep else needs
        lacking = problem or (name in BASELINES and parts.cannot_run(name)) or parts.lacks(needs)
        if name == "odin" and (channels := parts.image.shape[1]) != 3:
            lacking = lacking or f"OpenOOD's takes images of 3 channels, not {channels}"
        if lacking:
            absent[searched] = lacking
            return
        title, source = (
            f"{title}, searched" if sweep else title,
            "openood-sandi" if name in registry.infos() else "OpenOOD",
        )
        decisive = {**options, **parts.fingerprints(needs), **({"searched": sweep} if sweep else {})}
        build = functools.partial(_build, name=name, options=options, sweep=sweep)
        methods[searched] = Method(searched, title, cast(Library, source), decisive, build)

    for name, baseline in BASELINES.items():
        options, sweep = parts.options(name)
        add(name, baseline.title, baseline.needs, options, {})
        if math.prod(map(len, sweep.values())) > 1:
            add(name, baseline.title, baseline.needs, options, sweep)
    for name, info in registry.infos().items():
        if problem:
            absent[f"{name}-search"] = problem
        else:
            add(name, info.label, NEEDS[info.needs], *_own_options(name))
    return methods, absent


@functools.cache
def import_problem() -> str | None:
    """Why OpenOOD cannot be imported, None if it can; ``$OPENOOD_HOME`` may name a checkout."""
    make_openood_importable()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import openood.evaluation_api  # noqa: F401
    except Exception as error:  # OpenOOD imports much; whatever fails there, other libraries' methods remain
        return f"OpenOOD does not import ({type(error).__name__}: {error}); OPENOOD_HOME may name a checkout"
    return None


def _own_options(name: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Options and sweep of a postprocessor of this package, from its yml file."""
    from openood.utils.config import Config

    settings = Config(str(registry.config_file(name))).postprocessor
    decisive = registry.postprocessor_class(name).settable()  # type: ignore[union-attr]
    options = {option: value for option, value in settings.postprocessor_args.items() if option in decisive}
    return options, dict(settings.postprocessor_sweep)


def _build(
    suite: Suite, device: torch.device, batch_size: int, *, name: str, options: Options, sweep: Options
) -> Scorer:
    if device.type != "cuda" and torch.cuda.device_count():
        raise ValueError(
            f"OpenOOD's methods run on the GPU where there is one, not on {device}; "
            'give --device cuda, or set CUDA_VISIBLE_DEVICES=""'
        )
    backbone = plain = suite.network.to(device)
    image = suite.in_distribution.dataset[0][0].unsqueeze(0).to(device)
    if name in SHARED:
        plain = SharedNetwork(backbone, image)
    if name in BASELINES and "head" in BASELINES[name].needs:
        plain = _with_interface(plain, image)
    network = _wrapper(name)(plain)
    postprocessor = _postprocessor(name, suite, options, sweep)
    loaders = _loaders(suite, batch_size)
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    # what OpenOOD prints is no part of a table
    with current, frozen(backbone), contextlib.redirect_stdout(sys.stderr):
        postprocessor.setup(network, loaders, {"val": loaders.get("val-ood")})
        if sweep:
            _search(network, loaders, postprocessor)
    if name in registry.infos():
        return Searched(postprocessor.detector(backbone), _chosen(postprocessor, sweep))

    def score(images: Tensor) -> tuple[Tensor, Tensor]:
        # some ask for the gradient by the batch, which therefore is a tensor of their own
        with current, frozen(backbone), torch.enable_grad():
            pred, confidence = postprocessor.postprocess(network, images.detach())
        return pred.detach().to(images.device), -confidence.detach().to(images.device)

    return Searched(score, _chosen(postprocessor, sweep)) if sweep else score


@dataclass(frozen=True)
class Searched:
    """A scorer with the option values that OpenOOD's search has chosen."""

    score: Scorer
    chosen: Options

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(images)


def _search(network: nn.Module, loaders: Mapping[str, DataLoader[Any]], postprocessor: Any) -> None:
    """The search of OpenOOD's Evaluator: of all values, those of the best AUROC on validation images."""
    from openood.evaluation_api import Evaluator

    evaluator = Evaluator.__new__(Evaluator)  # its constructor reads the data sets it knows
    evaluator.net, evaluator.postprocessor = network, postprocessor
    evaluator.dataloader_dict = {"id": {"val": loaders["val"]}, "ood": {"val": loaders["val-ood"]}}
    evaluator.hyperparam_search()


def _chosen(postprocessor: Any, sweep: Options) -> dict[str, Any]:
    """The values that the search has chosen, by option; OpenOOD's own with one option give it without a list."""
    values = postprocessor.get_hyperparam()
    return dict(zip(sweep, values if isinstance(values, list) else [values], strict=True))


def _with_interface(net: nn.Module, image: Tensor) -> nn.Module:
    """OpenOOD's networks are used as they are, where they have all that its postprocessors call."""
    complete = all(hasattr(net, name) for name in ("fc", "get_fc", "get_fc_layer", "intermediate_forward", "avgpool"))
    if type(net).__module__.startswith("openood.") and complete:
        return net
    return OpenOODNetwork(net, image).eval()


def _wrapper(name: str) -> Callable[[nn.Module], nn.Module]:
    """The network that OpenOOD's Evaluator puts around the backbone for some methods."""
    from openood.evaluation_api import evaluator

    wrappers: dict[str, Callable[[nn.Module], nn.Module]]
    wrappers = {"react": evaluator.ReactNet, "ash": evaluator.ASHNet, "scale": evaluator.ScaleNet}
    return wrappers.get(name, lambda net: net)


def _postprocessor(name: str, suite: Suite, options: Options, sweep: Options) -> Any:
    from openood.evaluation_api.postprocessor import postprocessors
    from openood.postprocessors.info import num_classes_dict
    from openood.utils.config import Config

    num_classes_dict.setdefault(suite.name, suite.classes)  # OpenOOD looks its own data sets up there
    settings: dict[str, Any] = {"name": name, "APS_mode": bool(sweep)}
    settings |= {"postprocessor_args": dict(options), "postprocessor_sweep": dict(sweep)}
    config = Config(dataset={"name": suite.name}, postprocessor=settings)
    built = standins.require_real((registry.postprocessor_class(name) or postprocessors[name])(config))
    if name == "odin":
        built.input_std = list(suite.normalisation[1])  # the network's own, whatever the data set's name
    return built


def _loaders(suite: Suite, batch_size: int) -> dict[str, DataLoader[Any]]:
    """Image sets as OpenOOD's loaders give them: dictionaries of images and labels."""
    known, unknown = (*(suite.validation or ()), None, None)[:2]
    sets = {"train": suite.training, "val": known, "val-ood": unknown}
    return {name: images.to_fit_on(batch_size, _named) for name, images in sets.items() if images is not None}


def _named(items: list[Any]) -> dict[str, Any]:
    return dict(zip(("data", "label"), default_collate(items), strict=True))
