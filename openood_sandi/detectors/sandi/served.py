"""S&I-C for compiled serving code: a module from images to classes, scores and shares, without hooks or state.

>>> served = ServedSandIC(detector, images)
>>> with torch.no_grad():
...     shapes = ({0: torch.export.Dim("batch", min=2, max=65536)},)
...     program = torch.export.export(served, (images,), strict=False, dynamic_shapes=shapes)
>>> torch.export.save(program, "detector.pt2")        # or torch.compile(program.module())
>>> pred, score, shares = program.module()(others)    # needs torch alone

The activations are found once, when this is made; the traced graph has their masks, and what is counted of them, as
operators of its own beside those of the network. ``strict=False`` has torch trace the calls as they are made.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from openood_sandi.detectors.sandi.calibrated import SandIC
from openood_sandi.engine.devices import exact_device

__all__ = ["ServedSandIC"]


class ServedSandIC(nn.Module):
    """A fitted S&I-C detector as a module to export and compile.

    Scores are those of the detector, and stay so if that is fitted anew: its means, deviations and prototypes are
    constants here. Compiled code may differ from them by its own rounding.

    Args:
        detector: after :meth:`.detector.Detector.fit`.
        x: some images (B, C, H, W) of the size that is to be served, on the network's device, where it will stay.

    Raises:
        RuntimeError: the detector has not been fitted.
        ValueError: the device has no float64, which the scores are computed in.
    """

    def __init__(self, detector: SandIC, x: Tensor) -> None:
        super().__init__()
        if not detector.statistics:
            raise RuntimeError("there is nothing to serve yet: call fit first")
        if exact_device(x.device) != x.device:
            raise ValueError(f"{x.device} has no float64, which the scores of S&I-C are computed in; serve on the CPU")
        self.net = detector.net
        self._detector = copy.copy(detector)
        constants = {name: (float(mean), float(deviation)) for name, (mean, deviation) in detector.statistics.items()}
        self._detector.statistics = constants  # type: ignore[assignment]  # no tensors, which a graph would look into
        self._detector(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is told of images ``x`` (B, C, H, W).

        Returns:
            Predicted classes (B,) int64; scores (B,) float64, larger for OOD, NaN where the logits are not finite; and
            the shares E_j of the activations that end the stages, side by side (B, K_1 + K_2 + ...), float32: the means
            of their masks.
        """
        summary = self._detector._found(x, with_z=self._detector._z_counts)
        return summary.pred, self._detector._scored(summary), summary.shares
