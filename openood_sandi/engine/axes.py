"""Which dimension of a tensor is the batch, and which counts channels: read off recorded passes, never assumed.

The batch is the dimension that grows with the number of images. Channels are where the last convolution, linear layer
or norm put them, carried along by what the network does to the tensor since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openood_sandi.engine.memory import is_out_of_memory
from openood_sandi.engine.passes import Pass, first_tensor
from openood_sandi.engine.recorded import Call

__all__ = ["MOVES", "PRODUCTS", "ChannelAxes", "Rows", "batch_rows", "usual_channel_axis"]


# ---------------------------------------------------------------------------------------- the batch


class Rows(NamedTuple):
    """How the images lie in a tensor: ``fold`` rows an image along dimension ``axis``."""

    axis: int = 0
    fold: int = 1
    image_major: bool = True
    """Whether the rows of an image lie side by side, (B N, ...), rather than at a distance of B, (N B, ...)."""

    def unfolded(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """``tensor`` with the batch (B) as its first dimension and, if rows are folded into it, these (N) as second.

        ``lead`` dimensions before those of the rows are left where they are.
        """
        axis = self.axis + lead
        if self.fold == 1:
            return tensor.movedim(axis, lead)
        if tensor.shape[axis] % self.fold:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} cannot hold {self.fold} rows an image along dimension "
                f"{axis}: the images have another size than when the split points were found; use one detector a size"
            )
        parts: Tensor = torch.unflatten(tensor, axis, (-1, self.fold) if self.image_major else (self.fold, -1))
        return parts.movedim((axis + (not self.image_major), axis + self.image_major), (lead, lead + 1))


def batch_rows(few: Tensor, more: object, images: int, values: tuple[object, object] = (None, None)) -> Rows | str:
    """Where the batch is in a tensor of a pass.

    Args:
        few: the tensor in a pass over ``images`` images.
        more: the same in a pass over these and one further image.
        images: how many.
        values: for where these are constant, what they were computed from, row by row, in both passes.

    Returns:
        The rows, or in words why there are none.
    """
    if not isinstance(more, Tensor) or few.dim() != more.dim():
        return f"it is a tensor of {few.dim()} dimensions for {images} image(s), and none for {images + 1}"
    grown = [axis for axis in range(few.dim()) if few.shape[axis] != more.shape[axis]]
    if len(grown) != 1 or few.shape[grown[0]] * (images + 1) != more.shape[grown[0]] * images:
        return (
            f"its shape is {tuple(few.shape)} for {images} image(s) and {tuple(more.shape)} for {images + 1}, so no "
            "one dimension of it is the batch"
        )
    axis, fold = grown[0], few.shape[grown[0]] // images
    if fold == 1:
        return Rows(axis)
    orders = (Rows(axis, fold), Rows(axis, fold, False))
    found = [rows for rows in orders if _agree(rows, few, more, images)]
    before, before_more = values
    if len(found) == 2 and isinstance(before, Tensor) and isinstance(before_more, Tensor):
        if before.shape == few.shape and before_more.shape == more.shape:
            found = [rows for rows in orders if _agree(rows, before, before_more, images)]
    if len(found) == 1:
        return found[0]
    which = "neither side by side nor at equal distances" if not found else "in an order that its values do not tell"
    return f"dimension {axis} of it, of length {few.shape[axis]}, holds {fold} rows an image, {which}"


def _agree(rows: Rows, few: Tensor, more: Tensor, images: int) -> bool:
    """Whether the images have the same values in both passes, but for rounding, if they lie so."""
    expected, found = (rows.unfolded(tensor.detach().nan_to_num()) for tensor in (few, more))
    spread = float((expected - expected.mean()).abs().mean())
    return float((found[:images] - expected).abs().mean()) <= max(1e-3, 8 * torch.finfo(few.dtype).eps) * spread


# ---------------------------------------------------------------------------------------- channels

MOVES = frozenset(
    ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint", "rot90", "as_strided"),
) | {
    *("T.__get__", "mT.__get__", "H.__get__", "mH.__get__", "view", "view_as", "reshape", "reshape_as", "flatten"),
    *("unflatten", "ravel", "squeeze", "unsqueeze", "unbind", "select", "stack", "__getitem__", "contiguous", "clone"),
}
"""Calls that only move values about: dimensions may change places even where the shape stays."""
PRODUCTS = frozenset(
    ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "addmm", "einsum", "tensordot"),
)
"""Products of matrices; of two tensors that depend on the image in attention, whose result counts no channels."""
_SPATIAL = {f"conv{transposed}{n}d": n for n in (1, 2, 3) for transposed in ("", "_transpose")}
_CHANNELS_SECOND = frozenset(("batch_norm", "group_norm", "instance_norm", "native_batch_norm", "local_response_norm"))


class ChannelAxes:
    """The dimension that counts channels in each result of a recorded pass.

    Convolutions, linear layers and norms say where it is. Element-wise calls, pools and their like keep it. A call that
    changes the number of dimensions, or their order, is run on a tensor that holds the number of its channel at
    every place: the only dimension along which its result then varies is the channels' new one.
    """

    def __init__(self, recorded: Pass) -> None:
        self._calls, self._x = recorded.calls, recorded.x
        self._axes: dict[int, int] = {-1: 1}
        for position, call in enumerate(self._calls):
            axis = self._axis(call) if call.producers else None
            if axis is not None:
                self._axes[position] = axis

    def __getitem__(self, position: int) -> int | None:
        """The channels' dimension of the result (the first, of several) at a tape position; None if there is none."""
        return self._axes.get(position)

    def _axis(self, call: Call) -> int | None:
        result = first_tensor(call.result)
        if result is None or result.dim() < 2:
            return None
        if call.name in _SPATIAL:
            return result.dim() - 1 - _SPATIAL[call.name]
        if call.name in _CHANNELS_SECOND:
            return 1
        if call.name == "linear" or _normalises_last(call):
            return result.dim() - 1
        operands = [position for position in dict.fromkeys(call.producers) if position in self._axes]
        if call.name in PRODUCTS:
            return self._of_product(call, result, operands)
        if call.name not in MOVES:
            kept = self._kept(result, operands)
            if kept is not None:
                return kept
        return next((axis for axis in (self._moved(call, operand) for operand in operands) if axis is not None), None)

    def _kept(self, result: Tensor, operands: Sequence[int]) -> int | None:
        """The channels' dimension of the operand that has the result's rank, and best its number of channels."""
        alike = [operand for operand in operands if self._tensor(operand).dim() == result.dim()]
        for operand in alike:
            axis = self._axes[operand]
            if self._tensor(operand).shape[axis] == result.shape[axis]:
                return axis
        return self._axes[alike[0]] if alike else None

    def _of_product(self, call: Call, result: Tensor, operands: Sequence[int]) -> int | None:
        if len(set(call.producers)) != 1 or len(call.producers) != 1 or not operands:
            return None
        moved = self._moved(call, operands[0])
        if moved is None and self._tensor(operands[0]).dim() == result.dim():  # a weight that mixes positions
            return self._axes[operands[0]]
        return moved

    def _moved(self, call: Call, operand: int) -> int | None:
        """The one dimension along which the call's result varies if ``operand`` varies along its channels alone."""
        source, axis = self._tensor(operand).detach(), self._axes[operand]
        shape = [1] * source.dim()
        shape[axis] = -1
        numbers = torch.arange(1, source.shape[axis] + 1, device=source.device).to(source.dtype).view(shape)
        values = {p: self._x if p < 0 else self._calls[p].result for p in call.producers}
        try:
            with torch.no_grad():
                moved = first_tensor(call.rerun({**values, operand: torch.empty_like(source).copy_(numbers)}))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            return None  # an operand that was one of several
        varying = [] if moved is None else [axis for axis in range(moved.dim()) if _varies(moved, axis)]
        return varying[0] if len(varying) == 1 else None

    def _tensor(self, position: int) -> Tensor:
        tensor = self._x if position < 0 else first_tensor(self._calls[position].result)
        assert tensor is not None
        return tensor


def _normalises_last(call: Call) -> bool:
    """Whether it is a layer norm or RMS norm over the last dimension, which then holds channels."""
    shape = call.args[1] if len(call.args) > 1 else call.kwargs.get("normalized_shape", ())
    return call.name in ("layer_norm", "rms_norm") and len(shape) == 1


def _varies(tensor: Tensor, axis: int) -> bool:
    return tensor.shape[axis] > 1 and not torch.allclose(tensor, tensor.narrow(axis, 0, 1), rtol=1e-4)


def usual_channel_axis(dimensions: int) -> int:
    """Where nothing tells: the last of tokens (B, N, D), and dimension 1 otherwise."""
    return 2 if dimensions == 3 else 1
