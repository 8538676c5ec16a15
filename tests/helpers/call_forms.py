"""Torch calls in the forms that code writes them: operands by position, by keyword, in lists, as methods, in place.

Each takes the shortcut x and the branch y, both (B, 8, 8, 8), and gives one tensor of that shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Callable[[Tensor, Tensor], Tensor]


def _then(y: Tensor, *_: object) -> Tensor:
    """The first of some expressions, all of which have been evaluated."""
    return y


def _written(y: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    """A copy of y after a write into it."""
    changed = y * 1.0
    write(changed)
    return changed


def _set(index: Callable[[Tensor], object], value: Callable[[Tensor, Tensor], object]) -> Form:
    """``y[index(y)] = value(x, y)``"""
    return lambda x, y: _written(y, lambda t: t.__setitem__(index(t), value(x, y)))


def _masked(y: Tensor) -> Tensor:
    return y > 0.3


OPERANDS: dict[str, Form] = {
    "add other=": lambda x, y: torch.add(y, other=x),
    "add all by keyword": lambda x, y: torch.add(input=x, other=y, alpha=2),
    "add clean of higher rank": lambda x, y: torch.add(y[0, 0], other=torch.ones_like(x.detach())) * x + y,
    "sub method": lambda x, y: y.sub(other=x, alpha=0.5),
    "mul other=": lambda x, y: torch.mul(y, other=x),
    "mul clean first": lambda x, y: torch.mul(torch.full_like(x.detach(), 0.7), other=y),
    "mul of lower rank": lambda x, y: torch.mul(x, other=y.mean((0, 1))),
    "mul of lower rank first": lambda x, y: torch.mul(y.mean((0, 1)), other=x),
    "div rounding": lambda x, y: y + torch.div(x, other=y.detach(), rounding_mode="floor").clamp(-2, 2),
    "maximum": lambda x, y: torch.maximum(y, other=x),
    "minimum method": lambda x, y: y.minimum(other=x),
    "in place other=": lambda x, y: y.add_(other=x),
    "in place mul other=": lambda x, y: y.mul_(other=x.sigmoid()),
    "in place operator": lambda x, y: y.__iadd__(x),
    "clamp tensors": lambda x, y: torch.clamp(y, min=x - 1, max=x + 1),
    "clamp clean tensor": lambda x, y: y.clamp(max=torch.linspace(0, 1, 8).to(y)),
    "clamp_max keyword": lambda x, y: torch.clamp_max(input=y, max=0.5),
    "where keywords": lambda x, y: torch.where(x > 0, input=y, other=x),
    "where all by keyword": lambda x, y: torch.where(condition=y > 0, input=y, other=x),
    "where method": lambda x, y: y.where(condition=x > 0.5, other=x * 2),
    "where scalar": lambda x, y: torch.where(y > 0, 0.25, other=x),
    "lerp": lambda x, y: torch.lerp(input=x, end=y, weight=0.3),
    "lerp tensor": lambda x, y: torch.lerp(x, end=y, weight=y.sigmoid()),
    "addcmul": lambda x, y: torch.addcmul(y, tensor1=x, tensor2=y, value=0.5),
    "pow": lambda x, y: torch.pow(y.abs() + 0.1, exponent=x.sigmoid()),
    "atan2": lambda x, y: torch.atan2(y, other=x + 2),
    "cat": lambda x, y: torch.cat(tensors=[y, x], dim=1)[:, 4:12],
    "cat axis": lambda x, y: torch.cat([y, x], axis=1)[:, 4:12],
    "cat in the batch": lambda x, y: torch.cat(tensors=(x, y), dim=0)[len(x) :] + x,
    "stack": lambda x, y: torch.stack(tensors=[x, y], dim=2).mean(dim=2),
    "stack last": lambda x, y: torch.stack((x, y), -1).amax(dim=-1),
    "split": lambda x, y: torch.cat(torch.split(y, split_size_or_sections=4, dim=1)[::-1], dim=1),
    "chunk": lambda x, y: torch.cat(y.chunk(chunks=2, dim=1)[::-1], dim=1) + x,
    "unbind": lambda x, y: sum(torch.unbind(input=torch.stack([x, y]), dim=0)),
    "tensor_split": lambda x, y: torch.cat(torch.tensor_split(y, indices=[3], dim=1)[::-1], 1),
    "einsum": lambda x, y: torch.einsum("bchw,bdhw->bcd", [x, y]).mean(2)[..., None, None] * y,
    "einsum operands": lambda x, y: torch.einsum("bchw,bkhw->bchw", x, y) / 8,
    "matmul": lambda x, y: torch.matmul(input=x, other=y),
    "bmm": lambda x, y: torch.bmm(x.flatten(2), mat2=y.flatten(2).transpose(1, 2)).mean(2)[..., None, None] + y,
    "normalize": lambda x, y: F.normalize(input=y, dim=1) + x,
    "interpolate": lambda x, y: F.interpolate(input=y, scale_factor=2, mode="nearest")[:, :, ::2, 1::2],
    "pad": lambda x, y: F.pad(input=y, pad=(1, 1), mode="constant", value=0.5)[..., 1:-1] * x,
    "relu by keyword": lambda x, y: F.relu(input=y, inplace=True) + x,
    "layer norm": lambda x, y: F.layer_norm(input=y, normalized_shape=[8], weight=x[0, 0, 0]),
    "cosine": lambda x, y: F.cosine_similarity(x1=x, x2=y, dim=1)[:, None] * y,
    "softmax": lambda x, y: F.softmax(input=y, dim=1) * x,
    "gather": lambda x, y: torch.gather(input=y, dim=1, index=x.argsort(dim=1)),
    "scatter": lambda x, y: torch.scatter(y, dim=1, index=x.argsort(dim=1), src=x),
    "index_select": lambda x, y: torch.index_select(input=y, dim=1, index=torch.arange(7, -1, -1)) + x,
    "masked_fill": lambda x, y: y.masked_fill(mask=x > 0.5, value=-0.25),
    "masked_fill tensor": lambda x, y: torch.masked_fill(y, x > 0.5, y.mean()),
    "masked_scatter": lambda x, y: torch.masked_scatter(y, mask=x > 0.5, source=x * y),
    "comparison in place": lambda x, y: _then(m := y * 1.0, m.gt_(0.2)) + m + x,
    "0-dimensional": lambda x, y: torch.mul(y, other=x.abs().amax()) + torch.add(x.mean(), other=y.mean()),
    "view": lambda x, y: y.transpose(1, 2).contiguous().view(size=(len(y), 64, 8)).view_as(other=y) * x,
}

LAYOUTS: dict[str, Form] = {
    "channels last": lambda x, y: (x + y).contiguous(memory_format=torch.channels_last),
    "channels last viewed": lambda x, y: (
        y.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(len(y), 64, 8).view(len(y), 8, 8, 8)
    ),
    "to": lambda x, y: y.to(memory_format=torch.channels_last) * x,
    "to dtype": lambda x, y: y.to(torch.float64, memory_format=torch.channels_last, copy=True) + x,
    "clone": lambda x, y: torch.clone(y, memory_format=torch.channels_last) + x,
    "zeros_like": lambda x, y: torch.zeros_like(y, memory_format=torch.channels_last) + x * y,
    "empty_like": lambda x, y: torch.empty_like(y, memory_format=torch.contiguous_format).copy_(x) * y,
    "strides": lambda x, y: (
        (lambda t: t.as_strided(t.shape, t.stride()))(F.conv2d(y, torch.ones(8, 8, 1, 1).to(y)).mT) * x
    ),
    "strides from a place on": lambda x, y: (
        torch.as_strided(y.contiguous(), size=(len(y), 7, 8, 8), stride=(512, 64, 8, 1), storage_offset=64).mean(1)[
            :, None
        ]
        + x
    ),
    "preserve": lambda x, y: y.clone(memory_format=torch.preserve_format).double(memory_format=torch.channels_last),
}

WRITES: dict[str, Form] = {
    "shape in place": lambda x, y: _written(y, lambda t: t.unsqueeze_(0).squeeze_(0)) + y,
    "scalar": _set(_masked, lambda x, y: -0.5),
    "integer scalar": _set(_masked, lambda x, y: 1),
    "tensor": _set(_masked, lambda x, y: x.mean()),
    "one element": _set(_masked, lambda x, y: y[0, 0, 0, :1]),
    "mask of the other": lambda x, y: _written(y, lambda t: t.__setitem__(x > 0.5, 0.1)),
    "into a clean tensor": lambda x, y: _written(torch.zeros_like(y), lambda t: t.__setitem__(y > 0, 1.0)) * x,
    "leading dimensions": _set(lambda t: t.mean((2, 3)) > 0.1, lambda x, y: 0.2),
    "leading dimensions, map": _set(lambda t: t.mean((2, 3)) > 0.1, lambda x, y: x.mean((0, 1))),
    "leading dimensions, one row": _set(lambda t: t.mean((2, 3)) > 0.1, lambda x, y: x[:1, 0]),
    "behind a slice": _set(lambda t: (slice(None), t.mean((0, 2, 3)) > 0.0), lambda x, y: 0.3),
    "behind a slice, value": _set(lambda t: (slice(None), t.mean((0, 2, 3)) > 0), lambda x, y: x.mean(1, keepdim=True)),
    "behind an ellipsis": _set(lambda t: (..., t.mean((0, 1, 2)) > 0.0), lambda x, y: x.mean(-1, keepdim=True)),
    "with an integer": _set(lambda t: (slice(None), 2, t.mean((0, 1)) > 0.0), lambda x, y: 0.4),
    "before a slice": _set(lambda t: (t.mean((1, 2, 3)) > 0.0, slice(None), slice(None, None, 2)), lambda x, y: 0.5),
    "a number of dimension 0": _set(lambda t: t.mean() > 0, lambda x, y: 0.5),
    "integers": _set(lambda t: (torch.arange(len(t)), t.mean((2, 3)).argmax(1)), lambda x, y: x[:, 0]),
    "integers, scalar": _set(lambda t: (slice(None), t.mean((0, 2, 3)).topk(2).indices), lambda x, y: 0.5),
    "index_put_": lambda x, y: _written(y, lambda t: t.index_put_((t > 0.2,), torch.tensor(0.2).to(t))),
    "index_put accumulate": lambda x, y: torch.index_put(y, (x > 0.2,), values=x.mean(), accumulate=True),
    "index_put integers": lambda x, y: y.index_put(indices=(x.mean((1, 2, 3)).argsort(),), values=x),
    "masked_fill_": lambda x, y: _written(y, lambda t: t.masked_fill_(mask=t > 0.2, value=0.2)),
    "masked_scatter_": lambda x, y: _written(y, lambda t: t.masked_scatter_(x > 0.2, x * 2)),
    "fill_": lambda x, y: torch.zeros_like(y).fill_(x.mean()) + y,
    "fill_ keyword": lambda x, y: torch.zeros_like(y).fill_(value=0.3) * x + y,
    "copy_": lambda x, y: torch.zeros_like(y).copy_(x[:, :1]) * y,
    "slice": _set(lambda t: (slice(None), slice(0, 4)), lambda x, y: x[:, 4:]),
    "scatter_": lambda x, y: _written(y, lambda t: t.scatter_(1, x.argmax(1, keepdim=True), 0.5)),
    "index_add_": lambda x, y: _written(y, lambda t: t.index_add_(1, x.mean((0, 2, 3)).topk(2).indices, x[:, :2])),
    "index_fill_": lambda x, y: _written(y, lambda t: t.index_fill_(1, x.mean((0, 2, 3)).topk(2).indices, 0.5)),
}

REFUSED: dict[str, Form] = {
    "__getitem__": lambda x, y: y + y[y > 0].mean(),
    "masked_select": lambda x, y: y + torch.masked_select(y, mask=x > 0).mean(),
    "nonzero": lambda x, y: y * len(torch.nonzero(y > 0)),
    "unique": lambda x, y: y + len(torch.unique(y.detach(), sorted=True)),
    "is_nonzero": lambda x, y: y * 2 if torch.is_nonzero((y.sum() * 997.3).floor().remainder(2)) else x,
    "__contains__": lambda x, y: y * 2 if 1 in (y * 997.3).floor().remainder(2)[0, 0, 0, :1] else x,
    "item": lambda x, y: y * y.mean().item(),
    "tolist": lambda x, y: y * sum(y.mean((1, 2, 3)).tolist()),
    "numpy": lambda x, y: y * float(y.detach().numpy().mean()),
    "equal": lambda x, y: y * 2 if torch.equal((y * 997.3).floor().remainder(2)[0, 0, 0, :1], torch.ones(1)) else x,
    "__repr__": lambda x, y: y * len(repr(y)) if hash(repr(y)) % 2 else y,
    "data_ptr": lambda x, y: y * (1 + y.data_ptr() % 2),
    ".data": lambda x, y: _then(y, setattr(y, "data", x.detach())),
}
"""What has no single result of one form for all perturbed copies, by the name that the error is to tell."""

SAME_IN_EVERY_COPY: dict[str, Form] = {
    "form": lambda x, y: y.view(y.shape[0], -1).view(len(y), 8, *y.size()[2:]) / y.numel() * y.stride(1) * y.dim(),
    "dtype and device": lambda x, y: torch.ones(8, dtype=y.dtype, device=y.device) * y if y.is_floating_point() else x,
    "finite": lambda x, y: y * 2 if bool(torch.isfinite(y).all()) else x,
    "all of a kind": lambda x, y: y * 2 if torch.allclose(y, x, atol=100) and torch.equal(y > -1e9, x > -1e9) else x,
    "in": lambda x, y: y * 2 if 12345.0 in y else y + x,
    "whole numbers": lambda x, y: y * (1 + sum((y > 1e3).sum((1, 2, 3)).tolist())),
    "nothing": lambda x, y: _then(y + x, torch._assert(y.mean() < 1e6, "too large")),
}
"""Python data from perturbed tensors on which the way through the network may well depend."""

OUT: dict[str, Form] = {
    "position": lambda x, y: torch.mul(x, y, out=torch.empty_like(y)) + y,
    "used afterwards": lambda x, y: _then(o := torch.empty_like(y), torch.mul(x, other=y, out=o)) + y,
    "empty": lambda x, y: torch.mul(x, y, out=torch.empty(0).to(y)) + y,
}


def _attention(mask: Callable[[Tensor, Tensor], Tensor]) -> Form:
    def attend(x: Tensor, y: Tensor) -> Tensor:
        query, key = (t.flatten(2).transpose(1, 2)[:, None] for t in (y, x))
        out = F.scaled_dot_product_attention(query, key, value=query, attn_mask=mask(query, key))
        return out[:, 0].transpose(1, 2).reshape_as(y)

    return attend


ATTENTION: dict[str, Form] = {
    "numbers": _attention(lambda query, key: (query @ key.transpose(-1, -2)).tanh()),
    "numbers of lower rank": _attention(lambda query, key: (query @ key.transpose(-1, -2)).mean((0, 1))),
    "Boolean": _attention(lambda query, key: query @ key.transpose(-1, -2) > -9),
    "clean": _attention(lambda query, key: torch.zeros(64, 64).to(query.detach()).triu(1)),
}

BATCH_NORM: dict[str, Form] = {
    "training": lambda x, y: F.batch_norm(y, None, None, training=True) + x,
    "training by position": lambda x, y: torch.batch_norm(y, None, None, None, None, True, 0.1, 1e-5, False) + x,
    "all by keyword": lambda x, y: F.batch_norm(input=y, running_mean=_fixed(0, x), running_var=_fixed(2, x)) + x,
}


def _fixed(value: float, like: Tensor) -> Tensor:
    return torch.full((8,), value, dtype=like.dtype)
