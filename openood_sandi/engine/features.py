"""What a classifier computes on its way to the logits: its penultimate features, and the features of its stages.

Found with forward hooks in one pass, from what the modules return and never from the class of the network.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openood_sandi.engine import checks
from openood_sandi.engine.threads import in_this_thread

__all__ = ["LinearHead", "Penultimate", "hooked", "pooled", "require_called", "stages"]


@contextmanager
def hooked(modules: dict[str, nn.Module], seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls ``seen(name, input, output)`` for each call of a module from one tensor to one tensor, in this thread."""

    def hook(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def see(module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
            if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
                seen(name, arguments[0], output)

        return see

    handles = [module.register_forward_hook(in_this_thread(hook(name))) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------- the last layer


@dataclass(frozen=True)
class LinearHead:
    """The layer that turns features F (B, D) into logits (B, C): a linear one, or a 1x1 convolution of one position."""

    name: str
    module: nn.Linear | nn.Conv2d

    @property
    def weight(self) -> Tensor:
        """(C, D): row c is the gradient of logit c by F."""
        return self.module.weight.detach().flatten(1)

    @property
    def bias(self) -> Tensor:
        """(C,), zeros where the layer has none."""
        bias = self.module.bias
        return self.weight.new_zeros(len(self.weight)) if bias is None else bias.detach()


class Penultimate:
    """A classifier with a linear last layer, read before that layer as well.

    ``features, logits = Penultimate(net)(x)``: images (B, C, H, W) to F (B, D), the last layer's input, and the
    logits (B, classes), in one forward pass. The last layer is looked for in the first batch.

    Args:
        net: a classifier in eval mode.

    Raises:
        ValueError: at the first batch, if the logits are not the output of a linear layer.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = checks.eager_network(net)
        self._head: LinearHead | None = None

    def head(self, x: Tensor) -> LinearHead:
        """The last layer, found with the first of the images ``x``."""
        if self._head is None:
            self._head = self._find_head(x[:1])
        return self._head

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        checks.require_images(x)
        checks.require_eval(self.net)
        head, features = self.head(x), []
        with hooked({head.name: head.module}, lambda _, given, __: features.append(given.flatten(1))):
            logits = self.net(x)
        return features[-1], logits

    def _find_head(self, x: Tensor) -> LinearHead:
        layers: dict[str, nn.Module] = {
            name: module for name, module in self.net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
        }
        outputs: list[tuple[str, Tensor]] = []
        with torch.no_grad(), hooked(layers, lambda name, _, output: outputs.append((name, output.flatten(1)))):
            logits = self.net(x)
        checks.require_logits(logits)
        for name, output in reversed(outputs):
            module = layers[name]
            # a spoilt image must not hide the layer
            if output.shape == logits.shape and torch.allclose(output, logits, rtol=0, atol=0, equal_nan=True):
                assert isinstance(module, (nn.Linear, nn.Conv2d))
                return LinearHead(name, module)
        last = f"its last one is {outputs[-1][0]!r}" if outputs else "it has none"
        raise ValueError(
            f"the network's logits are not the output of a linear layer ({last}); expected a classifier that ends "
            "in nn.Linear, or in a 1x1 convolution of pooled features"
        )


# ---------------------------------------------------------------------------------------- the stages


def stages(net: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names of the modules that end the stages of ``net``, in call order, seen on the first of the images ``x``.

    A stage ends where the resolution is halved: of the feature maps (B, C, H, W) at about the same resolution, the last
    one that a module as far out as any returns ("layer2" to "layer4" of a ResNet, rather than what they consist
    of). Maps are told from other tensors by the images' aspect ratio. A network whose maps have one resolution, as a
    vision transformer's, has the members of its longest row of modules of one class instead
    ("encoder.layers.encoder_layer_9" to "_11").
    """
    modules, calls = _calls(net, x)
    found = _by_resolution(calls, x.shape[2:])
    return tuple(found if len(found) > 1 else _longest_row(calls, modules) or found)


def require_called(net: nn.Module, x: Tensor, names: Sequence[str]) -> None:
    """Check that modules with these names return tensors in a forward pass.

    Raises:
        ValueError: one does not.
    """
    called = [name for name, _ in _calls(net, x)[1]]
    for name in names:
        if name not in called:
            near = difflib.get_close_matches(name, called, n=3, cutoff=0.4) or called[-4:]
            raise ValueError(f"the forward pass calls no module {name!r}; did you mean {' or '.join(near)}?")


_Calls = list[tuple[str, tuple[int, ...]]]  # name of a module and shape of its output


def _calls(net: nn.Module, x: Tensor) -> tuple[dict[str, nn.Module], _Calls]:
    net = checks.eager_network(net)
    modules = {name: module for name, module in checks.called_modules(net) if name}
    calls: _Calls = []
    with torch.no_grad(), hooked(modules, lambda name, _, output: calls.append((name, tuple(output.shape)))):
        net(x[:1])
    return modules, calls


def _by_resolution(calls: _Calls, image: Sequence[int]) -> list[str]:
    last: dict[int, tuple[int, int, str]] = {}  # halvings of the image: depth, place, name
    for place, (name, shape) in enumerate(calls):
        depth = name.count(".")
        if len(shape) == 4 and shape[2:] != (1, 1):
            strides = sorted((image[0] / shape[2], image[1] / shape[3]))
            halvings = round(math.log2(strides[0] * strides[1]) / 2)  # padding is no stage of its own
            if strides[1] <= 2 * strides[0] and depth <= last.get(halvings, (depth,))[0]:
                last[halvings] = (depth, place, name)
    return [name for _, _, name in sorted(last.values(), key=lambda stage: stage[1])]


def _longest_row(calls: _Calls, modules: dict[str, nn.Module]) -> list[str]:
    rows: dict[tuple[str, type[nn.Module]], list[str]] = {}
    for name, shape in calls:
        if len(shape) in (3, 4):
            rows.setdefault((name.rpartition(".")[0], type(modules[name])), []).append(name)
    return max(rows.values(), key=lambda row: (len(row), -row[0].count(".")), default=[])


@contextmanager
def pooled(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules, averaged over positions: {name: (B, channels)} after each forward pass of ``net``.

    Maps (B, C, H, W) are averaged over H and W, tokens (B, N, C) over N. A module called twice counts with its last
    call.
    """
    net = checks.eager_network(net)
    found: dict[str, Tensor] = {}

    def pool(name: str, _: Tensor, output: Tensor) -> None:
        if output.dim() not in (2, 3, 4):
            raise ValueError(
                f"module {name!r} returns shape {tuple(output.shape)}, expected maps (B, C, H, W), tokens (B, N, C) or "
                "features (B, C)"
            )
        # at once, since a layer behind it may write into the tensor
        positions = {2: (), 3: (1,), 4: (2, 3)}[output.dim()]
        found[name] = output.mean(positions) if positions else output.clone()

    with hooked({name: net.get_submodule(name) for name in names}, pool):
        yield found
