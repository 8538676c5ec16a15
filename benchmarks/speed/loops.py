"""S&I one split at a time: what the package is measured against, and checked by.

Both loops know nothing of the package. A forward hook puts the perturbed activation in place of a split module's
output, the rest of the network follows, and autograd differentiates it, without a graph of the prefix. The *naive* loop
runs the whole network for every split and step, and no more backward passes than Eq. 9-13 need. The *released* loop
spends what the authors' release spends: the prefix once for every split, then for every step the suffix and two
backward passes, of the attributed function and of the cross-entropy, the last step's unused one among them, both with
``create_graph=True``. They compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, classes) and F (B, K, R, S) to the sum over images of what is differentiated."""

STEP_SIZE = 1e-3  # eta of Eq. 9


@dataclass(frozen=True)
class SandIOptions:
    """The options of ``SandI`` that are timed, under the same names."""

    variant: Literal["Z", "A"] = "Z"
    steps: int = 2
    combine: Literal["count", "union", "intersection"] = "count"
    top_fraction: float = 0.9


class SplitLoop:
    """Predictions and scores of S&I on a network in eval mode, by a loop over the split points.

    Args:
        splits: names of modules of ``net`` that return tensors (B, K, R, S).
        feature: the name of the module whose output is F; variant Z has no use for it.
        released: whether to spend what the release spends; False for the naive loop.
    """

    def __init__(
        self,
        net: nn.Module,
        splits: Sequence[str],
        options: SandIOptions,
        *,
        feature: str | None = None,
        released: bool = False,
    ) -> None:
        if options.variant == "A" and feature is None:
            raise ValueError("variant A needs a feature: the name of the module whose output is F")
        self._net, self._splits, self._options = net, splits, options
        self._feature = feature if options.variant == "A" else None
        self._released = released

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes (B,) and tau (B,), Eq. 14, of images (B, C, H, W)."""
        pred, densities = self._densities(images)
        return pred, torch.cat(list(densities.values()), dim=1).square().sum(1).sqrt()

    def densities(self, images: Tensor) -> dict[str, Tensor]:
        """{split: E (B, K)}, Eq. 11 for Z or Eq. 13 for A, in float64."""
        return self._densities(images)[1]

    def _densities(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pred = self._net(images).argmax(1)
        attributed = self._attributed(images)
        found = {split: self._reduce(self._path(images, split, loss, pred)) for split, loss in attributed.items()}
        if self._feature is not None:
            output = found.pop(self._feature).mean(1, keepdim=True).sqrt()
            found = {split: inner / output for split, inner in found.items()}
        return pred, found

    def _attributed(self, images: Tensor) -> dict[str, Loss]:
        """What is differentiated at each split, and, for A, at F."""
        if self._feature is None:
            return dict.fromkeys(self._splits, lambda logits, feature: logits.amax(1).sum())
        logits, clean, _ = self._run(images, self._feature, None)
        weights = torch.ones_like(clean[:, :, 0, 0])
        if self._options.top_fraction < 1:
            (slope,) = torch.autograd.grad(logits.sum(), clean)
            count = max(1, int(self._options.top_fraction * clean.shape[1]))
            weights = torch.zeros_like(weights).scatter_(1, slope.mean((2, 3)).topk(count).indices, 1.0)
        inner: dict[str, Loss] = dict.fromkeys(
            self._splits, lambda logits, feature: (feature.mean((2, 3)) * weights).sum()
        )
        return {**inner, self._feature: lambda logits, feature: logits.log_softmax(1).sum()}

    def _path(self, images: Tensor, split: str, attributed: Loss, pred: Tensor) -> list[Tensor]:
        """g_1 ... g_T of one split, along the path of Eq. 9."""
        gradients: list[Tensor] = []
        z: Tensor | None = None
        prefix = Prefix(self._net)
        for step in range(1, self._options.steps + 1):
            takes_step = self._released or step < self._options.steps
            with prefix.kept() if self._released else nullcontext():
                logits, feature, leaf = self._run(images, split, z, prefix)
            (gradient,) = torch.autograd.grad(
                attributed(logits, feature), leaf, retain_graph=takes_step, create_graph=self._released
            )
            gradients.append(gradient.detach())
            if takes_step:
                loss = F.cross_entropy(logits, pred, reduction="sum")
                (ascent,) = torch.autograd.grad(loss, leaf, create_graph=self._released)
                z = leaf.detach() + STEP_SIZE * ascent.detach().sign()
        return gradients

    def _run(
        self, images: Tensor, split: str, z: Tensor | None, prefix: Prefix | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, F and the split's tensor: ``z``, or the clean one, with a graph from there on."""
        leaf = feature = images

        def perturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
            nonlocal leaf
            torch.set_grad_enabled(True)  # until the end of the pass
            leaf = (output if z is None else z).detach().requires_grad_(True)
            if prefix is not None:
                prefix.complete = True
            return leaf

        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            nonlocal feature
            feature = output

        handles = [self._net.get_submodule(split).register_forward_hook(perturb)]
        if self._feature is not None:
            handles.append(self._net.get_submodule(self._feature).register_forward_hook(keep))
        try:
            with torch.no_grad():
                logits = self._net(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits, feature, leaf

    def _reduce(self, gradients: Sequence[Tensor]) -> Tensor:
        """(B, K) in float64: Eq. 11's share of non-zero gradients for Z, the mean gradient's size for A."""
        if self._options.variant == "A":
            return torch.stack([gradient.mean((2, 3)).double() for gradient in gradients]).mean(0).abs()
        patterns = torch.stack([gradient != 0 for gradient in gradients])
        combined = {"count": patterns, "union": patterns.any(0), "intersection": patterns.all(0)}
        share = combined[self._options.combine].double().mean((-2, -1))
        return share.mean(0) if share.dim() == 3 else share


class Prefix:
    """What the layers before a split return: computed in the first pass of a path, and kept for later ones.

    The additions between layers are done again: there is nothing to hook there, and their cost is small.
    """

    def __init__(self, net: nn.Module) -> None:
        self._layers = [module for module in net.modules() if not any(True for _ in module.children())]
        self._outputs: dict[nn.Module, list[Tensor]] = {}
        self.complete = False
        """Set once the pass has come to the split."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it, a pass of the network fills the memory or, once that is complete, draws on it."""
        handles = []
        if self.complete:
            for layer, outputs in self._outputs.items():
                _answer_with(layer, outputs)
        else:
            handles = [layer.register_forward_hook(self._keep) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self._layers:
                vars(layer).pop("forward", None)  # the instance's; the class's shows again

    def _keep(self, layer: nn.Module, args: object, output: Tensor) -> None:
        if not self.complete:
            self._outputs.setdefault(layer, []).append(output)


def _answer_with(layer: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Let the first calls of ``layer`` return ``outputs``, and later ones what they would have."""
    compute, answers = layer.forward, iter(outputs)

    def forward(x: Tensor) -> Tensor:
        answer = next(answers, None)
        result: Tensor = compute(x) if answer is None else answer
        return result

    layer.forward = forward
