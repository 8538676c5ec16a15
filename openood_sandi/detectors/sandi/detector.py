"""S&I as a detector: a network and options in, predictions and out-of-distribution scores out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from openood_sandi.detectors.sandi.densities import AttributionMaps, ChannelAverage, NonZeroDensity, score
from openood_sandi.detectors.sandi.losses import Plan, ascended, channel_average_plan, logits_plan
from openood_sandi.detectors.sandi.masks import Gates
from openood_sandi.detectors.sandi.shortcut import ZScorer
from openood_sandi.engine import checks
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.errors import ReplayError
from openood_sandi.engine.memory import Room, free_memory, is_out_of_memory
from openood_sandi.engine.splits import Split, record_network
from openood_sandi.engine.tape import Site, Tape
from openood_sandi.engine.walk import Observer, walk_input, walk_splits

__all__ = ["SandI"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class SandI:
    """The S&I out-of-distribution detector (Zhang et al., "Splitting & Integrating", ICML 2025) for one network.

    ``pred, tau = SandI(net)(x)``: the predicted class and the score of Eq. 14, larger for out-of-distribution inputs.
    The network is used as it is: nothing is trained, and its mode, flags, hooks and buffers are left as found.

    Args:
        net: a classifier in eval mode that maps images (B, C, H, W) to logits (B, classes). ``DataParallel``,
            ``DistributedDataParallel`` and ``torch.compile`` wrappers are looked through.
        variant: "Z", the density of non-zero gradients (Eq. 11), "A", channel averages (Eq. 12-13), or "auto": Z up to
            100 classes, A above, as the paper does.
        splits: the split points: "all" (every normalisation layer), "last_stage" (those of the last stage), module
            names and globs such as "layer4.*", as a list or separated by commas. "name#2" is the second call of
            a module. "auto" is "all" for Z and "last_stage" for A. Networks without normalisation layers are
            split at the inputs of their activations.
        feature: A's feature map F: a module's name, or "auto" for the last spatial one.
        steps: T, the number of gradients taken along each path; 1 is GAIA (Chen et al., NeurIPS 2023).
        step_size: eta of Eq. 9.
        epsilon: the radius of Eq. 4's L2 ball; infinite, the default, for none.
        combine: Z over the T gradients: "count" the non-zero ones, or the "union" or "intersection" of positions.
        attribution: L_attr, whose gradient is attributed by Z and :meth:`explain`: "max_logit" or "cross_entropy".
        ascent: L_step, which the path ascends: "cross_entropy" of the class predicted on the clean input, or
            "max_logit"; with the latter A ascends the function that it attributes, as the released code does.
        top_fraction: the "top 90 %" of Eq. 12, at least one.
        top_over: of what: "channels" of F, by the gradient of the summed logits, as released; or "labels", by logit, as
            the paper words it: log-softmax is then summed over those labels, and F over all channels.
        splitting: False attacks the input instead of every split (the paper's ablation without layer splitting).
        rectifier_shortcut: whether Z may read the pattern of gradients off a rectifier's mask where the two were seen
            to agree (up to two steps, or "union"; see :mod:`.rectifiers`); False computes every gradient.
        memory_fraction: the share of the device's free memory that a batch's replays may plan for.

    Raises:
        ValueError, TypeError: for an option out of range, or split points that the network does not have.
        ReplayError: where the network cannot be split; the message says where and what to do.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        variant: str = "auto",
        splits: str | Sequence[str] = "auto",
        feature: str = "auto",
        steps: int = 2,
        step_size: float = 1e-3,
        epsilon: float = math.inf,
        combine: str = "count",
        attribution: str = "max_logit",
        ascent: str = "cross_entropy",
        top_fraction: float = 0.9,
        top_over: str = "channels",
        splitting: bool = True,
        rectifier_shortcut: bool = True,
        memory_fraction: float = 0.5,
    ) -> None:
        checks.require_choice(
            variant=variant, combine=combine, attribution=attribution, ascent=ascent, top_over=top_over
        )
        checks.require_count(steps=steps)
        checks.require_positive(step_size=step_size, epsilon=epsilon)
        checks.require_share(top_fraction=top_fraction, memory_fraction=memory_fraction)
        checks.require_switch(splitting=splitting, rectifier_shortcut=rectifier_shortcut)
        checks.require_names(splits=splits)
        checks.require_name(feature=feature)
        self.net = checks.eager_network(net)
        self.variant, self.combine, self.top_fraction, self.top_over = variant, combine, top_fraction, top_over
        self.attribution, self.ascent, self.splitting = attribution, ascent, splitting
        self.attack = Attack(steps, step_size, epsilon)
        self.memory_fraction = memory_fraction
        self._wanted_splits, self._wanted_feature = splits, feature
        self._splits: tuple[Split, ...] = ()  # found on the first batch
        self._feature: Split | None = None
        self._rectifier_shortcut = rectifier_shortcut
        self._z: ZScorer | None = None
        self._call_names: tuple[str, ...] = ()
        self._bytes_per_pixel = 0.0
        self._room = Room()

    # ------------------------------------------------------------------ public

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes and scores of a batch.

        Args:
            x: images (B, C, H, W) as the network expects them, on its device.

        Returns:
            ``pred`` (B,) int64 and ``tau`` (B,) in the logits' dtype: Eq. 14, larger = more out-of-distribution. An
            image whose logits are not finite has tau = NaN; :meth:`not_finite` says why. The others are not affected.

        Raises:
            ValueError, TypeError: the images are not what the network takes, or the network is in train mode.
            ReplayError: the network cannot be split.
            torch.cuda.OutOfMemoryError: on any device, one image with one split at a time does not fit.
        """
        pred, tau, finite = self._on_batch(x, self._scores)
        if not finite:
            _log.warning("tau is NaN: %s", "; ".join(self.not_finite(x)))
        return pred, tau

    def densities(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: E (B, K)}, Eq. 11 for Z or Eq. 13 for A, in float64, for images ``x`` (B, C, H, W)."""
        return self._on_batch(x, lambda x: _joined([densities for _, densities in self._parts(x)]))

    def explain(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: (B, R, S)}: the maps A_j of Eq. 10 (of L_attr on the logits), summed over channels."""
        return self._on_batch(x, self._maps)

    def not_finite(self, x: Tensor) -> list[str]:
        """For each of the images ``x`` (B, C, H, W) that has no score, where NaN or infinity comes from."""
        return checks.not_finite(self.net, x)

    @property
    def split_names(self) -> tuple[str, ...]:
        """The split points in call order; known after the first batch."""
        if not self._splits:
            raise RuntimeError("the split points are found on the first batch; score one first")
        return tuple(split.name for split in self._splits)

    # ------------------------------------------------------------------ scoring

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Predicted classes (B,), scores (B,), and False if one is seen not to be finite."""
        logits, tau = zip(*((logits, score(found, logits.dtype)) for logits, found in self._parts(x)), strict=True)
        joined = torch.cat(logits)
        finite = joined.isfinite().all(1)
        seen = joined.is_cuda or bool(finite.all())  # on a GPU, to look would be to wait for it
        return joined.argmax(1), torch.cat(tau).masked_fill(~finite, math.nan), seen

    def _parts(self, x: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Logits and densities of the batch, in parts that fit in memory."""
        if self._z is not None:
            self._z.check(x, self._cut)
        for part in self._cut(x):
            yield self._z.densities(part) if self._z is not None else self._channel_averages(part)

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        plan = logits_plan(self._splits, self.attribution, self.ascent)
        maps: list[dict[str, Tensor]] = []
        for part in self._cut(x):
            observer = AttributionMaps(self._splits)
            self._walk(part, self._splits, None, plan, self.attack, observer, Gates())
            maps.append(observer.maps())
        return _joined(maps)

    def _channel_averages(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and densities of A."""
        feature = self._feature
        assert feature is not None
        average = ChannelAverage(self._splits, feature, self.attack.steps)
        plan = channel_average_plan(self._splits, feature, self.ascent, self.top_fraction, self.top_over)
        logits, _, _ = self._walk(x, (*self._splits, feature), feature.site, plan, self.attack, average, Gates())
        return logits, average.densities()

    def _walk_z(
        self, x: Tensor, splits: Sequence[Split], attack: Attack, density: NonZeroDensity, gates: Gates
    ) -> tuple[Tensor, dict[Site, Tensor], bool]:
        plan = logits_plan(splits, self.attribution, self.ascent)
        return self._walk(x, splits, None, plan, attack, density, gates)

    def _walk(
        self, x: Tensor, splits: Sequence[Split], feature: Site | None, plan: Plan, attack: Attack, observer: Observer,
        gates: Gates,
    ) -> tuple[Tensor, dict[Site, Tensor], bool]:  # fmt: skip
        """Logits, images (B,) in doubt at each gate, and whether the network made the recorded calls."""
        sites = [split.site for split in splits]
        tape = Tape(self.net, [site for site in sites if gates.steps > 1 or site not in gates.at])
        doubtful: dict[Site, Tensor] = {}
        if self.splitting:
            logits, doubtful = walk_splits(tape, x, feature, plan, attack, observer, self._room, gates)
            self._room.lanes_now = 0
        else:
            logits = walk_input(tape, x, feature, plan, partial(ascended, self.ascent), attack, observer)
        same_calls = tape.call_names == self._call_names
        if not same_calls and any(split.site.module is None for split in splits):
            raise ReplayError(
                "this batch takes the network through other calls than the first one did, so its split points at "
                "functional calls cannot be found again; use one SandI for each image size, or name modules in splits"
            )
        return logits, doubtful, same_calls

    # ------------------------------------------------------------------ the network

    def _on_batch(self, x: Tensor, work: Callable[[Tensor], T]) -> T:
        """``work(x)`` once ``x`` is known to be images, cut to what fits in memory."""
        checks.require_images(x)
        checks.require_eval(self.net)
        return self._room.fit(lambda: self._with_gradients(x, work), x)

    def _with_gradients(self, x: Tensor, work: Callable[[Tensor], T]) -> T:
        """``work(x)`` with the split points known, parameters frozen and gradients enabled."""
        with _frozen(self.net), torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x.detach()
            try:
                if not self._splits:
                    for part in self._room.parts(x[:2], 2):
                        self._find_splits(part)
                        break
                return work(x)
            except Exception as error:
                if not isinstance(error, ReplayError) and not is_out_of_memory(error):
                    checks.require_accepted(self.net, x)
                raise

    def _cut(self, x: Tensor) -> Iterator[Tensor]:
        """The batch in parts: half the memory budget holds a part's recorded pass; the other half is for replays."""
        self._room.bytes = int(self.memory_fraction * free_memory(x.device)) // 2
        image = 3 * self._bytes_per_pixel * x[0].numel()  # results, what autograd saves beside them, gradients
        return self._room.parts(x, max(1, int(self._room.bytes / image)))

    def _find_splits(self, x: Tensor) -> None:
        checks.warn_of_range(x)
        found, recorded = record_network(self.net, x)
        with torch.no_grad():
            plain = self.net(x)
        checks.require_logits(plain)
        checks.require_same(plain, recorded)
        uses_feature = self.variant == "A" or (self.variant == "auto" and recorded.shape[1] > 100)
        splits = found.splits(self._wanted_splits, default="last_stage" if uses_feature else "all")
        feature = found.feature(self._wanted_feature) if uses_feature else None
        if feature is not None:
            splits = found.before(feature, splits, self._wanted_splits)
        else:
            # a saturated cross-entropy has g = 0 anywhere
            gated = self._rectifier_shortcut and self.splitting and self.attribution == "max_logit"
            self._z = ZScorer(splits, self.attack, self.combine, self._walk_z, found if gated else None)
        self._call_names = found.call_names
        self._bytes_per_pixel = found.size / x.numel()
        self._splits, self._feature = splits, feature


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """The parameters require no gradients."""
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of a batch as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
