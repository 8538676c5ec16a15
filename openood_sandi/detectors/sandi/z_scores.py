"""S&I-Z at the split points of a network: its densities, exact, and bounds on its scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from openood_sandi.detectors.sandi.bounds import BoundedScores, Bounds, Told
from openood_sandi.detectors.sandi.losses import LogitsPlan
from openood_sandi.detectors.sandi.readable import Densities, ReadableNetworks
from openood_sandi.detectors.sandi.shortcut import ComputedDensities, ShortcutDensities
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.network import SplitNetwork
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.walk import Loss, Walk

__all__ = ["ZScores"]


class ZScores:
    """S&I-Z, made anew where the network is split at other points.

    Args:
        network: the split network.
        attack: the steps.
        combine: how Eq. 11 goes over the gradients.
        attribution: L_attr by its name, see :func:`~.losses.loss_on_logits`.
        ascent: L_step by its name.
        input_ascent: for the ablation without splitting, what the input ascends.
        reads: whether patterns may be read off rectifiers.

    Attributes:
        told: what the bounds that served as scores have told.
    """

    def __init__(
        self,
        network: SplitNetwork,
        attack: Attack,
        combine: str,
        attribution: str,
        ascent: str,
        input_ascent: Callable[[Tensor], Loss] | None,
        reads: bool,
    ) -> None:
        self._network, self._attack, self._combine = network, attack, combine
        self._losses, self._input_ascent = (attribution, ascent), input_ascent
        # a saturated cross-entropy has g = 0 anywhere
        self._reads = reads and input_ascent is None and attribution == "max_logit"
        self._splits: tuple[Split, ...] = ()
        self._walk: Walk | None = None
        self._exact: Callable[[Tensor], Densities] | None = None
        self._bounded: BoundedScores | None = None
        self.told = Told()

    @property
    def proved_share(self) -> float:
        """The share of the images so far whose densities were read."""
        return self._exact.proved_share if isinstance(self._exact, ShortcutDensities) else 0.0

    def densities(self, x: Tensor) -> Densities:
        """Logits (B, classes) and {split name: E (B, K)} of images (B, C, H, W). Inside ``network.over``."""
        self._prepare()
        assert self._exact is not None
        return self._exact(x)

    def bounds(self, x: Tensor) -> Bounds | None:
        """Bounds on the scores of images (B, C, H, W); None where there is nothing to read them from."""
        self._prepare()
        return None if self._bounded is None else self._bounded(x)

    def reads_any(self, x: Tensor) -> bool:
        """Whether any gradient along the paths from images (B, C, H, W) is not zero anywhere."""
        self._prepare()
        assert self._walk is not None
        _, densities = ComputedDensities(self._network, self._walk, "union")(x)
        return any(bool(density.any()) for density in densities.values())

    def _prepare(self) -> None:
        if self._exact is not None and self._splits is self._network.splits:
            return
        self._splits = self._network.splits
        plan = partial(LogitsPlan, self._splits)
        self._walk = Walk(plan(*self._losses), self._attack, None, self._input_ascent)
        self._exact = computed = ComputedDensities(self._network, self._walk, self._combine)
        if self._reads:
            readable, steps = ReadableNetworks(self._network, self._attack), plan(None, self._losses[1])
            self._exact = ShortcutDensities(computed, steps, readable)
            self._bounded = BoundedScores(computed, steps, readable)
