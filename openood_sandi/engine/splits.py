"""Where a network is split: from module names, globs or "auto" to places in its forward pass.

Everything is decided from a recorded pass (:func:`record_network`), never from the class of the network: the modules
that were called, in call order, with the tensors they returned.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from openood_sandi.engine.axes import ChannelAxes, Rows, batch_rows, usual_channel_axis
from openood_sandi.engine.maps import last_map, upstream
from openood_sandi.engine.memory import is_out_of_memory
from openood_sandi.engine.norms import channels_of, is_normalisation, normalises_second
from openood_sandi.engine.passes import Layer, Pass, record_pass
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.stages import Point, last_group, last_stage

__all__ = ["RecordedNetwork", "record_network"]


class RecordedNetwork:
    """A recorded pass of a network over images ``x`` (B, C, H, W); see :func:`record_network`."""

    def __init__(self, net: nn.Module, recorded: Pass, with_another: Pass | None) -> None:
        self.calls = recorded.calls
        self.call_names = recorded.call_names
        self.size = sum(call.size() for call in recorded.calls)
        self._modules = [name for name, _ in net.named_modules() if name]
        self._pass, self._with_another = recorded, with_another
        self._layers = recorded.layers
        self._by_name = {layer.site.name: layer for layer in recorded.layers}
        self._channel_axes = ChannelAxes(recorded)
        self._last_map = last_map(recorded, self._channel_axes)

    # ------------------------------------------------------------------ split points

    def splits(self, wanted: str | Sequence[str], *, default: str) -> tuple[Split, ...]:
        """The split points that ``wanted`` names, in call order.

        Args:
            wanted: "auto" (that is, ``default``), "all", "last_stage", or names and globs, as a list or separated by
                commas. "name" is the output of a module, "name#2" that of its second call. A glob selects among the
                points of "all"; where it matches none of them, among all modules.
            default: "all" or "last_stage".

        Raises:
            ValueError: if a name is unknown, was not called, or nothing matches; if a split's tensor does not depend on
                the images, or which dimension is the batch or counts channels cannot be told.
        """
        items = [default if item == "auto" else item for item in _items(wanted)]
        if not items:
            raise ValueError('splits is empty; give module names, globs, "all", "last_stage" or "auto"')
        chosen: dict[Site, Split] = {}
        for item in items:
            for split in self._matching(item):
                chosen[split.site] = split
        return tuple(sorted(chosen.values(), key=lambda split: self._position(split.site)))

    def feature(self, wanted: str) -> Split:
        """F of Eq. 12: the last feature map ("auto", see :func:`.maps.last_map`) or the output of the module named."""
        if wanted != "auto":
            return self._module_split(self._layer(wanted))
        if self._last_map is None:
            raise ValueError(
                'feature="auto" found no feature map, of channels at positions, in this network; '
                "name the module whose output is to be F, for instance the one before the classifier"
            )
        return self._split_at(self._last_map)

    def before(self, feature: Split, splits: Sequence[Split], wanted: str | Sequence[str]) -> tuple[Split, ...]:
        """Those of the ``splits`` that F can be differentiated by.

        Where F depends on none of those that "auto" stands for, it is the points that F does depend on, at the
        resolution of the last of them.

        Raises:
            ValueError: if ``wanted`` names a split behind F or on a branch beside it, or no split is left.
        """
        leading = self._leading_to(feature, splits)
        for split in splits:
            if split not in leading and split.name in _items(wanted):
                if self._tensor(split) is not self._tensor(feature):
                    where = "behind" if self._position(split.site) >= self._position(feature.site) else "beside"
                    raise ValueError(
                        f"split point {split.name!r} lies {where} F ({feature.name!r}): F does not depend on it"
                    )
        if leading:
            return leading
        if "auto" in _items(wanted):
            for points in (self._norms, self._activations):
                earlier = self._leading_to(feature, points())
                if earlier:
                    return tuple(earlier[i] for i in last_group([self._point(split) for split in earlier]))
        raise ValueError(f"no split point lies before F ({feature.name!r}); name others in splits, or another F")

    def _leading_to(self, feature: Split, splits: Sequence[Split]) -> tuple[Split, ...]:
        """Those of the splits before F, but for those that are seen to lead to the logits and not to F."""
        made_by, end = self._pass.made_by, self._position(feature.site)
        inputs, of_logits = (
            upstream(self.calls, made_by.get(id(tensor), -1)) for tensor in (self._tensor(feature), self._pass.output)
        )
        early = [split for split in splits if self._position(split.site) < end]
        return tuple(split for split in early if made_by.get(id(self._tensor(split)), -1) not in of_logits - inputs)

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
        return self._norms() or self._activations()

    def _norms(self) -> list[Split]:
        norms = [layer for layer in self._layers if is_normalisation(layer)]
        return [
            self._module_split(layer)
            for layer in norms
            if isinstance(layer.output, Tensor) and self._depends_on_images(layer.site, layer.output)
        ]

    def _activations(self) -> list[Split]:
        inputs = [call.producers[0] for call in self.calls if call.name in _ACTIVATIONS and call.producers]
        # a part of what chunk() returns is no result of its own
        return [self._split_at(p) for p in dict.fromkeys(inputs) if p >= 0 and isinstance(self.calls[p].result, Tensor)]

    def _last_stage(self, points: list[Split]) -> list[Split]:
        if self._last_map is None:
            return points
        feature = self._split_at(self._last_map)
        end = self._position(feature.site)
        points = [split for split in points if self._position(split.site) <= end] or points
        places = [self._point(split) for split in points]
        chosen = last_stage(places, self._point(feature).positions, (layer.name for layer in self._layers))
        return [points[i] for i in chosen]

    def _point(self, split: Split) -> Point:
        positions = split.by_image(self._tensor(split))[0, 0].numel()
        return Point(split.site.module or split.name, positions)

    @property
    def output(self) -> int | None:
        """The tape position of the call whose result the logits are, if it is one."""
        return self._pass.made_by.get(id(self._pass.output))

    def positions(self, splits: Iterable[Split]) -> dict[Site, int]:
        """For each split, the tape position of the call whose result it is, if it is one."""
        reached = (split for split in splits if split.site.module is None or split.site.name in self._by_name)
        found = {split.site: self._pass.made_by.get(id(self._tensor(split))) for split in reached}
        return {site: position for site, position in found.items() if position is not None}

    def span(self, split: Split) -> range:
        """The tape positions of the calls whose end the split is: later ones read what a tap makes of it."""
        site = split.site
        if site.module is None:
            return range(site.index, site.index + 1)
        layer = self._by_name[site.name]
        return range(layer.start, layer.stop)

    # ------------------------------------------------------------------ names and sites

    def _layer(self, name: str) -> Layer:
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

    def _module_split(self, layer: Layer) -> Split:
        if not isinstance(layer.output, Tensor) or not layer.output.is_floating_point() or layer.output.dim() < 2:
            raise ValueError(
                f"split point {layer.site.name!r} returns {_describe(layer.output)}, not one floating-point tensor "
                "(B, channels, ...); name a submodule of it that does"
            )
        return self._split(layer.site, layer.output, layer.module)

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
        return self._split(Site(name, None, position), result, None)

    def _position(self, site: Site) -> int:
        return site.index if site.module is None else self._by_name[site.name].stop

    def _tensor(self, split: Split) -> Tensor:
        site = split.site
        output = self.calls[site.index].result if site.module is None else self._by_name[site.name].output
        assert isinstance(output, Tensor)
        return output

    # ------------------------------------------------------------------ dimensions

    def _depends_on_images(self, site: Site, tensor: Tensor) -> bool:
        """Whether the calls show it, or, where they hide it as a scripted function does, the number of rows."""
        if self._pass.depends_on_images(tensor) or self._with_another is None:
            return self._pass.depends_on_images(tensor)
        try:
            more = self._with_another.at(site)[1]
        except (StopIteration, IndexError):
            return False
        return isinstance(more, Tensor) and more.shape != tensor.shape

    def _split(self, site: Site, tensor: Tensor, module: nn.Module | None) -> Split:
        if not self._depends_on_images(site, tensor):
            raise ValueError(f"split point {site.name!r} does not depend on the images; name one that does")
        rows = self._rows(site, tensor)
        axis = self._channel_axis(site, tensor, module, rows.axis)
        if axis == rows.axis:
            raise ValueError(
                f"split point {site.name!r}, of shape {tuple(tensor.shape)}, has its batch in dimension {axis}, where "
                "channels should be; name a module before or behind it that returns (B, channels, ...)"
            )
        return Split(site, axis, *rows)

    def _rows(self, site: Site, tensor: Tensor) -> Rows:
        images, other = len(self._pass.x), self._with_another
        found: Rows | str = f"its shape is {tuple(tensor.shape)} for {images} image(s)"
        if other is None or (site.module is None and other.call_names != self.call_names):
            if len(tensor) == images:
                found = Rows()  # the network takes no other number of images, or another way for them
        elif site.module is not None and other.calls_of(site.module) != self._pass.calls_of(site.module):
            found = "it is called as often as there are images"
        else:
            (given, _), (other_given, other_tensor) = self._pass.at(site), other.at(site)
            found = batch_rows(tensor, other_tensor, images, (given, other_given))
        if isinstance(found, str):
            raise ValueError(
                f"split point {site.name!r}: {found}. Name split points where each image has rows of its own, "
                "as (B, channels, ...) or (B, tokens, channels), and leave this one out"
            )
        return found

    def _channel_axis(self, site: Site, tensor: Tensor, module: nn.Module | None, batch_axis: int) -> int:
        position = self._pass.made_by.get(id(tensor))
        carried = None if position is None else self._channel_axes[position]
        channels = None if module is None else channels_of(module)
        if channels is None or (carried is not None and tensor.shape[carried] == channels):
            return usual_channel_axis(tensor.dim()) if carried is None else carried
        if module is not None and normalises_second(module):
            return 1
        fitting = [axis for axis, length in enumerate(tensor.shape) if length == channels and axis != batch_axis]
        if len(fitting) == 1:
            return fitting[0]
        raise ValueError(
            f"split point {site.name!r} normalises {channels} channels and returns shape {tuple(tensor.shape)}: "
            f"{'none' if not fitting else 'more than one'} of its dimensions can be these; name another module "
            "in splits, for instance the one that it follows"
        )


def record_network(net: nn.Module, x: Tensor) -> tuple[RecordedNetwork, Tensor]:
    """Runs ``net`` on ``x`` (B, C, H, W), and on one image more; returns what it did and its output for ``x``.

    What grows with the number of images is the batch. The further image is the first one flipped, at half its contrast
    and on a ramp, so that no view which the network takes of one of them is a view of the other.
    """
    recorded = record_pass(net, x)
    another = x[:1].flip(-1) / 2 + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
    try:
        with_another: Pass | None = record_pass(net, torch.cat([x, another]))
    except Exception as error:  # whatever it is, the network does take x
        if is_out_of_memory(error):
            raise
        with_another = None
    return RecordedNetwork(net, recorded, with_another), recorded.output


_ACTIVATIONS = frozenset(
    ("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "softplus", "gelu", "silu")
) | {"mish", "hardswish", "sigmoid", "tanh"}


def _items(wanted: str | Sequence[str]) -> list[str]:
    """The names that an option gives, as a list or separated by commas."""
    return [item.strip() for item in (wanted.split(",") if isinstance(wanted, str) else wanted) if item.strip()]


def _describe(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a {str(output.dtype).removeprefix('torch.')} tensor of shape {tuple(output.shape)}"
    if isinstance(output, Iterable):
        return f"a {type(output).__name__}"
    return repr(type(output).__name__)
