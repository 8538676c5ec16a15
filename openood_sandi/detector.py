"""S&I as a detector: a network and options in, predictions and out-of-distribution scores out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from openood_sandi import memory, statistics
from openood_sandi.attack import Attack, Loss, Objective, cross_entropy, log_softmax_sum, max_logit, top_channels
from openood_sandi.paths import Observer, walk_input, walk_splits
from openood_sandi.replay import ReplayError, Site, Tape
from openood_sandi.splitting import Split, survey

__all__ = ["SandI"]

_CHOICES = {
    "variant": ("auto", "Z", "A"),
    "combine": ("count", "union", "intersection"),
    "attribution": ("max_logit", "cross_entropy"),
    "ascent": ("cross_entropy", "max_logit"),
    "top_over": ("channels", "labels"),
}


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
        ascent: L_step, which the path ascends: "cross_entropy" of the class predicted on the clean input, or "max_logit"; with the
            latter A ascends the function that it attributes, as the released code does.
        top_fraction: the "top 90 %" of Eq. 12, at least one.
        top_over: of what: "channels" of F, by the gradient of the summed logits, as released; or "labels", by logit, as
            the paper words it: log-softmax is then summed over those labels, and F over all channels.
        splitting: False attacks the input instead of every split (the paper's ablation without layer splitting).
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
        memory_fraction: float = 0.5,
    ) -> None:
        given = dict(variant=variant, combine=combine, attribution=attribution, ascent=ascent, top_over=top_over)
        for option, value in given.items():
            if value not in _CHOICES[option]:
                raise ValueError(f"{option}={value!r}: expected one of {', '.join(map(repr, _CHOICES[option]))}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: expected a whole number of gradients, at least 1")
        _require_positive(step_size=step_size, epsilon=epsilon, top_fraction=top_fraction, memory_fraction=memory_fraction)
        if math.isinf(step_size):
            raise ValueError("step_size=inf: expected a finite step")
        for option, share in (("top_fraction", top_fraction), ("memory_fraction", memory_fraction)):
            if share > 1:
                raise ValueError(f"{option}={share!r}: expected a share, at most 1")
        self.net = _unwrapped(net)
        self.variant, self.combine, self.top_fraction, self.top_over = variant, combine, top_fraction, top_over
        self.attribution, self.ascent, self.splitting = attribution, ascent, splitting
        self.attack = Attack(steps, step_size, epsilon)
        self.memory_fraction = memory_fraction
        self._wanted_splits, self._wanted_feature = splits, feature
        self._splits: tuple[Split, ...] | None = None
        self._feature: Split | None = None

    # ------------------------------------------------------------------ public

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes and scores of a batch.

        Args:
            x: images (B, C, H, W) as the network expects them, on its device.

        Returns:
            ``pred`` (B,) int64 and ``tau`` (B,) in the logits' dtype: Eq. 14, larger = more out-of-distribution. An
            image whose logits are not finite has tau = NaN.
        """
        logits, densities = self._score(x)
        tau = statistics.score(densities, logits.dtype)
        return logits.argmax(1), tau.masked_fill(~logits.isfinite().all(1), math.nan)

    def densities(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: E (B, K)}, Eq. 11 for Z or Eq. 13 for A, in float64, for images ``x`` (B, C, H, W)."""
        return self._score(x)[1]

    def explain(self, x: Tensor) -> dict[str, Tensor]:
        """{split name: (B, R, S)}: the attribution maps A_j of Eq. 10 (of L_attr on the logits), summed over channels."""
        with self._ready(x) as (x, splits, _):
            observer = statistics.AttributionMaps(splits)
            self._walk(x, [split.site for split in splits], None, self._plan_logits(splits), observer)
        return observer.maps()

    @property
    def split_names(self) -> tuple[str, ...]:
        """The split points in call order; known after the first batch."""
        if self._splits is None:
            raise RuntimeError("the split points are found on the first batch; score one first")
        return tuple(split.name for split in self._splits)

    # ------------------------------------------------------------------ scoring

    def _score(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self._ready(x) as (x, splits, feature):
            observer: statistics.NonZeroDensity | statistics.ChannelAverage
            if feature is None:
                observer = statistics.NonZeroDensity(splits, self.attack.steps, self.combine)
                logits = self._walk(x, [s.site for s in splits], None, self._plan_logits(splits), observer)
            else:
                observer = statistics.ChannelAverage(splits, feature, self.attack.steps)
                sites = [split.site for split in (*splits, feature)]
                logits = self._walk(x, sites, feature.site, self._plan_feature(splits, feature), observer)
        return logits, observer.densities()

    def _walk(self, x, sites, feature, plan, observer) -> Tensor:  # type: ignore[no-untyped-def]
        tape = Tape(self.net, sites)
        if not self.splitting:
            return walk_input(tape, x, feature, plan, self._ascent, self.attack, observer)
        budget = int(self.memory_fraction * memory.free_memory(x.device))
        return walk_splits(tape, x, feature, plan, self.attack, observer, budget)

    def _ascent(self, logits: Tensor) -> Loss:
        return max_logit if self.ascent == "max_logit" else cross_entropy(logits.detach().argmax(1))

    def _plan_logits(self, splits: Sequence[Split]):  # type: ignore[no-untyped-def]
        """Z's objective, and explain's: L_attr and L_step on the logits, the same for every split."""

        def plan(logits: Tensor, feature: Tensor | None) -> dict[Site, Objective]:
            losses: dict[str, Loss] = {"max_logit": max_logit, "cross_entropy": cross_entropy(logits.detach().argmax(1))}
            objective = Objective(losses[self.attribution], losses[self.ascent])
            return {split.site: objective for split in splits}

        return plan

    def _plan_feature(self, splits: Sequence[Split], feature: Split):  # type: ignore[no-untyped-def]
        """A's objectives: F at the splits, log-softmax at F."""

        def plan(logits: Tensor, value: Tensor | None) -> dict[Site, Objective]:
            assert value is not None
            channels = value.shape[feature.channel_axis]
            weights = logits.new_ones(len(logits), channels)
            labels = torch.ones_like(logits)
            if self.top_over == "labels":
                labels = _top(logits.detach(), self.top_fraction)
            elif self.top_fraction < 1:
                (slope,) = torch.autograd.grad(logits.sum(), value, retain_graph=True)
                slope = slope.movedim(feature.channel_axis, 1).unsqueeze(-1).flatten(2).mean(2)
                weights = _top(slope, self.top_fraction)
            inner = top_channels(weights, feature.channel_axis)
            outer = log_softmax_sum(labels)
            if self.ascent == "max_logit":
                objectives = Objective(inner, inner), Objective(outer, outer)
            else:
                ascent = self._ascent(logits)
                objectives = Objective(inner, ascent), Objective(outer, ascent)
            return {**{split.site: objectives[0] for split in splits}, feature.site: objectives[1]}

        return plan

    # ------------------------------------------------------------------ the network

    @contextmanager
    def _ready(self, x: Tensor) -> Iterator[tuple[Tensor, tuple[Split, ...], Split | None]]:
        """The network with its parameters frozen, gradients enabled, and the split points known."""
        _require_images(x)
        _require_eval(self.net)
        trainable = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x.detach()
            try:
                for parameter in trainable:
                    parameter.requires_grad_(False)
                if self._splits is None:
                    self._find_splits(x[:2])
                assert self._splits is not None
                yield x, self._splits, self._feature
            finally:
                for parameter in trainable:
                    parameter.requires_grad_(True)

    def _find_splits(self, x: Tensor) -> None:
        found, recorded = survey(self.net, x)
        with torch.no_grad():
            plain = self.net(x)
        _require_same(plain, recorded)
        uses_feature = self.variant == "A" or (self.variant == "auto" and recorded.shape[1] > 100)
        splits = found.splits(self._wanted_splits, default="last_stage" if uses_feature else "all")
        if uses_feature:
            self._feature = found.feature(self._wanted_feature)
            splits = tuple(split for split in splits if split.site != self._feature.site)
            if not splits:
                raise ValueError(f"splits holds nothing but F ({self._feature.name!r}); name split points before it")
        self._splits = splits


