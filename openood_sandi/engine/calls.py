"""Torch calls on lane tensors (:mod:`.lanes`): the result for all perturbed copies at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.engine import writes
from openood_sandi.engine.devices import is_autocast
from openood_sandi.engine.lanes import align, find, lanes_of, map_tensors, tag, tensors_in, union, widen
from openood_sandi.engine.single_image import with_right_gradient

__all__ = ["call"]


def _functions(*names: str) -> frozenset[Callable[..., Any]]:
    """Every function called one of ``names`` in torch's namespaces."""
    spaces = (torch, F, Tensor, torch._C._nn)
    return frozenset(getattr(space, name) for name in names for space in spaces if hasattr(space, name))


# Element-wise in one tensor, or over trailing dimensions alone: a further leading dimension changes nothing.
_UNARY = _functions(
    *("relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "leaky_relu", "hardtanh"),
    *("hardswish", "hardsigmoid", "sigmoid", "logsigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "abs", "neg"),
    *("square", "clamp", "clamp_min", "clamp_max", "clip", "dropout", "feature_dropout", "contiguous", "linear"),
    *("layer_norm", "clone"),
)
# Element-wise in several tensors, which broadcast.
_BROADCAST = _functions(
    *("add", "sub", "mul", "div", "true_divide", "maximum", "minimum", "__add__", "__radd__", "__sub__", "__rsub__"),
    *("__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
)
# Dimension 0 of the first argument is the batch (or, unbatched, channels treated alike): lanes fold into it.
# The value is the rank from which that holds.
_FOLD = {
    function: rank
    for rank, names in {
        2: (
            *("batch_norm", "group_norm", "prelu", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"),
            "adaptive_max_pool1d",
        ),
        3: (
            *("conv1d", "conv_transpose1d", "instance_norm", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
            "adaptive_max_pool2d",
        ),
        4: ("conv2d", "conv_transpose2d", "local_response_norm", "pixel_shuffle", "interpolate"),
        5: ("conv3d", "conv_transpose3d"),
    }.items()
    for function in _functions(*names)
}
_INPUT_FIRST = _UNARY | _BROADCAST | _FOLD.keys()
_BY_STRIDE = _functions("as_strided")
_BATCH_NORM = _functions("batch_norm")
_DROPOUT = _functions("dropout", "feature_dropout")
_ATTENTION = _functions("scaled_dot_product_attention")
_RECURRENT = _functions("lstm", "gru", "rnn_tanh", "rnn_relu")
_CELL = _functions("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


def _view(tensor: Tensor, *shape: Any, **options: Any) -> Tensor:
    """What was a view when recorded is the same numbers in whatever memory the copies have."""
    shape = shape or tuple(options.values())
    return tensor.view(*shape) if isinstance(shape[0], torch.dtype) else tensor.reshape(*shape)


# For calls that do not work for all lanes at once, others of the same result.
_INSTEAD: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_functions("index_put"), writes.index_put),
    Tensor.view: _view,
    Tensor.view_as: Tensor.reshape_as,
}


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], clean: Any) -> Any:
    """The result of ``func(*args, **kwargs)`` for every lane of its lane arguments, as lane tensors.

    ``clean`` is the recorded result of the same call. The shortcuts are a matter of speed only; whatever they do
    not cover runs through ``torch.vmap``.

    Raises:
        ValueError: a result is not of the recorded form behind its lanes.
    """
    if not args and "input" in kwargs and func in _INPUT_FIRST:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    args, kwargs, asks_for_layout = _without_memory_format(args, kwargs)
    func = _INSTEAD.get(func, func)
    ids = union(find((args, kwargs)))
    if func in _BY_STRIDE:
        args = (_in_memory_as_recorded(args[0]), *args[1:])
    result = _shortcut(func, args, kwargs, ids)
    if result is None:
        result = _by_vmap(func, args, kwargs, ids, clean)
    if asks_for_layout and isinstance(result, Tensor):
        result = _laid_out_as(clean, result)
    tag(result, ids, clean)
    return result


def _shortcut(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ids: tuple[int, ...]) -> Any:
    """The result without vmap; None where that does not hold for sure."""
    operands = tensors_in((args, kwargs))
    perturbed = [tensor for tensor in operands if lanes_of(tensor) is not None]
    rank = perturbed[0].dim() - 1
    largest = max(tensor.dim() - (lanes_of(tensor) is not None) for tensor in operands)
    first_only = len(perturbed) == 1 and bool(args) and args[0] is perturbed[0]
    if func in _UNARY and first_only and (rank == largest or func is F.linear) and not _drops(func, args, kwargs):
        return func(*args, **kwargs)
    if func in _BROADCAST and all(tensor.dim() > 1 for tensor in perturbed):  # numbers promote otherwise than tensors
        args, kwargs = map_tensors((args, kwargs), lambda t: t if lanes_of(t) is None else align(t, ids, largest))
        return func(*args, **kwargs)
    if func in _FOLD and first_only and rank >= _FOLD[func] and not (func in _BATCH_NORM and _trains(args, kwargs)):
        folded = func(args[0].flatten(0, 1), *args[1:], **kwargs)
        if func in _BATCH_NORM:
            with_right_gradient(folded)
        return map_tensors(folded, lambda t: t.unflatten(0, (len(ids), -1)))
    if func in (torch.cat, torch.concat) and _axis(args, kwargs, rank) > 0:
        tensors = args[0] if args else kwargs["tensors"]
        return torch.cat([widen(t, ids) for t in tensors], _axis(args, kwargs, rank) + 1)
    if func in _ATTENTION and lanes_of(_mask(args, kwargs)) is not None:  # fused kernels give masks no gradient
        args, kwargs = map_tensors((args, kwargs), lambda t: align(t, ids, largest))
        return func(*args, **kwargs)
    if func in _RECURRENT and len(args) == 9 and isinstance(args[3], bool):
        return _recurrent(func, args, ids)
    if func in _CELL:
        entering = map_tensors(args[:2], lambda t: widen(t, ids).flatten(0, 1))  # features and states (batch, features)
        return map_tensors(func(*entering, *args[2:]), lambda t: t.unflatten(0, (len(ids), -1)))
    return None


def _drops(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is a dropout that is active: each copy would lose other elements than the clean tensor did."""
    return func in _DROPOUT and bool(kwargs.get("training", args[2] if len(args) > 2 else True))


def _trains(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch norm normalises by the statistics of its batch, which lanes must not share."""
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def _axis(args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> int:
    """The non-negative dimension that a ``torch.cat`` of tensors of this rank joins along; 0 where it is not told."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return dim % rank if isinstance(dim, int) and rank else 0


def _mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask of an attention, a floating-point one that may need a gradient."""
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    return mask if isinstance(mask, Tensor) and mask.is_floating_point() else None


def _recurrent(func: Callable[..., Any], args: tuple[Any, ...], ids: tuple[int, ...]) -> Any:
    """A recurrent layer over a batch-first or time-first sequence, the lanes folded into the batch."""
    batch = 0 if args[8] else 1

    def fold(tensor: Tensor, axis: int) -> Tensor:
        return widen(tensor, ids).movedim(0, axis).flatten(axis, axis + 1).contiguous()

    def unfold(tensor: Tensor, axis: int) -> Tensor:
        return tensor.reshape(*tensor.shape[:axis], len(ids), -1, *tensor.shape[axis + 1 :]).movedim(axis, 0)

    states = map_tensors(args[1], lambda state: fold(state, 1))  # (layers, batch, features) whatever the sequence
    sequence, *last = func(fold(args[0], batch), states, *args[2:])
    return unfold(sequence, batch), *(unfold(state, 1) for state in last)


def _without_memory_format(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments less a memory format, which counts dimensions, and whether there was one."""
    if not any(isinstance(value, torch.memory_format) for value in (*args, *kwargs.values())):
        return args, kwargs, False
    kept = {key: value for key, value in kwargs.items() if not isinstance(value, torch.memory_format)}
    return tuple(value for value in args if not isinstance(value, torch.memory_format)), kept, True


def _laid_out_as(clean: Tensor, lanes: Tensor) -> Tensor:
    """The lanes in memory one after the other, each as the clean tensor lies there."""
    order = [0, *(1 + axis for axis in sorted(range(clean.dim()), key=lambda axis: -clean.stride()[axis]))]
    back = sorted(range(len(order)), key=order.__getitem__)
    return lanes.permute(order).contiguous().permute(back)


def _in_memory_as_recorded(tensor: Tensor) -> Tensor:
    """A lane tensor whose copies can be read by the strides of the clean one."""
    lanes = lanes_of(tensor)
    if lanes is None:
        return tensor
    laid_out = _laid_out_as(lanes.clean, tensor)
    if laid_out.stride()[1:] != lanes.clean.stride() or lanes.clean.storage_offset():
        raise ValueError("reads memory around a tensor")
    tag(laid_out, *lanes)
    return laid_out


@dataclass(frozen=True)
class _Slot:
    """Holds the place of the lane argument ``index`` in a call's arguments."""

    index: int


def _by_vmap(func: Callable[..., Any], args: Any, kwargs: Any, ids: tuple[int, ...], clean: Any) -> Any:
    """Any call at all, one lane at a time as far as ``func`` can tell."""
    inputs: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor | _Slot:
        if lanes_of(tensor) is None:
            return tensor
        inputs.append(widen(tensor, ids))
        return _Slot(len(inputs) - 1)

    slots = map_tensors((args, kwargs), take)

    def one_lane(*lane: Tensor) -> tuple[Tensor, ...]:
        lane_args, lane_kwargs = map_tensors(slots, lambda slot: lane[slot.index], _Slot)
        # vmap returns tensors alone; a result may also hold None or numbers
        return tuple(tensors_in(func(*lane_args, **lane_kwargs)))

    outputs = torch.vmap(one_lane)(*inputs)
    if len(outputs) != len(tensors_in(clean)):
        raise ValueError(f"gives {len(outputs)} tensors where {len(tensors_in(clean))} were due")
    remaining = iter(outputs)
    if not is_autocast(inputs[0].device):
        return map_tensors(clean, lambda _: next(remaining))
    return map_tensors(clean, lambda recorded: next(remaining).to(recorded.dtype))  # autocast does not reach into vmap
