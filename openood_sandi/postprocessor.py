"""This package's detectors as postprocessors of OpenOOD.

OpenOOD builds one from its configuration and calls :meth:`DetectorPostprocessor.inference` on every data set;
conf = -score, as OpenOOD takes a large confidence for in-distribution.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import openood.utils.comm as comm
from openood.postprocessors import BasePostprocessor
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from openood_sandi.detectors.gsc import GradientShortCircuit
from openood_sandi.detectors.prototype_fusion import PrototypeFusion
from openood_sandi.detectors.sandi.detector import SandI
from openood_sandi.plugin import checkpoints
from openood_sandi.runs import keys, ranks
from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import infer

_log = logging.getLogger(__name__)

#: Images (B, C, H, W) to predicted classes (B,) and scores (B,), larger = more out-of-distribution.
Detector = Callable[[Tensor], tuple[Tensor, Tensor]]


def options_of(detector: type[Any]) -> dict[str, Any]:
    """The options of a detector's class, which are its keyword-only arguments, and their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(detector).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


class DetectorPostprocessor(BasePostprocessor):  # type: ignore[misc]
    """A detector of this package, with its options under ``postprocessor.postprocessor_args``.

    It holds no network, and so can be pickled and used with one network after another. With ``APS_mode``
    OpenOOD searches ``postprocessor_sweep``, lists of values under names of options.

    Args:
        config: OpenOOD's configuration; options that it leaves out have the detector's defaults.

    Raises:
        ValueError: an option is unknown or its value has the wrong type.
    """

    #: The detector's class: ``method(net, **options)`` scores images.
    method: ClassVar[type[Any]]
    #: Options whose value is part of the method's definition.
    fixed: ClassVar[dict[str, Any]] = {}

    @classmethod
    def settable(cls) -> dict[str, Any]:
        """The options that can be set, and their defaults."""
        return {name: default for name, default in options_of(cls.method).items() if name not in cls.fixed}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.postprocessor
        self.options: dict[str, Any] = dict(self.fixed)
        self.run: dict[str, str] = dict(_OF_THE_RUN)
        for name, value in (settings.postprocessor_args or {}).items():
            if name in _OF_THE_RUN:
                self.run[name] = _checked_of_the_run(settings.name, name, value)
            else:
                self.options[name] = self._checked(name, value)
        self.args_dict: dict[str, list[Any]] = {
            name: [self._checked(name, value) for value in values]
            for name, values in (settings.postprocessor_sweep or {}).items()
        }
        self.APS_mode = bool(settings.APS_mode)
        self.hyperparam_search_done = False
        if self.APS_mode and not self.args_dict:
            raise ValueError(
                f"{settings.name}: APS_mode searches postprocessor_sweep, which is empty; expected "
                "lists of values under names of options, such as variant: [Z, A]"
            )

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """Score one batch; over many, :meth:`inference` is quicker, as it finds the split points only once.

        Args:
            net: the classifier, in eval mode.
            data: images (B, C, H, W) on the network's device.

        Returns:
            Predicted class (B,) int64 and confidence, the negative score, (B,).
        """
        pred, score = self.detector(net)(data)
        return pred, -score

    def inference(
        self, net: nn.Module, data_loader: DataLoader[Any], progress: bool = True
    ) -> tuple[npt.NDArray[np.int_], npt.NDArray[Any], npt.NDArray[np.int_]]:
        """Score a data set on the network's device.

        Args:
            net: the classifier, in eval mode.
            data_loader: batches {"data": images (B, C, H, W), "label": classes (B,), -1 for OOD}.
            progress: show a progress bar.

        Under ``torchrun`` every process scores its share of the batches, and all return the whole; with ``cache_dir``
        what an earlier run has scored is not scored again: :func:`openood_sandi.runs.score.infer`.

        Returns:
            Predicted class, confidence and label of every image, (N,) each, in the loader's order.
        """
        detector = self.detector(net)
        device = next(itertools.chain(net.parameters(), net.buffers())).device
        key = self._key(net, data_loader)
        cache = ScoreCache(Path(self.run["cache_dir"]).expanduser()) if key and self.run["cache_dir"] else None
        pred, score, label = infer(
            detector, data_loader, device, cache=cache, key=key, progress=progress, unreadable=self.run["unreadable"]
        )
        return pred, -score, label

    def _key(self, net: nn.Module, data_loader: Any) -> dict[str, object] | None:
        """Everything that decides the scores, where a cache or other ranks ask for it; None if it cannot be told."""
        if not self.run["cache_dir"] and not ranks.launched():
            return None
        fitted = {name: value for name, value in vars(self).items() if name not in _SETTINGS}
        try:
            return {
                "method": type(self).__qualname__,
                "options": self.options,
                "fitted": keys.state(fitted),
                "network": keys.network(net),
                "images": keys.images(getattr(data_loader, "dataset", data_loader)),
            }
        except keys.Indescribable as error:
            if self.run["cache_dir"]:
                _log.warning("the score cache is left unused: %s", error)
            return None

    def detector(self, net: nn.Module) -> Detector:
        """The detector with the present options on ``net``.

        Raises:
            TypeError: ``net`` is one of OpenOOD's dictionaries of networks.
            ValueError: OpenOOD read it from a checkpoint that does not fit.
        """
        if isinstance(net, dict):
            raise TypeError(
                f"{self.config.postprocessor.name} scores one classifier, but this OpenOOD network is "
                f"a dictionary of {', '.join(net)}; choose a network that is a single module"
            )
        checkpoints.require_whole(net)
        detector: Detector = self.method(net, **self.options)
        return detector

    def set_hyperparam(self, hyperparam: Sequence[Any]) -> None:
        """Set the options of ``postprocessor_sweep``, in its order."""
        for name, value in zip(self.args_dict, hyperparam, strict=True):
            self.options[name] = self._checked(name, value)

    def get_hyperparam(self) -> list[Any]:
        """The present values of the options of ``postprocessor_sweep``, in its order."""
        return [self.options.get(name, self.settable()[name]) for name in self.args_dict]

    def _checked(self, name: str, value: Any) -> Any:
        """``value`` as option ``name`` takes it: of its default's type, a number also from a string."""
        method, settable = self.config.postprocessor.name, self.settable()
        if name not in settable:
            known = [*settable, *_OF_THE_RUN]
            near = difflib.get_close_matches(name, known) or known
            raise ValueError(f"{method} has no option {name!r}. Did you mean: {', '.join(near)}?")
        kind = type(settable[name])
        try:
            if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
                with contextlib.suppress(ValueError, OverflowError):
                    value = float(value)  # YAML reads 0 as an integer and 1e-3 as a string
            if not isinstance(value, kind) and not (name in _NAMES and isinstance(value, list)):
                raise TypeError(f"{name}={value!r}: expected {_KINDS[kind]}")
            self.method(nn.Identity(), **{name: value})  # reads no images, but checks the value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{method}: {error}") from error
        return value


