"""A naive reference of S&I: obvious, slow, and sharing no code with the package.

One split at a time, one iteration at a time, one whole forward of the untouched network for each evaluation. A forward
hook replaces the output of the split module (or of its n-th call, ``"name#2"``) by the perturbed activation z, so every
residual branch that left before the split keeps its clean value; ``torch.autograd.grad`` does the rest.

Symbols, as in the paper: z_j (B, K, R, S) the activation at split j, T steps, eta the step size, g_i the attribution
gradient of iteration i, F the feature map of variant A, y the class predicted on the clean input.

    z_j^i = z_j^{i-1} + eta sign(dL_step/dz)          Eq. 9, then Eq. 4: ||z_j^i - z_j^0||_2 <= epsilon, image by image
    A_j   = sum_i (z_j^i - z_j^{i-1}) g_i             Eq. 10, the attribution map
    Z     : E = share of (position, i) with g_i != 0  Eq. 11 (or of positions with any / every g_i != 0)
    A     : E = |mean_hw,i d(sum_{c in top} mean_hw F_c)/dz_j| / sqrt(mean_c |mean_hw,i d(sum_k log p_k)/dF_c|)
                                                      Eq. 12-13
    tau   = sqrt(sum_{j,k} E^2)                       Eq. 14
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]
"""Logits (B, classes), or F, -> one number: a sum over images, which do not interact, so each gets its own gradient."""


@dataclass(frozen=True)
class Options:
    """The options of ``SandI``, under the same names."""

    variant: str = "Z"
    steps: int = 2
    step_size: float = 1e-3
    epsilon: float = math.inf
    combine: str = "count"
    attribution: str = "max_logit"
    ascent: str = "cross_entropy"
    feature: str = ""
    top_fraction: float = 0.9
    top_over: str = "channels"
    denominator: str = "mean"
    stop_at_flip: bool = False
    splitting: bool = True


@dataclass
class Path:
    """One attack: clean and perturbed activations z^0..z^T and the attribution gradients g_1..g_T at z^0..z^{T-1}."""

    activations: list[Tensor]
    gradients: list[Tensor]
    channel_dim: int

    def by_channel(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, K, positions)"""
        return x.movedim(self.channel_dim, 1).reshape(x.shape[0], x.shape[self.channel_dim], -1)

    def counts(self, combine: str, steps: int | None = None) -> Tensor:
        """(B, K): Eq. 11 before its division by the number of positions; of the first ``steps`` iterations only."""
        active = torch.stack([self.by_channel(g) != 0 for g in self.gradients[:steps]])  # (T, B, K, positions)
        if combine == "count":
            return active.sum((0, 3))
        return (active.any(0) if combine == "union" else active.all(0)).sum(2)

    def density(self, combine: str, steps: int | None = None) -> Tensor:
        """(B, K): Eq. 11"""
        taken = len(self.gradients[:steps]) if combine == "count" else 1
        positions = self.by_channel(self.gradients[0]).shape[2]
        return self.counts(combine, steps).to(self.gradients[0].dtype) / (positions * taken)

    def mean_gradient(self, steps: int | None = None) -> Tensor:
        """(B, K): signed mean over positions and iterations."""
        return self.by_channel(torch.stack(self.gradients[:steps]).mean(0)).mean(2)

    def attribution_map(self) -> Tensor:
        """(B, R, S): Eq. 10 summed over channels; (B, positions, 1) for tokens, (B, 1, 1) for vectors."""
        moves = [after - before for before, after in zip(self.activations, self.activations[1:], strict=False)]
        products = [move * g for move, g in zip(moves, self.gradients, strict=True)]
        total = torch.stack(products).sum(0).sum(self.channel_dim)
        return total.reshape(*total.shape[:3], *[1] * (3 - total.ndim))


# --- the network, seen from outside ---------------------------------------------------------------------------------


