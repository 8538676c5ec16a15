"""This package's detectors as postprocessors of OpenOOD.

OpenOOD builds one from its configuration and calls :meth:`DetectorPostprocessor.inference` on every data set;
conf = -score, as OpenOOD takes a large confidence for in-distribution. ``SandIPostprocessor`` and the others named in
:data:`openood_sandi.plugin.registry.DETECTORS` are made of the detectors' ``INFO`` when they are first asked for.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from openood.postprocessors import BasePostprocessor
from openood.utils.config import Config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from openood_sandi.detectors.detector import Detector
from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.detectors.options import as_option, options_of
from openood_sandi.plugin import checkpoints, registry
from openood_sandi.plugin.settings import require_sound
from openood_sandi.plugin.training_images import as_tested, in_eval_mode
from openood_sandi.runs import keys, progress, ranks
from openood_sandi.runs.batches import images_and_labels
from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import score_dataset

_log = logging.getLogger(__name__)


class DetectorPostprocessor(BasePostprocessor):  # type: ignore[misc]
    """A detector of this package, with its options under ``postprocessor.postprocessor_args``.

    It holds no network, and so can be pickled and used with one network after another. With ``APS_mode``
    OpenOOD searches ``postprocessor_sweep``, lists of values under names of options.

    Args:
        config: OpenOOD's configuration; options that it leaves out have the detector's defaults. In Python it can be
            left out: ``SandIPostprocessor(variant="A")``.
        options: in place of ``config``, what that has under ``postprocessor.postprocessor_args``.

    Raises:
        ValueError: an option is unknown or its value has the wrong type.
        TypeError: both a configuration and options are given, or a configuration that is none.
    """

    info: ClassVar[DetectorInfo]
    #: The detector's class: ``method(net, **options)`` scores images.
    method: ClassVar[Callable[..., Any]]

    @classmethod
    def settable(cls) -> dict[str, Any]:
        """The options that can be set, and their defaults."""
        return options_of(cls.method)

    def __init__(self, config: Any = None, **options: Any) -> None:
        config = _configuration(self.info.name, config, options)
        super().__init__(config)
        settings = config.postprocessor
        require_sound(settings)
        self.options: dict[str, Any] = {}
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
        what an earlier run has scored is not scored again: :func:`openood_sandi.score_dataset`.

        Returns:
            Predicted class, confidence and label of every image, (N,) each, in the loader's order.
        """
        detector = self.detector(net)
        device = next(itertools.chain(net.parameters(), net.buffers())).device
        key = self._key(net, data_loader)
        cache = ScoreCache(Path(self.run["cache_dir"]).expanduser()) if key and self.run["cache_dir"] else None
        pred, score, label = score_dataset(
            detector, data_loader, device, key=key, cache=cache, unreadable=self.run["unreadable"], progress=progress
        )
        if remark := getattr(detector, "remark", str)():  # other packages' detectors have none
            _log.info("%s: %s", self.config.postprocessor.name, remark)
        return pred, -score, label

    def _key(self, net: nn.Module, data_loader: Any) -> dict[str, object] | None:
        """Everything that decides the scores, where a cache or other ranks ask for it; None if it cannot be told."""
        if not self.run["cache_dir"] and not ranks.launched():
            return None
        fitted = {name: value for name, value in vars(self).items() if name not in _SETTINGS}
        dataset = getattr(data_loader, "dataset", data_loader)
        try:
            made = {"fitted": keys.state(fitted), "detector": keys.state({"class": self.method})}
            return keys.score_key(type(self).__qualname__, self.options, net, dataset, **made)
        except keys.Indescribable as error:
            if self.run["cache_dir"]:
                _log.warning("the score cache is left unused: %s", error)
            return None

    def detector(self, net: nn.Module) -> Any:
        """The detector with the present options on ``net``: images (B, C, H, W) to classes (B,) and scores (B,).

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
        return self.method(net, **self.options)

    def set_hyperparam(self, hyperparam: Sequence[Any]) -> None:
        """Set the options of ``postprocessor_sweep``, in its order."""
        for name, value in zip(self.args_dict, hyperparam, strict=True):
            self.options[name] = self._checked(name, value)

    def get_hyperparam(self) -> list[Any]:
        """The present values of the options of ``postprocessor_sweep``, in its order."""
        return [self.options.get(name, self.settable()[name]) for name in self.args_dict]

    def _checked(self, name: str, value: Any) -> Any:
        """``value`` as option ``name`` of the detector takes it."""
        method, settable = self.config.postprocessor.name, self.settable()
        if name not in settable:
            known = [*settable, *_OF_THE_RUN]
            near = difflib.get_close_matches(name, known) or known
            raise ValueError(f"{method} has no option {name!r}. Did you mean: {', '.join(near)}?")
        try:
            value = as_option(self.method, name, value)
            self.method(nn.Identity(), **{name: value})  # reads no images, but checks the value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{method}: {error}") from error
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.info,), vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # before 0.2 GAIA's options had those in them that are its definition
        self.options = {name: value for name, value in self.options.items() if name in self.settable()}


#: Options of every postprocessor that decide no score, and their defaults.
_OF_THE_RUN = {"cache_dir": "", "unreadable": "stop"}
#: Attributes of a postprocessor that decide no score, or are in a cache's key under another name.
_SETTINGS = ("config", "options", "run", "args_dict", "APS_mode", "hyperparam_search_done")


def _configuration(name: str, config: Any, options: dict[str, Any]) -> Any:
    """``config``, or one that has the options where there is none."""
    if config is None:
        settings = {"name": name, "APS_mode": False, "postprocessor_args": options, "postprocessor_sweep": {}}
        return Config({"postprocessor": Config(settings)})
    if options or not hasattr(config, "postprocessor"):
        raise TypeError(
            f"{name}: expected a configuration of OpenOOD's, or options by name, as variant='A'; got "
            f"{type(config).__name__}{' and ' * bool(options)}{', '.join(options)}"
        )
    return config


def _checked_of_the_run(method: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{method}: {name}={value!r}: expected a string")
    if name == "unreadable" and value not in ("stop", "skip"):
        raise ValueError(f"{method}: unreadable={value!r}: expected one of 'stop', 'skip'")
    return value


class FittedPostprocessor(DetectorPostprocessor):
    """A detector that needs training images.

    It keeps what their fit sets, the attributes ``info.fitted``, and keeps them when it sets up again.
    """

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.setup_flag = False

    def setup(
        self, net: nn.Module, id_loader_dict: Mapping[str, DataLoader[Any]], ood_loader_dict: Mapping[str, Any]
    ) -> None:
        """Fit the detector to ``id_loader_dict["train"]``, as test images are transformed, on the network's device.

        What it needs of images that it does not learn from, it takes from ``id_loader_dict["val"]``, if there is one.
        """
        if self.setup_flag:
            return
        val = id_loader_dict.get("val")
        train = as_tested(id_loader_dict["train"], val)
        batches = progress.shown(train, f"fitting {self.info.name}")
        detector = super().detector(net)
        with in_eval_mode(net):
            if isinstance(detector, Detector):
                detector.fit(batches, val)
            else:  # another package's, which knows pairs only
                detector.fit(map(images_and_labels, batches))
        for name in self.info.fitted:
            setattr(self, name, getattr(detector, name))
        self.setup_flag = True

    def detector(self, net: nn.Module) -> Any:
        detector = super().detector(net)
        for name in self.info.fitted:
            if hasattr(self, name):  # else there has been no set-up, which the detector says itself
                setattr(detector, name, getattr(self, name))
        return detector


@functools.cache
def postprocessor_of(info: DetectorInfo) -> type[DetectorPostprocessor]:
    """The postprocessor of a detector: a class called as its row of the registry says, or else after its own class.

    Raises:
        ImportError, AttributeError: the detector's class is not where ``info`` says.
    """
    module, _, method = info.detector.partition(":")
    _, name = registry.DETECTORS.get(info.name, ("", f"{method}Postprocessor"))
    base = FittedPostprocessor if info.fitted else DetectorPostprocessor
    about = f"{info.label} ({info.title}, {info.venue}) with the options of :class:`{module}.{method}`."
    members = {"info": info, "method": getattr(import_module(module), method), "__module__": __name__, "__doc__": about}
    return type(name, (base,), members)


def _unpickled(info: DetectorInfo) -> DetectorPostprocessor:
    """A postprocessor without its attributes yet, of the detector as it describes itself today."""
    cls = postprocessor_of(registry.infos().get(info.name, info))
    return cls.__new__(cls)


def __getattr__(name: str) -> type[DetectorPostprocessor]:
    info = registry.own_info(name)
    if info is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return postprocessor_of(info)
