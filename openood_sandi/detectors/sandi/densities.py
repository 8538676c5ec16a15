"""From the gradients along the paths to densities E (Eq. 11-13), the score tau (Eq. 14) and the maps of Eq. 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from openood_sandi.engine.devices import exact_dtype
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.walk import Observer

__all__ = ["AttributionMaps", "ChannelAverage", "NonZeroDensity", "count", "score", "shares"]


def score(densities: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """tau = sqrt(sum_{j,k} E_{j,k}^2), Eq. 14: (B,) in ``dtype`` from (B, K_j) for each split j."""
    return torch.cat(list(densities.values()), dim=1).square().sum(dim=1).sqrt().to(dtype)


def count(mask: Tensor) -> Tensor:
    """How many positions of a channel are not 0: (B, K) from (B, K, positions) of True or 1."""
    positions = mask.shape[2]
    if mask.dtype != torch.bool:
        return mask.sum(2)
    if mask.device.type == "cpu" and positions >= 64 and positions % 4 == 0:
        # four or eight positions at a time, each summed in a byte of its own, of which as many are added up as cannot
        # overflow it: up to forty times as fast
        words = mask.contiguous().view(torch.int32 if positions % 8 else torch.int64)
        at_once = _at_once(words.shape[2])
        if at_once > 8:
            sums = words.view(*words.shape[:2], -1, at_once).sum(3, dtype=words.dtype)
            counts: Tensor = sums.view(torch.uint8).sum(2, dtype=torch.int32)
            return counts
    return mask.sum(2, dtype=torch.int32)  # a third of the time of int64 on CPUs


def shares(counts: Mapping[Site, Tensor], of: Mapping[Site, int]) -> dict[str, Tensor]:
    """{split name: (B, K)}, in [0, 1]: ``counts`` (B, K) as shares ``of`` so many, correctly rounded."""
    # converted all at once, as there can be a hundred splits
    every = torch.cat(list(counts.values()), 1).to(exact_dtype(next(iter(counts.values())).device))
    parts = torch.split(every, [each.shape[1] for each in counts.values()], 1)
    return {site.name: part.div_(of[site]) for site, part in zip(counts, parts, strict=True)}


@cache
def _at_once(words: int) -> int:
    """The largest divisor that a byte can hold."""
    return max(count for count in range(1, 256) if words % count == 0)


class NonZeroDensity(Observer):
    """E of S&I-Z, Eq. 11: the share of a channel's positions and iterates i = 1..T whose gradient g_i is not zero.

    Args:
        splits: the split points.
        steps: T.
        combine: "count": the share of (position, i); "union": of positions where any g_i is not zero (GAIA-Z for every
            T, as an inactive unit never moves, but where a step brings to life an active one whose gradient was zero);
            "intersection": of positions where all are.
    """

    def __init__(self, splits: Sequence[Split], steps: int, combine: str) -> None:
        self._at = {split.site: split for split in splits}
        self._steps = steps
        self._combine = combine if steps > 1 else "count"  # of a single one, all are the same
        self._counts: dict[Site, Tensor] = {}
        self._masks: dict[Site, Tensor] = {}
        self._sizes: dict[Site, int] = {}

    def gradient(self, site: Site, gradient: Tensor) -> None:
        self.pattern(site, gradient != 0)

    def pattern(self, site: Site, mask: Tensor) -> None:
        """Takes in where g_i is not zero."""
        mask = self._at[site].by_channel(mask)
        self._sizes[site] = mask.shape[2]
        if self._combine == "count":
            found = count(mask)
            self._counts[site] = self._counts[site] + found if site in self._counts else found
        else:  # they wait for the other gradients, at a byte a position
            before = self._masks.get(site)
            if before is not None:
                mask = before | mask if self._combine == "union" else before & mask
            self._masks[site] = mask

    def counts(self) -> dict[Site, Tensor]:
        """How many (position, i), or positions, are counted in each channel, (B, K), in the order of the splits."""
        if self._combine != "count":
            return {site: count(self._masks[site]) for site in self._at}
        return {site: self._counts[site] for site in self._at}

    @property
    def sizes(self) -> dict[Site, int]:
        """The positions of each split."""
        return self._sizes

    def densities(self) -> dict[str, Tensor]:
        """{split name: (B, K)}, in [0, 1]."""
        times = self._steps if self._combine == "count" else 1
        return shares(self.counts(), {site: times * size for site, size in self._sizes.items()})


# Where the log-softmax does not depend on F at all, Eq. 13 has no value; this keeps it finite, and large.
_SMALLEST_OUTPUT = 1e-12


class ChannelAverage(Observer):
    """E of S&I-A, Eq. 12-13: a channel's mean gradient of F, over the square root of F's mean log-softmax gradient.

    E_{j,k} = |mean_{i,positions} d(sum of F)/dz_{j,k}| / sqrt(mean_c |mean_{i,positions} d(sum log-softmax)/dF_c|),
    the first at z_j^{i-1}, the second at F^{i-1}; "sum of F" is :func:`~.losses.top_channels`.

    Args:
        splits: the split points, without F.
        feature: F.
        steps: T.
        denominator: "mean", over the channels c of F as above; or "channel", where E_{j,k} has that of c = k alone.
    """

    def __init__(self, splits: Sequence[Split], feature: Split, steps: int, denominator: str = "mean") -> None:
        self._at = {split.site: split for split in (*splits, feature)}
        self._splits, self._feature, self._steps, self._denominator = splits, feature, steps, denominator
        self._sums: dict[Site, Tensor] = {}

    def gradient(self, site: Site, gradient: Tensor) -> None:
        mean = self._at[site].by_channel(gradient).mean(2)
        self._sums[site] = self._sums[site].add_(mean) if site in self._sums else mean

    def densities(self) -> dict[str, Tensor]:
        """{split name: (B, K)}, not negative."""
        exact = exact_dtype(self._sums[self._feature.site].device)
        mean = {site: (total.to(exact) / self._steps).abs() for site, total in self._sums.items()}
        output = mean[self._feature.site].sqrt()
        if self._denominator == "mean":
            output = mean[self._feature.site].mean(1, keepdim=True).sqrt()
        else:
            self._require_channels(mean, output.shape[1])
        if output.device.type == "cpu" and not output.any():
            raise ValueError(
                f"the gradient of log-softmax at F ({self._feature.name!r}) is zero for every image, so Eq. 13 has no "
                "value: the network's output is saturated (hard decisions, a softmax of large logits), or does not "
                "depend on F; pass the network that returns its logits, or name another feature"
            )
        output = output.clamp_min(_SMALLEST_OUTPUT)
        return {split.name: mean[split.site] / output for split in self._splits}

    def _require_channels(self, mean: Mapping[Site, Tensor], count: int) -> None:
        for split in self._splits:
            if mean[split.site].shape[1] != count:
                raise ValueError(
                    f'denominator="channel" divides channel by channel, but split point {split.name!r} has '
                    f"{mean[split.site].shape[1]} channels and F ({self._feature.name!r}) {count}; name splits with as "
                    'many, or take denominator="mean"'
                )


class AttributionMaps(Observer):
    """A_j of Eq. 10, sum_i (z_j^i - z_j^{i-1}) g_i, summed over channels."""

    wants_motion = True

    def __init__(self, splits: Sequence[Split]) -> None:
        self._at = {split.site: split for split in splits}
        self._latest: dict[Site, Tensor] = {}
        self._maps: dict[Site, Tensor] = {}

    def gradient(self, site: Site, gradient: Tensor) -> None:
        self._latest[site] = gradient

    def motion(self, site: Site, offset: Tensor) -> None:
        part = self._at[site].by_image(offset * self._latest.pop(site)).sum(1)
        self._maps[site] = self._maps[site].add_(part) if site in self._maps else part

    def maps(self) -> dict[str, Tensor]:
        """{split name: (B, R, S)}; tokens have S = 1, vectors R = S = 1."""
        return {site.name: _as_map(self._maps[site]) for site in self._at}


def _as_map(positions: Tensor) -> Tensor:
    """(B, *positions) as (B, R, S)."""
    return positions[(...,) + (None,) * max(0, 3 - positions.dim())].flatten(2)
