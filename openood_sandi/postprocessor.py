"""S&I and GAIA as postprocessors of OpenOOD.

OpenOOD builds one from its configuration and calls :meth:`SandIPostprocessor.inference` on every data set;
conf = -tau, as OpenOOD takes a large confidence for in-distribution.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import openood.utils.comm as comm
import torch
from openood.postprocessors import BasePostprocessor
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from openood_sandi.detector import SandI

#: Option of :class:`SandI` and its default.
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(SandI).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


class SandIPostprocessor(BasePostprocessor):  # type: ignore[misc]
    """S&I with the options of :class:`openood_sandi.SandI` under ``postprocessor.postprocessor_args``.

    It holds options only, no network, and so can be pickled and used with one network after another. There is
    nothing to set up. With ``APS_mode`` OpenOOD searches ``postprocessor_sweep``, lists of values under names
    of options.

    Args:
        config: OpenOOD's configuration; options that it leaves out have :class:`SandI`'s defaults.

    Raises:
        ValueError: an option is unknown or its value has the wrong type.
    """

    #: Options whose value is part of the method's definition.
    fixed: ClassVar[dict[str, Any]] = {}
    #: Options that can be set.
    settable: ClassVar[tuple[str, ...]] = tuple(_DEFAULTS)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.postprocessor
        self.options: dict[str, Any] = dict(self.fixed)
        for name, value in (settings.postprocessor_args or {}).items():
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
            Predicted class (B,) int64 and confidence -tau (B,).
        """
        pred, tau = self.detector(net)(data)
        return pred, -tau

    def inference(
        self, net: nn.Module, data_loader: DataLoader[Any], progress: bool = True
    ) -> tuple[npt.NDArray[np.int_], npt.NDArray[Any], npt.NDArray[np.int_]]:
        """Score a data set on the network's device.

        Args:
            net: the classifier, in eval mode.
            data_loader: batches {"data": images (B, C, H, W), "label": classes (B,), -1 for OOD}.
            progress: show a progress bar.

        Returns:
            Predicted class, confidence -tau and label of every image, (N,) each.
        """
        detector = self.detector(net)
        device = next(itertools.chain(net.parameters(), net.buffers())).device
        preds, confs, labels = [], [], []
        for batch in tqdm(data_loader, disable=not progress or not comm.is_main_process()):
            images = batch["data"]
            if device.type == "cuda" and not images.is_cuda:
                images = images.pin_memory()  # without it non_blocking waits all the same
            pred, tau = detector(images.to(device, non_blocking=True))
            preds.append(pred)
            confs.append(-tau)
            labels.append(batch["label"])
        return (
            torch.cat(preds).cpu().numpy().astype(int),
            torch.cat(confs).cpu().numpy(),
            torch.cat(labels).cpu().numpy().astype(int),
        )

    def detector(self, net: nn.Module) -> SandI:
        """The detector with the present options on ``net``.

        Raises:
            TypeError: ``net`` is one of OpenOOD's dictionaries of networks.
        """
        if isinstance(net, dict):
            raise TypeError(
                f"{self.config.postprocessor.name} scores one classifier, but this OpenOOD network is "
                f"a dictionary of {', '.join(net)}; choose a network that is a single module"
            )
        return SandI(net, **self.options)

    def set_hyperparam(self, hyperparam: Sequence[Any]) -> None:
        """Set the options of ``postprocessor_sweep``, in its order."""
        for name, value in zip(self.args_dict, hyperparam, strict=True):
            self.options[name] = self._checked(name, value)

    def get_hyperparam(self) -> list[Any]:
        """The present values of the options of ``postprocessor_sweep``, in its order."""
        return [self.options.get(name, _DEFAULTS[name]) for name in self.args_dict]

    def _checked(self, name: str, value: Any) -> Any:
        """``value`` as option ``name`` takes it: of its default's type, a number also from a string."""
        method = self.config.postprocessor.name
        if name not in self.settable:
            near = difflib.get_close_matches(name, self.settable) or self.settable
            raise ValueError(f"{method} has no option {name!r}. Did you mean: {', '.join(near)}?")
        kind = type(_DEFAULTS[name])
        try:
            if kind is float and not isinstance(value, bool):
                value = float(value)  # YAML reads 0 as an integer and 1e-3 as a string
            if not isinstance(value, kind) and not (name == "splits" and isinstance(value, list)):
                raise TypeError(f"{name}={value!r}: expected {_KINDS[kind]}")
            SandI(nn.Identity(), **{name: value})  # reads no images, but checks the value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{method}: {error}") from error
        return value


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


class GAIAPostprocessor(SandIPostprocessor):
    """GAIA: S&I with T = 1, so without perturbation, and for A over all channels."""

    fixed: ClassVar[dict[str, Any]] = {"steps": 1, "top_fraction": 1.0}
    settable: ClassVar[tuple[str, ...]] = ("variant", "splits", "feature", "attribution")
