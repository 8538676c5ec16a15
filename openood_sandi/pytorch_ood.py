"""S&I and GAIA as a detector of `pytorch-ood <https://github.com/kkirchheim/pytorch-ood>`_ (an optional dependency).

>>> from openood_sandi.pytorch_ood import SandIDetector
>>> detector = SandIDetector(model)              # S&I; SandIDetector(model, steps=1, top_fraction=1.0) is GAIA
>>> metrics.update(detector(x), y)               # pytorch_ood.metrics.OODMetrics: larger scores mean OOD, as here
"""

from __future__ import annotations

from typing import Any, ClassVar

from pytorch_ood.api import Detector, DetectorInfo, ModelNotSetException, Paper, Task
from torch import Tensor, nn

from openood_sandi.detectors.options import options_of
from openood_sandi.detectors.sandi import INFO
from openood_sandi.detectors.sandi.detector import SandI

__all__ = ["SandIDetector"]


class SandIDetector(Detector):  # type: ignore[misc]
    """S&I with the options of :class:`openood_sandi.SandI`; the score is tau of Eq. 14. There is nothing to fit.

    Args:
        model: a classifier in eval mode that maps images (B, C, H, W) to logits (B, classes).
        options: as for :class:`openood_sandi.SandI`, checked at once.
    """

    info = DetectorInfo(
        paper=Paper(title=INFO.title, venue=INFO.venue, year=INFO.year, url=INFO.url),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )
    requires_fit = False
    hyperparameter_space: ClassVar[dict[str, list[Any]]] = {
        "variant": ["Z", "A"],
        "splits": ["all", "last_stage"],
        "step_size": [1e-3, 1e-2],
    }

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        if model is None:
            raise ModelNotSetException("SandIDetector needs a model: it scores by the model's gradients")
        self.model = model
        self.options = options
        self._detector = SandI(model, **options)

    def predict(self, x: Tensor) -> Tensor:
        """Scores (B,) of images ``x`` (B, C, H, W), larger = more out-of-distribution."""
        device = self.device
        _, tau = self._detector(x if device is None else x.to(device))
        return tau

    def get_hyperparameters(self) -> dict[str, Any]:
        options = options_of(SandI) | self.options
        return {name: options[name] for name in self.hyperparameter_space}

    def set_hyperparameters(self, **options: Any) -> SandIDetector:
        """Set any options of :class:`openood_sandi.SandI`, those of ``hyperparameter_space`` and others."""
        self._detector = SandI(self.model, **{**self.options, **options})
        self.options |= options
        return self

    def to(self, device: Any) -> SandIDetector:
        super().to(device)
        return self.set_hyperparameters()  # a fresh study of the network where it is now
