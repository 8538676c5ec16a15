"""S&I, GAIA and S&I-C as detectors of `pytorch-ood <https://github.com/kkirchheim/pytorch-ood>`_ (if installed).

>>> from openood_sandi.pytorch_ood import SandIDetector
>>> detector = SandIDetector(model)              # S&I; SandIDetector(model, steps=1, top_fraction=1.0) is GAIA
>>> metrics.update(detector(x), y)               # pytorch_ood.metrics.OODMetrics: larger scores mean OOD, as here
>>> detector = SandICDetector(model).fit(loader)  # S&I-C, fitted to training images transformed as test images are
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pytorch_ood.api import (
    Detector,
    DetectorInfo,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)
from torch import Tensor, nn

import openood_sandi
from openood_sandi.detectors.options import options_of
from openood_sandi.detectors.sandi import INFO, calibrated
from openood_sandi.detectors.sandi.calibrated import SandIC
from openood_sandi.detectors.sandi.detector import SandI

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's own is of Python 3.11

__all__ = ["SandICDetector", "SandIDetector"]


def _paper(info: openood_sandi.DetectorInfo) -> Paper:
    return Paper(title=info.title, venue=info.venue, year=info.year, url=info.url)


class _OfThisPackage(Detector):  # type: ignore[misc]
    """A detector of this package, made anew whenever its options are set."""

    _kind: ClassVar[type[SandI] | type[SandIC]]
    _scores_by: ClassVar[str]

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        if model is None:
            raise ModelNotSetException(
                f"{type(self).__name__} needs a model: it scores by the model's {self._scores_by}"
            )
        self.model = model
        self.options = options
        self._detector = self._kind(model, **options)

    def predict(self, x: Tensor) -> Tensor:
        """Scores (B,) of images ``x`` (B, C, H, W), larger = more out-of-distribution."""
        device = self.device
        _, score = self._detector(x if device is None else x.to(device))
        return score

    def get_hyperparameters(self) -> dict[str, Any]:
        options = options_of(self._kind) | self.options
        return {name: options[name] for name in self.hyperparameter_space}

    def set_hyperparameters(self, **options: Any) -> Self:
        """Set any options, those of ``hyperparameter_space`` and others; what needs a fit needs another one then."""
        self._detector = self._kind(self.model, **{**self.options, **options})
        self.options |= options
        return self


class SandIDetector(_OfThisPackage):
    """S&I with the options of :class:`openood_sandi.SandI`; the score is tau of Eq. 14. There is nothing to fit.

    Args:
        model: a classifier in eval mode that maps images (B, C, H, W) to logits (B, classes).
        options: as for :class:`openood_sandi.SandI`, checked at once.
    """

    info = DetectorInfo(
        paper=_paper(INFO),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )
    requires_fit = False
    _kind, _scores_by = SandI, "gradients"
    hyperparameter_space: ClassVar[dict[str, list[Any]]] = {
        "variant": ["Z", "A"],
        "splits": ["all", "last_stage"],
        "step_size": [1e-3, 1e-2],
    }

    def to(self, device: Any) -> SandIDetector:
        super().to(device)
        return self.set_hyperparameters()  # a fresh study of the network where it is now


class SandICDetector(_OfThisPackage):
    """S&I-C, this package's calibrated score (not the paper's), with the options of :class:`openood_sandi.SandIC`.

    Args:
        model: a classifier in eval mode that maps images (B, C, H, W) to logits (B, classes).
        options: as for :class:`openood_sandi.SandIC`, checked at once.
    """

    info = DetectorInfo(
        paper=_paper(calibrated.INFO),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )
    requires_fit = True
    _kind, _scores_by = SandIC, "activations"
    hyperparameter_space: ClassVar[dict[str, list[Any]]] = {
        "base": ["max_logit+fdbd", "max_logit", "energy"],
        "gate": [1.0, 1.5, 2.0],
    }
    _detector: SandIC

    def fit(self, data_loader: Any, val: Any = None) -> SandICDetector:
        """Fit to training images, and take means and deviations from ``val``, or from a tenth of them without it.

        Both are loaders of images (B, C, H, W) and labels (B,), transformed as test images are.
        """
        self._detector.fit(data_loader, val)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Scores (B,) of images ``x`` (B, C, H, W), larger = more out-of-distribution.

        Raises:
            RequiresFittingException: there has been no :meth:`fit` since the options were set.
        """
        if not self._detector.statistics:
            raise RequiresFittingException("SandICDetector has no prototypes: call fit first")
        return super().predict(x)
