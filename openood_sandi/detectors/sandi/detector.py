"""S&I as a detector: a network and options in, predictions and out-of-distribution scores out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi.detectors import options as options_
from openood_sandi.detectors.detector import Detector, Score, Scores
from openood_sandi.detectors.sandi.bounds import Bounds
from openood_sandi.detectors.sandi.decisions import decide, is_ood
from openood_sandi.detectors.sandi.densities import AttributionMaps, ChannelAverage, score
from openood_sandi.detectors.sandi.first_look import tells_apart
from openood_sandi.detectors.sandi.losses import LogitsPlan, channel_average_plan, loss_on_logits
from openood_sandi.detectors.sandi.readable import Densities
from openood_sandi.detectors.sandi.variants import VariantChoice
from openood_sandi.detectors.sandi.z_scores import ZScores
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.network import SplitNetwork
from openood_sandi.engine.walk import Loss, Walk

__all__ = ["SandI"]

_log = logging.getLogger(__name__)

_READ_BY = {
    "Z": {"attribution", "combine", "precision", "rectifier_shortcut"},
    "A": {"feature", "top_fraction", "top_over", "denominator"},
}
"""Options that only one variant's scores depend on."""


class SandI(Detector):
    """The S&I out-of-distribution detector (Zhang et al., "Splitting & Integrating", ICML 2025) for one network.

    ``pred, tau = SandI(net)(x)``: the predicted class and the score of Eq. 14, larger for out-of-distribution inputs.
    The network is used as it is: nothing is trained, and its mode, flags, hooks and buffers are left as found.

    Args:
        net: a classifier in eval mode that maps images (B, C, H, W) to logits (B, classes). ``DataParallel``,
            ``DistributedDataParallel`` and ``torch.compile`` wrappers are looked through.
        logits: a function that takes the logits (B, classes) out of what ``net`` returns, where that is an object, a
            tuple or a dictionary: ``lambda output: output.logits`` for networks of Hugging Face's transformers.
        variant: "Z", the density of non-zero gradients (Eq. 11), "A", channel averages (Eq. 12-13), or "auto": as in
            the paper Z up to 100 classes and A above, but A as well where gradients are hardly ever zero, as Z would
            score all images alike there (:mod:`.variants`).
        splits: the split points: "all" (every normalisation layer), "last_stage" (those of the last stage), module
            names and globs such as "layer4.*", as a list or separated by commas. "name#2" is the second call of
            a module. "auto" is "all" for Z and "last_stage" for A. Networks without normalisation layers are
            split at the inputs of their activations.
        feature: A's feature map F: a module's name, or "auto" for the last spatial one.
        steps: T, the number of gradients taken along each path; 1 is GAIA (Chen et al., NeurIPS 2023).
        step_size: eta of Eq. 9.
        epsilon: the radius of Eq. 4's L2 ball; infinite, the default, for none.
        stop_at_flip: True stops the path of an image where the class is another than the clean one, as Eq. 3 has it:
            it takes no further step, and later gradients are those where it stopped. The released code goes on.
        combine: Z over the T gradients: "count" the non-zero ones, or the "union" or "intersection" of positions.
        attribution: L_attr, whose gradient is attributed by Z and :meth:`explain`: "max_logit" or "cross_entropy".
        ascent: L_step, which the path ascends: "cross_entropy" of the class predicted on the clean input, or
            "max_logit"; with the latter A ascends the function that it attributes, as the released code does.
        top_fraction: the "top 90 %" of Eq. 12, at least one.
        top_over: of what: "channels" of F, by the gradient of the summed logits, as released; or "labels", by logit, as
            the paper words it: log-softmax is then summed over those labels, and F over all channels.
        denominator: of Eq. 13: "mean", one number an image, over all channels of F, as released; or "channel", one for
            each channel of F, as the paper's indices read, for splits that have as many channels as F.
        splitting: False attacks the input instead of every split (the paper's ablation without layer splitting).
        rectifier_shortcut: whether Z may read the patterns of gradients off rectifiers' masks, for the images where
            these prove them (:mod:`.rectifiers`); False computes every gradient.
        precision: of Z: "exact", or "bounded", where tau is the middle of :meth:`bounds`, which cost one forward pass:
            off by ``max_error`` at most for the share ``proved_share`` of the images, and as far as anyone has seen
            for the others.
        memory_fraction: the share of the device's free memory that a batch's replays may plan for.

    Raises:
        ValueError, TypeError: for an option out of range, or split points that the network does not have.
        ReplayError: where the network cannot be split; the message says where and what to do.
    """

    @options_.plain_numbers
    def __init__(
        self,
        net: nn.Module,
        logits: Callable[[Any], Tensor] | None = None,
        *,
        variant: str = "auto",
        splits: str | Sequence[str] = "auto",
        feature: str = "auto",
        steps: int = 2,
        step_size: float = 1e-3,
        epsilon: float = math.inf,
        stop_at_flip: bool = False,
        combine: str = "count",
        attribution: str = "max_logit",
        ascent: str = "cross_entropy",
        top_fraction: float = 0.9,
        top_over: str = "channels",
        denominator: str = "mean",
        splitting: bool = True,
        rectifier_shortcut: bool = True,
        precision: str = "exact",
        memory_fraction: float = 0.5,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "net", "logits")}
        options_.require_choice(
            variant=variant,
            combine=combine,
            attribution=attribution,
            ascent=ascent,
            top_over=top_over,
            denominator=denominator,
            precision=precision,
        )
        options_.require_count(steps=steps)
        options_.require_positive(step_size=step_size, epsilon=epsilon)
        options_.require_share(top_fraction=top_fraction, memory_fraction=memory_fraction)
        options_.require_switch(splitting=splitting, stop_at_flip=stop_at_flip, rectifier_shortcut=rectifier_shortcut)
        options_.require_names(splits=splits)
        options_.require_name(feature=feature)
        self.options = options
        self.combine, self.top_fraction, self.top_over, self.denominator = combine, top_fraction, top_over, denominator
        self.attribution, self.ascent, self.splitting = attribution, ascent, splitting
        self.attack = Attack(steps, step_size, epsilon, stop_at_flip)
        self.rectifier_shortcut, self.precision = rectifier_shortcut, precision
        self._choice = VariantChoice(variant, splits, feature)
        self._network = SplitNetwork(net, logits, splits=self._choice, memory_fraction=memory_fraction)
        losses = attribution, ascent, self._input_ascent()
        self._z = ZScores(self._network, self.attack, combine, *losses, reads=rectifier_shortcut)
        self._told_apart = self._told_unread = False

    # ------------------------------------------------------------------ public

    def _summary(self, x: Tensor) -> Score:
        """Predicted classes and scores, tau of Eq. 14, in float32, in float64 where the logits are.

        An image whose logits are not finite has tau = NaN; :meth:`not_finite` says why. The others are not affected.

        Raises:
            ValueError, TypeError: the images are not what the network takes, or the network is in train mode.
            ReplayError: the network cannot be split.
            torch.cuda.OutOfMemoryError: on any device, one image with one split at a time does not fit.
        """
        work = self._tau if self.precision == "exact" else self._middle
        pred, tau, finite = self._network.over(x, work, _columns)
        if not finite:
            _log.warning("tau is NaN: %s", "; ".join(self.not_finite(x)))
        if not self._told_unread:
            self._tell_unread()
        if not self._told_apart:
            why_zero = partial(self._why_zero, x)
            self._told_apart = tells_apart(x, tau, self, self._choice.reads_few_zeros, why_zero)
        return Score(pred, tau)

    def _scored(self, summary: Score) -> Tensor:
        return summary.score

    def bounds(self, x: Tensor) -> Bounds:
        """``pred, low, high``: predicted classes (B,) and bounds on tau, (B,) each, of images ``x`` (B, C, H, W).

        Z's take one forward pass, for any T; ``proved`` of the result tells of which images ``low`` is proved to be
        one (``high`` always is). Where there is nothing to read bounds from (A, ``splitting=False``, a finite
        ``epsilon``, networks without rectifiers behind all splits), tau is computed: low = high.

        Raises:
            ValueError, TypeError, ReplayError, torch.cuda.OutOfMemoryError: as of a call.
        """
        return self._network.over(x, self._bounds, Bounds.joined)

    def is_ood(self, x: Tensor, hard: bool = True) -> Tensor:
        """Whether tau of images ``x`` (B, C, H, W) exceeds the threshold, (B,) bool.

        With ``precision="exact"`` only the images are computed whose :meth:`bounds` leave it open; what is decided is
        what tau decides wherever it is further from the threshold than scores in batches of other sizes are apart.

        Args:
            x: the images.
            hard: whether the lower end has to be proved; False takes estimates for bounds as well, and computes
                only what straddles the threshold.

        Raises:
            RuntimeError: there is no threshold yet.
        """
        self.image_shape = tuple(x.shape[1:])
        return super().is_ood(x) if self.precision != "exact" else is_ood(self, x, self._known_threshold(), hard)

    def decide(self, loader: Any, hard: bool = True) -> Scores:
        """:meth:`is_ood` of a whole data set, for as few computed gradients as that takes.

        The images whose bounds leave it open are gathered across batches and computed together.

        Args:
            loader: images as ``fit`` takes them, on any device.
            hard: as for :meth:`is_ood`.

        Returns:
            Predicted classes, decisions, and scores: tau where it was computed, else the middle of its bounds.

        Raises:
            RuntimeError: there is no threshold yet.
            ValueError: there are no images.
        """
        if self.precision != "exact":
            return self.score(loader, progress=False)
        return decide(self, loader, self._known_threshold(), self._device(), hard)

    def densities(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: E (B, K)}, Eq. 11 for Z or Eq. 13 for A, in float64, for images ``x`` (B, C, H, W)."""
        return self._network.over(x, self._densities, lambda parts: _joined([densities for _, densities in parts]))

    def explain(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: (B, R, S)}: the maps A_j of Eq. 10 (of L_attr on the logits), summed over channels."""
        return self._network.over(x, self._maps, _joined)

    def not_finite(self, x: Tensor) -> list[str]:
        """For each of the images ``x`` (B, C, H, W) that has no score, where NaN or infinity comes from."""
        return self._network.not_finite(x)

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self._network.net

    @property
    def variant(self) -> str:
        """ "Z" or "A"; "auto" until the first batch, on which it is chosen."""
        return self._choice.variant

    @property
    def split_names(self) -> tuple[str, ...]:
        """The split points in call order; known after the first batch."""
        return tuple(split.name for split in self._network.splits)

    @property
    def feature_name(self) -> str | None:
        """The name of A's feature map F, known after the first batch; None for Z."""
        return None if self._choice.feature is None else self._choice.feature.name

    @property
    def proved_share(self) -> float:
        """The share of the images so far whose patterns Z read off rectifiers, as proved there; the others, and all
        images of A, had their gradients computed. With ``precision="bounded"``: the share of the images so far that
        ``max_error`` holds for."""
        return (self._z if self.precision == "exact" else self._z.told).proved_share

    @property
    def max_error(self) -> float:
        """With ``precision="bounded"``, how far from tau the scores so far are at most; 0 with "exact"."""
        return self._z.told.max_error

    def remark(self) -> str:
        return self._z.told.remark() if self.precision == "bounded" else ""

    def _told(self) -> dict[str, Any]:
        told = {**super()._told(), "variant": self.variant}
        if self._network.is_split:
            names = self.split_names
            told["splits"] = list(names) if len(names) <= 4 else [*names[:2], "...", *names[-2:]]
            told["feature"] = self.feature_name
        return told

    # ------------------------------------------------------------------ scoring

    def _tau(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted classes, scores, and whether logits are finite, (B,) each."""
        logits, densities = self._densities(x)
        finite = logits.isfinite().all(1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.argmax(1), score(densities, dtype).masked_fill(~finite, math.nan), finite

    def _middle(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted classes, the middles of the bounds, and whether these are finite, (B,) each."""
        bounds = self._bounds(x)
        self._z.told.take(bounds)
        return bounds.pred, bounds.middle, bounds.high.isfinite()

    def _bounds(self, x: Tensor) -> Bounds:
        bounds = self._z.bounds(x) if self._choice.feature is None else None
        return Bounds.exactly(*self._tau(x)[:2]) if bounds is None else bounds

    def _densities(self, x: Tensor) -> Densities:
        return self._z.densities(x) if self._choice.feature is None else self._channel_averages(x)

    def _channel_averages(self, x: Tensor) -> Densities:
        """Logits and densities of A."""
        feature = self._choice.feature
        assert feature is not None
        splits = self._network.splits
        average = ChannelAverage(splits, feature, self.attack.steps, self.denominator)
        plan = channel_average_plan(splits, feature, self.ascent, self.top_fraction, self.top_over)
        walk = Walk(plan, self.attack, feature.site, self._input_ascent())
        logits = self._network.walk(x, walk, average, (*splits, feature))
        return logits, average.densities()

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        splits = self._network.splits
        observer = AttributionMaps(splits)
        plan = LogitsPlan(splits, self.attribution, self.ascent)
        self._network.walk(x, Walk(plan, self.attack, None, self._input_ascent()), observer)
        return observer.maps()

    def _input_ascent(self) -> Callable[[Tensor], Loss] | None:
        return None if self.splitting else partial(loss_on_logits, self.ascent)

    def _why_zero(self, x: Tensor) -> str:
        """Why all scores are zero though gradients are not; empty where these are."""
        if self.variant != "Z" or self.combine != "intersection" or not self._network.over(x, self._z.reads_any, any):
            return ""
        return (
            "combine='intersection' scores every image of the first batch 0: no position has a non-zero gradient at "
            f"all of the {self.attack.steps} steps, though there are such gradients; take combine='count' or 'union', "
            "fewer steps or a smaller step_size"
        )

    def _tell_unread(self) -> None:
        """Warns, once, of options that were set and that the variant does not read."""
        self._told_unread = True
        defaults = options_.options_of(type(self))
        unread = _READ_BY["A" if self.variant == "Z" else "Z"] & defaults.keys()
        given = [f"{name}={self.options[name]!r}" for name in sorted(unread) if self.options[name] != defaults[name]]
        if given:
            _log.warning("S&I-%s does not read %s", self.variant, ", ".join(given))


def _columns(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, bool]:
    """Classes and scores of all parts, and False if one is seen not to be finite."""
    pred, tau, finite = map(torch.cat, zip(*parts, strict=True))
    return pred, tau, finite.device.type != "cpu" or bool(finite.all())  # on a GPU, to look would be to wait for it


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of a batch as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
