"""S&I-C, a calibrated score: this package's own, not the paper's.

The densities of Eq. 11 tell far-OOD where they are compared with what ID images do, and say nothing of near-OOD, which
the logits tell. So here the densities speak only where they exceed what ID data do:

    E_jk = share of positions where activation j lets channel k through         (:mod:`.activation_shares`)
    P_cj = unit vector along the mean of E_j / |E_j| over the training images of class c
    D    = - sum_j max_c cos(E_j, P_cj)           j: the last activation map of each of the last three stages
    Z    = sum_jk E_jk^2                          over all activation maps
    b    = m^ + f^                                m: - max logit, or the energy;  f: :mod:`.decision_boundaries`
    score = max(b^, -2) + max(0, D^ - q) + max(0, Z^ - q)

where ^ subtracts the mean and divides by the standard deviation over ID images that no prototype was computed from.
The floor keeps overconfident logits from outweighing the densities. One forward pass; nothing is differentiated.

Where classes have too few images, or no labels, there is one prototype a layer, and ``use_z="auto"`` adds Z only there.
With prototypes by class it costs near-OOD more than it gains on validation images, and counting all maps takes time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from openood_sandi.detectors.detector import Detector
from openood_sandi.detectors.info import DetectorInfo
from openood_sandi.detectors.options import plain_numbers, require_positive
from openood_sandi.detectors.sandi.activation_stages import Stages
from openood_sandi.detectors.sandi.calibrated_summary import Summaries, Summary
from openood_sandi.detectors.sandi.decision_boundaries import fdbd
from openood_sandi.detectors.sandi.share_prototypes import ShareSums, distance
from openood_sandi.engine import checks
from openood_sandi.engine.devices import Moved

__all__ = ["INFO", "SandIC"]

_log = logging.getLogger(__name__)

INFO = DetectorInfo(
    name="sandi_c",
    label="S&I-C",
    detector="openood_sandi.detectors.sandi.calibrated:SandIC",
    title="S&I-C, a calibrated score of this package (not in the S&I paper, whose densities it takes further)",
    venue="openood-sandi",
    year=2026,
    url="https://proceedings.mlr.press/v267/zhang25by.html",
    needs="training images",
    fitted=("prototypes", "feature_mean", "statistics"),
)

FLOOR = -2.0
FEW = 50
"""Means and deviations of fewer ID images than these are warned of."""

_ROUNDING = 1e-9
_BASES = ("max_logit+fdbd", "max_logit", "energy")
_SWITCH = ("auto", "always", "never")


class SandIC(Detector):
    """The S&I-C detector: ``pred, score = SandIC(net).fit(loader)(x)``, a larger score for OOD.

    Args:
        net: a classifier in eval mode.
        base: what the logits say: "max_logit+fdbd", "max_logit" or "energy". fDBD needs a linear last layer; without
            one it is left out, with a warning, and max logit alone remains.
        gate: q, by how many standard deviations D and Z must exceed their mean on ID images to count.
        use_z: whether Z counts: "always", "never", or "auto": where there is one prototype a layer.
        stages: "last_N", the last N stages of the network, or names of the modules that end them, as a list or
            separated by commas.

    Attributes:
        prototypes: {stage: (P, K_j)}, after :meth:`.detector.Detector.fit`, on the CPU in float64, as all of these.
        feature_mean: the mean of h over training images (D,); empty without a linear last layer.
        statistics: mean and standard deviation (2,) over ID images, by quantity. Options other than ``stages`` can be
            changed without another fit.
        z_gate, floor: q for Z where it is not D's, and the least that b^ counts; ``benchmarks/choose_constants.py``
            tries others.

    Raises:
        ValueError: an option is out of range; at the first batch, if the network calls no activation on maps.
    """

    fitted = INFO.fitted
    _summaries: Summaries | None

    @plain_numbers
    def __init__(
        self,
        net: nn.Module,
        *,
        base: str = "max_logit+fdbd",
        gate: float = 1.5,
        use_z: str = "auto",
        stages: str | Sequence[str] = "last_3",
    ) -> None:
        require_positive(gate=gate)
        for option, value, choices in (("base", base, _BASES), ("use_z", use_z, _SWITCH)):
            if value not in choices:
                raise ValueError(f"{option}={value!r}: expected one of {', '.join(map(repr, choices))}")
        self.options = {"base": base, "gate": gate, "use_z": use_z, "stages": stages}
        self.base, self.gate, self.use_z = base, gate, use_z
        self.z_gate: float | None = None
        self.floor = FLOOR
        self._net, self._stages, self._moved = checks.eager_network(net), Stages(stages), Moved()
        self._start()

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self._net

    @property
    def split_names(self) -> tuple[str, ...]:
        """The stages that D is taken over; known after the first batch."""
        return () if self._summaries is None else self._summaries.stages

    def _summary(self, x: Tensor) -> Summary:
        checks.require_images(x)
        checks.require_eval(self.net)
        if self._summaries is None:
            self._summaries = Summaries(self.net, x, self._stages)
        return self._summaries(x, with_z=not self.statistics or self._z_counts)

    # ------------------------------------------------------------------ fit

    def _start(self) -> None:
        self.prototypes: Mapping[str, Tensor] = {}
        self.feature_mean = torch.zeros(0, dtype=torch.double)
        self.statistics: Mapping[str, Tensor] = {}
        self._summaries = None
        self._sums: ShareSums | None = None
        self._feature_sum: Tensor | None = None

    def _learn(self, summary: Summary, labels: Tensor) -> None:
        if self._sums is None or self._feature_sum is None:
            self._sums = ShareSums(self._found.classes)
            self._feature_sum = summary.feature.new_zeros(summary.feature.shape[1], dtype=torch.double)
        self._sums.add(self._by_stage(summary.shares), labels)
        self._feature_sum += summary.feature.double().sum(0)

    def _settle(self, held: Summary) -> None:
        """Make prototypes of what was learnt, and means and deviations of summaries of other ID images."""
        if self._sums is None or self._feature_sum is None:
            raise ValueError("no training images: expected ID images that the network was trained on, for prototypes")
        if len(held.pred) < 2:
            raise ValueError(
                f"{len(held.pred)} ID image(s) for means and deviations, which no prototype is made of; expected {FEW} "
                "or more: give more images to fit, or val"
            )
        if len(held.pred) < FEW:
            _log.warning("means and deviations are of %d ID images, fewer than %d: they are rough", len(held.pred), FEW)
        self.prototypes = dict(zip(self._found.stages, self._sums.prototypes(), strict=True))
        self.feature_mean = (self._feature_sum / self._sums.images).cpu()
        values = self._values(held)
        self.statistics = {name: _statistics(value) for name, value in values.items()}
        if "fdbd" in values:
            self.statistics["max_logit+fdbd"] = _statistics(self._sum(values))
        self._sums = self._feature_sum = None

    # ------------------------------------------------------------------ score

    def _scored(self, summary: Summary) -> Tensor:
        if set(self.prototypes) != set(self._found.stages):
            fitted = f"prototypes are of {', '.join(self.prototypes)}" if self.prototypes else "no prototypes"
            raise RuntimeError(f"{fitted}, expected those of {', '.join(self._found.stages)}: call fit first")
        values = self._values(summary)
        score = self._base(values).clamp_min(self.floor)
        z_gate = self.gate if self.z_gate is None else self.z_gate
        for name, gate in [("d", self.gate), *([("z", z_gate)] if self._z_counts else [])]:
            score += (self._standard(name, values[name]) - gate).clamp_min(0)
        scores: Tensor = score.masked_fill(summary.max_logit.isnan(), math.nan)
        return scores

    def _values(self, summary: Summary) -> dict[str, Tensor]:
        """Both m, D, Z and, with a linear last layer, f, larger for OOD, (B,) each in float64."""
        stages = self._found.stages
        prototypes = [self._moved.to(stage, self.prototypes[stage], summary.max_logit) for stage in stages]
        found = {"max_logit": summary.max_logit, "energy": summary.energy}
        found |= {"d": distance(self._by_stage(summary.shares), prototypes), "z": summary.z}
        if len(self.feature_mean):
            mean = self._moved.to("feature_mean", self.feature_mean, summary.boundaries)
            found["fdbd"] = fdbd(summary.boundaries, summary.feature, mean)
        return found

    def _base(self, values: Mapping[str, Tensor]) -> Tensor:
        """b^, (B,)."""
        if self.base == "max_logit+fdbd" and "fdbd" in values:
            return self._standard(self.base, self._sum(values))
        name = self.base.removesuffix("+fdbd")
        return self._standard(name, values[name])

    def _sum(self, values: Mapping[str, Tensor]) -> Tensor:
        """m^ + f^, (B,)."""
        return self._standard("max_logit", values["max_logit"]) + self._standard("fdbd", values["fdbd"])

    def _standard(self, name: str, values: Tensor) -> Tensor:
        """Less the mean, over the standard deviation on ID images."""
        mean, deviation = map(float, self.statistics[name])
        return (values - mean) / deviation

    def _by_stage(self, shares: Tensor) -> Sequence[Tensor]:
        return torch.split(shares, self._found.widths, 1)

    @property
    def _found(self) -> Summaries:
        assert self._summaries is not None, "a summary was made before"
        return self._summaries

    @property
    def _z_counts(self) -> bool:
        one = all(len(prototypes) == 1 for prototypes in self.prototypes.values())
        return self.use_z == "always" or (self.use_z == "auto" and one)


def _statistics(values: Tensor) -> Tensor:
    """Mean and standard deviation (2,); of what is constant but for rounding the latter is 1, as it tells nothing."""
    deviation = values.std(correction=0)
    varies = deviation > _ROUNDING * values.abs().max().clamp_min(1)
    return torch.stack([values.mean(), deviation if varies else torch.ones_like(deviation)])