@contextmanager
def hooked(net: nn.Module, split: str, act: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Calls ``act`` with the output of the module's n-th call ("name#n"); what it returns replaces that output."""
    name, _, number = split.partition("#")
    calls = 0

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        return act(output) if calls == int(number or 1) else None

    handle = net.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def forward_with(net: nn.Module, x: Tensor, split: str, z: Tensor, feature: str = "") -> tuple[Tensor, Tensor | None]:
    """Logits, and the feature map if one is named, of the network whose split puts out z."""
    seen: list[Tensor] = []
    # A copy each: the network may go on to write into what the hook hands it (in-place ReLU, out += x).
    with hooked(net, split, lambda _output: z.clone()):
        if not feature:
            return net(x), None
        with hooked(net, feature, lambda output: seen.append(output.clone())):
            return net(x), seen[0]


def activation(net: nn.Module, x: Tensor, split: str) -> Tensor:
    """The output of the split, as it is before anything is written into it."""
    seen: list[Tensor] = []
    with hooked(net, split, lambda output: seen.append(output.clone())):
        net(x)
    return seen[0]


def channel_dim(net: nn.Module, split: str, z: Tensor) -> int:
    """Where a split's K channels lie: last for norms over trailing dimensions and for tokens (B, N, D), 1 otherwise."""
    module = net.get_submodule(split.partition("#")[0])
    if type(module).forward in (nn.LayerNorm.forward, getattr(nn, "RMSNorm", nn.LayerNorm).forward):
        return z.ndim - 1
    batch_norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    return 2 if z.ndim == 3 and not batch_norm else 1


# --- the attack -----------------------------------------------------------------------------------------------------


def gradient(value: Tensor, at: Tensor) -> Tensor:
    found = torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(at) if found is None else found


def in_ball(z: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Eq. 4: the point of the L2 ball nearest to z, image by image."""
    delta = z - centre
    norm = delta.flatten(1).norm(dim=1).view(-1, *[1] * (z.ndim - 1))
    return torch.where(norm > radius, centre + delta * (radius / norm), z)


def walk(
    start: Tensor, forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], options: Options, pred: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Eq. 9, 4 and 3. ``forward`` maps z to (what is attributed, what the step ascends), both scalars, and logits."""
    z, activations, gradients = start, [start], []
    for _ in range(options.steps):
        z = z.detach().requires_grad_()
        attributed, ascended, logits = forward(z)
        gradients.append(gradient(attributed, z))
        moved = in_ball((z + options.step_size * gradient(ascended, z).sign()).detach(), start, options.epsilon)
        for image, label in enumerate(pred):
            if options.stop_at_flip and logits[image].argmax() != label:
                moved[image] = z[image].detach()
        z = moved
        activations.append(z)
    return activations, gradients


class Reference:
    """S&I at the ``splits`` (in call order) of ``net`` in eval mode, for images ``x``; see the module's docstring.

    ``paths`` holds the attack of each split, ``feature_path`` that of F (variant A, which needs ``options.feature``).
    """

    def __init__(self, net: nn.Module, x: Tensor, splits: Sequence[str], options: Options) -> None:
        self.net, self.x, self.splits, self.options = net, x, tuple(splits), options
        self.logits = net(x).detach()
        self.pred = self.logits.argmax(1)
        losses: dict[str, Loss] = {
            "max_logit": lambda o: o.max(1).values.sum(),
            "cross_entropy": lambda o: F.cross_entropy(o, self.pred, reduction="sum"),
        }
        self.attribution, self.ascent = losses[options.attribution], losses[options.ascent]
        self.feature_path: Path | None = None
        if options.variant == "Z":
            self.paths = {split: self.path(split, self.attribution) for split in self.splits}
            return
        self.labels = ones_at_largest(self.logits, options.top_fraction if options.top_over == "labels" else 1.0)
        clean = activation(net, x, options.feature).requires_grad_()
        slope = self.pooled(gradient(forward_with(net, x, options.feature, clean)[0].sum(), clean))
        self.channels = ones_at_largest(slope, options.top_fraction if options.top_over == "channels" else 1.0)
        self.paths = {split: self.path(split, self.inner_sum, options.feature) for split in self.splits}
        self.feature_path = self.path(options.feature, self.outer_sum)

    def pooled(self, features: Tensor) -> Tensor:
        """F (B, ...) -> (B, C), averaged over positions."""
        by_channel = features.movedim(channel_dim(self.net, self.options.feature, features), 1)
        return by_channel.reshape(*by_channel.shape[:2], -1).mean(2)

    def inner_sum(self, features: Tensor) -> Tensor:
        """Of Eq. 12's numerator: F, averaged over positions and summed over the top channels."""
        return (self.channels * self.pooled(features)).sum()

    def outer_sum(self, logits: Tensor) -> Tensor:
        """Of Eq. 12's denominator: log-softmax summed over the top labels, by default all."""
        return (self.labels * logits.log_softmax(1)).sum()

    def path(self, split: str, attribution: Loss, feature: str = "") -> Path:
        """The attack at ``split``; ``attribution`` takes the logits, or F if a ``feature`` is named."""
        if not self.options.splitting:
            return self.path_along_input(split, attribution, feature)
        start = activation(self.net, self.x, split)
        follow = self.options.variant == "A" and self.options.ascent == "max_logit"

        def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, features = forward_with(self.net, self.x, split, z, feature)
            attributed = attribution(logits if features is None else features)
            # In variant A, "max_logit" ascends what is attributed, as the released code does; in Z they are the same.
            return attributed, attributed if follow else self.ascent(logits), logits

        return Path(*walk(start, forward, self.options, self.pred), channel_dim(self.net, split, start))

    def path_along_input(self, split: str, attribution: Loss, feature: str) -> Path:
        """The ablation: the input alone is attacked, and the split's gradients are read on the way."""

        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.net(x)
            return x.sum(), self.ascent(logits), logits

        inputs, _ = walk(self.x, forward, self.options, self.pred)
        activations, gradients = [activation(self.net, x, split) for x in inputs], []
        for x, z in zip(inputs[:-1], activations[:-1], strict=True):
            leaf = z.clone().requires_grad_()
            logits, features = forward_with(self.net, x, split, leaf, feature)
            gradients.append(gradient(attribution(logits if features is None else features), leaf))
        return Path(activations, gradients, channel_dim(self.net, split, activations[0]))

    # --- what is read from the paths; `steps` reads the first iterations only, as a run with fewer steps would

    def inner(self, split: str, steps: int | None = None) -> Tensor:
        """(B, K): the numerator of Eq. 13."""
        return self.paths[split].mean_gradient(steps).abs()

    def output(self, steps: int | None = None) -> Tensor:
        """(B, 1), or (B, channels of F): Eq. 13's denominator, kept from zero where no unit behind F is active."""
        assert self.feature_path is not None
        slope = self.feature_path.mean_gradient(steps).abs()
        if self.options.denominator == "mean":
            slope = slope.mean(1, keepdim=True)
        return slope.sqrt().clamp(min=1e-12)

    def densities(self, combine: str | None = None, steps: int | None = None) -> dict[str, Tensor]:
        """{split: (B, K)}: E of Eq. 11 (Z) or Eq. 13 (A)."""
        if self.options.variant == "A":
            return {split: self.inner(split, steps) / self.output(steps) for split in self.splits}
        return {split: path.density(combine or self.options.combine, steps) for split, path in self.paths.items()}

    def tau(self, combine: str | None = None, steps: int | None = None) -> Tensor:
        """(B,): Eq. 14."""
        return torch.cat(list(self.densities(combine, steps).values()), dim=1).square().sum(1).sqrt()

    def explain(self) -> dict[str, Tensor]:
        """{split: (B, R, S)}: Eq. 10, of the attribution loss on the logits; of a reference for variant Z."""
        assert self.options.variant == "Z"
        return {split: path.attribution_map() for split, path in self.paths.items()}


def ones_at_largest(values: Tensor, share: float) -> Tensor:
    """(B, n) of 0 and 1: 1 at the floor(share n), at least one, largest of each row, signed."""
    chosen = values.topk(max(1, int(share * values.shape[1])), dim=1).indices
    return torch.zeros_like(values).scatter(1, chosen, 1.0)
