"""Which of Z and A scores a network, and where it is split for that.

The paper takes Z (Eq. 11) up to 100 classes and A (Eq. 12-13) above. Z reads exact zeros of gradients, which rectifiers
make and smooth activations (GELU, SiLU) do not: there all images would have the same score. So "auto" takes Z only
where zeros are there to be read. That is tried on a seeded noise image, never on the caller's: the choice is a
function of the network and the shape of its images, the same in every process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from openood_sandi.detectors.sandi.losses import LogitsPlan
from openood_sandi.engine.network import SplitNetwork
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.splits import RecordedNetwork
from openood_sandi.engine.walk import Observer, Walk

__all__ = ["VariantChoice"]

_log = logging.getLogger(__name__)

_MOST_CLASSES_OF_Z = 100
#: A split has zeros to read if at least this share of its gradient is zero, and not all of it.
_ZEROS = 0.05
#: "auto" takes Z if at least this share of the splits have.
_SPLITS_WITH_ZEROS = 0.5


class VariantChoice:
    """The choice of variant, split points and feature map, made when the network is first recorded.

    Args:
        variant: "auto", "Z" or "A".
        splits: as wanted; "auto" is "all" for Z and "last_stage" for A.
        feature: A's F as wanted.

    Attributes:
        variant: "Z" or "A" once it is chosen.
        feature: F where the variant is A.
    """

    def __init__(self, variant: str, splits: str | Sequence[str], feature: str) -> None:
        self.variant = variant
        self.feature: Split | None = None
        self.reads_few_zeros = False
        """Whether Z was asked for where there is little to read, and a warning said so."""
        self._wanted = variant, splits, feature

    def __call__(self, network: SplitNetwork, found: RecordedNetwork, probe: Tensor) -> Sequence[Split]:
        """The split points, in call order, from a pass over the noise images ``probe`` (b, C, H, W)."""
        wanted, names, _ = self._wanted
        self.feature = None
        if wanted == "A" or (wanted == "auto" and network.classes > _MOST_CLASSES_OF_Z):
            splits = self._for_a(found)
        else:
            splits = found.splits(names, default="all")
            share = _share_with_zeros(network, splits, probe)
            if wanted == "auto" and share < _SPLITS_WITH_ZEROS:
                splits = self._for_a(found)
                _log.info('variant="auto" is A: %.0f %% of the split points have zero gradients to read', 100 * share)
            elif share < _SPLITS_WITH_ZEROS and not self.reads_few_zeros:
                self.reads_few_zeros = True
                _log.warning(
                    'variant="Z" reads exact zeros of gradients, and only %.0f %% of the split points of this network '
                    'have any; where none has, all images score alike. variant="A" or "auto" suits it',
                    100 * share,
                )
        self.variant = "Z" if self.feature is None else "A"
        named = f"{len(splits)} split points, {splits[0].name} to {splits[-1].name}"
        _log.info("S&I-%s with %s%s", self.variant, named, f", F {self.feature.name!r}" if self.feature else "")
        return splits

    def _for_a(self, found: RecordedNetwork) -> Sequence[Split]:
        _, names, feature = self._wanted
        self.feature = found.feature(feature)
        return found.before(self.feature, found.splits(names, default="last_stage"), names)


class _Zeros(Observer):
    """The share of each gradient that is zero."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def gradient(self, site: Site, gradient: Tensor) -> None:
        self.shares.append(float((gradient == 0).float().mean()))


def _share_with_zeros(network: SplitNetwork, splits: Sequence[Split], probe: Tensor) -> float:
    """The share of the split points whose gradient on the probe is zero here and there."""
    zeros = _Zeros()
    network.walk(probe, Walk(LogitsPlan(splits, "max_logit", "max_logit")), zeros, splits)
    return sum(_ZEROS <= share < 1 for share in zeros.shares) / len(splits)