def _top(values: Tensor, fraction: float) -> Tensor:
    """1 at the floor(fraction K) largest of ``values`` (B, K) in each row, one at least, and 0 elsewhere."""
    count = max(1, math.floor(fraction * values.shape[1]))
    return torch.zeros_like(values).scatter_(1, values.topk(count, dim=1).indices, 1.0)


def _unwrapped(net: nn.Module) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is {type(net).__name__}, expected an eager torch.nn.Module")
    while True:
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        elif isinstance(getattr(net, "_orig_mod", None), nn.Module):  # torch.compile
            net = net._orig_mod  # type: ignore[assignment]
        else:
            break
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError("net is a TorchScript module, whose layers cannot be split; pass the eager network it came from")
    return net


def _require_positive(**options: float) -> None:
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{option}={value!r}: expected a positive number")


def _require_images(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, expected a tensor of images (B, C, H, W)")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"x is {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}, expected floating-point images "
            "(B, C, H, W), normalised as the network was trained"
        )
    if len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: the batch is empty")


def _require_eval(net: nn.Module) -> None:
    random = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    training = [name for name, module in net.named_modules() if module.training and isinstance(module, random)]
    if training:
        raise ValueError(f"the network is in train mode (layer {training[0]!r}); call net.eval() first")


def _require_same(plain: Tensor, recorded: Tensor) -> None:
    """The recorded forward must be the network's own: that finds randomness and writes through views."""
    if not isinstance(plain, Tensor) or plain.dim() != 2 or not plain.is_floating_point():
        what = f"shape {tuple(plain.shape)}" if isinstance(plain, Tensor) else type(plain).__name__
        raise ReplayError(f"the network returns {what}, expected logits (B, classes); wrap it so that it returns those")
    tolerance = 1e3 * torch.finfo(plain.dtype).eps
    if not torch.allclose(plain, recorded, rtol=tolerance, atol=tolerance * float(plain.abs().max()), equal_nan=True):
        raise ReplayError(
            "two passes over the same images differ: the network is random in eval mode (dropout that stays active, "
            "sampling), or writes into a slice of a tensor that it uses again; make its forward deterministic "
            "and out of place there"
        )