#: Options of every postprocessor that decide no score, and their defaults.
_OF_THE_RUN = {"cache_dir": "", "unreadable": "stop"}
#: Attributes of a postprocessor that decide no score, or are in a cache's key under another name.
_SETTINGS = ("config", "options", "run", "args_dict", "APS_mode", "hyperparam_search_done")


def _checked_of_the_run(method: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{method}: {name}={value!r}: expected a string")
    if name == "unreadable" and value not in ("stop", "skip"):
        raise ValueError(f"{method}: unreadable={value!r}: expected one of 'stop', 'skip'")
    return value


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
#: Options that take names of modules, in one string or as a list.
_NAMES = ("splits", "layers")


class SandIPostprocessor(DetectorPostprocessor):
    """S&I with the options of :class:`openood_sandi.SandI`; there is nothing to set up."""

    method = SandI


class GAIAPostprocessor(SandIPostprocessor):
    """GAIA: S&I with T = 1, so without perturbation, and for A over all channels."""

    fixed: ClassVar[dict[str, Any]] = {"steps": 1, "top_fraction": 1.0}

    @classmethod
    def settable(cls) -> dict[str, Any]:
        return {name: default for name, default in super().settable().items() if name in _OF_GAIA}


_OF_GAIA = ("variant", "splits", "feature", "attribution")


class GSCPostprocessor(DetectorPostprocessor):
    """Gradient Short-Circuit with the options of :class:`openood_sandi.GradientShortCircuit`; no set-up."""

    method = GradientShortCircuit


class PrototypeFusionPostprocessor(DetectorPostprocessor):
    """Prototype Fusion with the options of :class:`openood_sandi.detectors.prototype_fusion.PrototypeFusion`.

    :meth:`setup` takes the prototypes from OpenOOD's training images, once: ``setup_flag`` tells OpenOOD that
    they are worth keeping, and keeps them when it sets up again.
    """

    method = PrototypeFusion

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.setup_flag = False
        self.prototypes: Mapping[str, Tensor] = {}

    def setup(
        self, net: nn.Module, id_loader_dict: Mapping[str, DataLoader[Any]], ood_loader_dict: Mapping[str, Any]
    ) -> None:
        """Compute the prototypes from ``id_loader_dict["train"]``, on the network's device."""
        if self.setup_flag:
            return
        batches = tqdm(id_loader_dict["train"], desc="prototypes", disable=not comm.is_main_process())
        self.prototypes = self.detector(net).fit(_pairs(batches)).prototypes
        self.setup_flag = True

    def detector(self, net: nn.Module) -> PrototypeFusion:
        detector = super().detector(net)
        assert isinstance(detector, PrototypeFusion)
        detector.prototypes = self.prototypes
        return detector


def _pairs(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield batch["data"], batch["label"]
