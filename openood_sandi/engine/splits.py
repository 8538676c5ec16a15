"""Where a network is split: from module names, globs or "auto" to places in its forward pass.

Everything is decided from one recorded pass (:func:`record_network`), never from the class of the network: the modules that
were called, in call order, with the tensors they returned.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openood_sandi.engine.tape import Site, Tape

__all__ = ["RecordedNetwork", "Split", "record_network"]


@dataclass(frozen=True)
class Split:
    """A split point: a site and which of its dimensions counts channels (K of Eq. 11); the others are positions."""

    site: Site
    channel_axis: int

    @property
    def name(self) -> str:
        return self.site.name


@dataclass(frozen=True)
class _Layer:
    """One call of one module in the recorded pass."""

    name: str
    index: int
    module: nn.Module
    output: object
    start: int
    stop: int
    """The torch calls ``start`` to ``stop - 1`` of the tape happened inside."""

    @property
    def site(self) -> Site:
        return Site(self.name if self.index == 1 else f"{self.name}#{self.index}", self.name, self.index)


class RecordedNetwork:
    """One recorded pass over ``x`` (B, C, H, W), with every module call it made; see :func:`record_network`."""

    def __init__(self, net: nn.Module, tape: Tape, layers: list[_Layer], batch_size: int) -> None:
        self._modules = [name for name, _ in net.named_modules() if name]
        self.calls = tape.calls
        self.call_names = tape.call_names
        self.size = sum(call.size() for call in tape.calls)
        self._layers = layers
        self._by_name = {layer.site.name: layer for layer in layers}
        self._batch_size = batch_size
        self._last_map = self._find_last_map()

    # ------------------------------------------------------------------ split points

    def splits(self, wanted: str | Sequence[str], *, default: str) -> tuple[Split, ...]:
        """The split points that ``wanted`` names, in call order.

        Args:
            wanted: "auto" (that is, ``default``), "all", "last_stage", or names and globs, as a list or separated by
                commas. "name" is the output of a module, "name#2" that of its second call. A glob selects among the
                points of "all"; where it matches none of them, among all modules.
            default: "all" or "last_stage".

        Raises:
            ValueError: if a name is unknown, was not called, or nothing matches.
        """
        items = [item.strip() for item in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
        items = [default if item == "auto" else item for item in items if item]
        if not items:
            raise ValueError('splits is empty; give module names, globs, "all", "last_stage" or "auto"')
        chosen: dict[Site, Split] = {}
        for item in items:
            for split in self._matching(item):
                chosen[split.site] = split
        return tuple(sorted(chosen.values(), key=lambda split: self._position(split.site)))

    def feature(self, wanted: str) -> Split:
        """F of Eq. 12: the last spatial feature map ("auto") or the output of the module named."""
        if wanted != "auto":
            return self._module_split(self._layer(wanted))
        if self._last_map is None:
            raise ValueError(
                'feature="auto" found no feature map with more than one position in this network; '
                "name the module whose output is to be F, for instance the one before the classifier"
            )
        return self._split_at(self._last_map)

    def before(self, feature: Split, splits: Sequence[Split], wanted: str | Sequence[str]) -> tuple[Split, ...]:
        """Those of the ``splits`` that F can be differentiated by; one that ``wanted`` names behind F is an error."""
        named = {item.strip() for item in (wanted.split(",") if isinstance(wanted, str) else wanted)}
        late = [split for split in splits if self._position(split.site) >= self._position(feature.site)]
        for split in late:
            if split.name in named and self._tensor(split) is not self._tensor(feature):
                raise ValueError(
                    f"split point {split.name!r} lies behind F ({feature.name!r}): F does not depend on it"
                )
        if len(late) == len(splits):
            raise ValueError(f"no split point lies before F ({feature.name!r}); name others in splits, or another F")
        return tuple(split for split in splits if split not in late)

    def _matching(self, item: str) -> list[Split]:
        if item in ("all", "last_stage"):
            points = self._default_points()
            if not points:
                raise ValueError(
                    "this network has neither normalisation layers nor activations to split at; "
                    f"name its modules in splits, for instance {self._some_names()}"
                )
            return points if item == "all" else self._last_stage(points)
        if not any(character in item for character in "*?["):
            return [self._module_split(self._layer(item))]
        matching = [split for split in self._default_points() if fnmatch.fnmatchcase(split.name, item)]
        if not matching:
            names = fnmatch.filter(self._by_name, item)
            matching = [self._module_split(self._by_name[name]) for name in names if name]
        if not matching:
            raise ValueError(f"splits: {item!r} matches none of the modules, for instance {self._some_names()}")
        return matching

    def _default_points(self) -> list[Split]:
        """Every normalisation layer; without any, the inputs of the activations."""
        norms = [layer for layer in self._layers if _is_normalisation(layer.module)]
        if norms:
            return [self._module_split(layer) for layer in norms]
        inputs = [call.producers[0] for call in self.calls if call.name in _ACTIVATIONS and call.producers]
        return [self._split_at(position) for position in dict.fromkeys(inputs) if position >= 0]

    def _last_stage(self, points: list[Split]) -> list[Split]:
        """The points of the network's last stage.

        That is the innermost module which holds all points at the resolution of the last feature map, but for at most
        one (the head's own normalisation), and mostly such points: ``layer4`` of a ResNet, ``block4`` of BiT with
        the points where it enters at the resolution before. A flat network has no such module; there it is
        the points at that resolution.
        """
        if self._last_map is None:
            return points
        last_map = self._split_at(self._last_map)
        points = [point for point in points if self._position(point.site) <= self._position(last_map.site)] or points
        resolution = self._resolution(last_map)
        last = [point for point in points if self._resolution(point) == resolution] or points[-1:]
        holders: list[tuple[int, list[Split]]] = []
        for name in {layer.name for layer in self._layers if layer.name}:
            held = [point for point in points if (point.site.module or point.name).startswith(name + ".")]
            inside = sum(point in last for point in held)
            if inside and inside >= len(last) - 1 and inside > len(held) - inside:
                holders.append((len(held), held))
        return min(holders, key=lambda holder: holder[0])[1] if len(last) > 1 and holders else last

    def positions(self, splits: Iterable[Split]) -> dict[Site, int]:
        """For each split, the tape position of the call whose result it is, if it is one."""
        made = {id(call.result): position for position, call in reversed(list(enumerate(self.calls)))}
        found = {split.site: made.get(id(self._tensor(split))) for split in splits}
        return {site: position for site, position in found.items() if position is not None}

    # ------------------------------------------------------------------ names and sites

    def _layer(self, name: str) -> _Layer:
        layer = self._by_name.get(name)
        if layer is not None:
            return layer
        module, _, number = name.partition("#")
        calls = sum(layer.name == module for layer in self._layers)
        if calls:
            raise ValueError(f"{name!r}: module {module!r} is called {calls} time(s) in a forward pass, not {number}")
        if module in self._modules:
            raise ValueError(f"{name!r}: the network has that module but its forward pass never calls it")
        near = difflib.get_close_matches(name, [*self._by_name], n=3, cutoff=0.4)
        raise ValueError(f"the network has no module {name!r}; did you mean {' or '.join(near) or self._some_names()}?")

    def _some_names(self) -> str:
        return ", ".join([layer.site.name for layer in self._layers if layer.name][-4:])

    def _module_split(self, layer: _Layer) -> Split:
        if not isinstance(layer.output, Tensor) or not layer.output.is_floating_point() or layer.output.dim() < 2:
            raise ValueError(
                f"split point {layer.site.name!r} returns {_describe(layer.output)}, not one floating-point tensor "
                "(B, channels, ...); name a submodule of it that does"
            )
        return Split(layer.site, _channel_axis(layer.module, layer.output))

    def _split_at(self, position: int) -> Split:
        """The split at the result of one torch call, by the name of the outermost module that returns it, if any."""
        result = self.calls[position].result
        returned = [layer for layer in self._layers if layer.output is result and layer.name]
        if returned:
            return self._module_split(min(returned, key=lambda layer: layer.name.count(".")))
        around = [layer for layer in self._layers if layer.start <= position < layer.stop]
        owner = min(around, key=lambda layer: layer.stop - layer.start)
        kind = self.calls[position].name.strip("_")
        before = sum(call.name == self.calls[position].name for call in self.calls[owner.start : position])
        name = f"{owner.site.name}:{kind}".lstrip(":") + (f"#{before + 1}" if before else "")
        return Split(Site(name, None, position), _channel_axis(None, result))

    def _position(self, site: Site) -> int:
        return site.index if site.module is None else self._by_name[site.name].stop

    def _tensor(self, split: Split) -> Tensor:
        site = split.site
        output = self.calls[site.index].result if site.module is None else self._by_name[site.name].output
        assert isinstance(output, Tensor)
        return output

    def _resolution(self, split: Split) -> tuple[int, ...]:
        shape = list(self._tensor(split).shape[1:])
        del shape[split.channel_axis - 1]
        return tuple(shape)

    def _find_last_map(self) -> int | None:
        """The tape position of the last feature map that has channels and more than one position."""
        for position in range(len(self.calls) - 1, -1, -1):
            result = self.calls[position].result
            if (
                isinstance(result, Tensor)
                and result.is_floating_point()
                and result.dim()
                and len(result) == self._batch_size
            ):
                if sum(length > 1 for length in result.shape[1:]) > 1:
                    return position
        return None


def record_network(net: nn.Module, x: Tensor) -> tuple[RecordedNetwork, Tensor]:
    """Runs ``net`` once on ``x`` (B, C, H, W) and returns what it did, with its output."""
    tape = Tape(net)
    layers: list[_Layer] = []
    visits: Counter[str] = Counter()
    starts: list[int] = []

    def enter(module: nn.Module, args: object) -> None:
        starts.append(len(tape.calls))

    def leave_as(name: str):  # type: ignore[no-untyped-def]
        def leave(module: nn.Module, args: object, output: object) -> None:
            visits[name] += 1
            output = tape.current(output) if isinstance(output, Tensor) else output
            layers.append(_Layer(name, visits[name], module, output, starts.pop(), len(tape.calls)))

        return leave

    handles = []
    try:
        for name, module in net.named_modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave_as(name)))
        with torch.no_grad():
            output = tape.record(x)
    finally:
        for handle in handles:
            handle.remove()
    return RecordedNetwork(net, tape, layers, len(x)), output


_NORMALISATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.GroupNorm,
    nn.LayerNorm,
)
_ACTIVATIONS = frozenset(
    ("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "softplus", "gelu", "silu")
) | {"mish", "hardswish", "sigmoid", "tanh"}


def _is_normalisation(module: nn.Module) -> bool:
    """Whether the module normalises: torch's own classes, and others that are named so (FrozenBatchNorm2d, RMSNorm)."""
    named_so = type(module).__name__.rstrip("123d").endswith("Norm")
    return isinstance(module, _NORMALISATIONS) or (named_so and not any(True for _ in module.children()))


def _channel_axis(module: nn.Module | None, tensor: Tensor) -> int:
    """Which dimension counts channels: the last of tokens (B, N, D), as layer norms say, and dimension 1 otherwise."""
    if isinstance(module, nn.LayerNorm):
        # A subclass with a forward of its own (torchvision's LayerNorm2d) permutes channels to the back and back.
        return tensor.dim() - 1 if type(module).forward is nn.LayerNorm.forward else 1
    if module is not None and _is_normalisation(module) and tensor.dim() == 3 and isinstance(module, _NORMALISATIONS):
        return 1
    return tensor.dim() - 1 if tensor.dim() == 3 else 1


def _describe(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a {str(output.dtype).removeprefix('torch.')} tensor of shape {tuple(output.shape)}"
    if isinstance(output, Iterable):
        return f"a {type(output).__name__}"
    return repr(type(output).__name__)
