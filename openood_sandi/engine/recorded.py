"""What a record of a forward pass is made of: places in it, and torch calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from openood_sandi.engine import lanes

__all__ = ["Call", "Produced", "Site", "name_of"]


@dataclass(frozen=True)
class Site:
    """A place in the forward pass that holds a tensor."""

    name: str
    module: str | None
    """Qualified name of the module whose output the tensor is; None for the result of a single torch call."""
    index: int
    """Which call of that module, from 1; without a module, the call's position on the tape."""


@dataclass(frozen=True)
class Produced:
    """Stands, in a call's arguments, for the result of the call at tape position ``by``; -1 for the input."""

    by: int


@dataclass(frozen=True)
class Call:
    """One torch call of a recorded forward pass."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    """Its arguments, with :class:`Produced` in place of tensors that were computed from the input."""
    result: Any
    producers: tuple[int, ...]
    """Tape positions of these, in order; empty for a call that does not depend on the input."""

    @property
    def name(self) -> str:
        return name_of(self.func)

    def rerun(self, values: Mapping[int, Tensor]) -> Any:
        """The call's result with ``values`` by tape position in place of what it was computed from."""
        args, kwargs = lanes.map_tensors((self.args, self.kwargs), lambda p: values[p.by], Produced)
        return self.func(*args, **kwargs)

    def size(self) -> int:
        """Bytes of its result."""
        return sum(tensor.numel() * tensor.element_size() for tensor in lanes.tensors_in(self.result))


def name_of(func: Callable[..., Any]) -> str:
    owner = getattr(func, "__self__", None)
    name = getattr(func, "__name__", str(func))
    return f"{getattr(owner, '__name__', '')}.{name}" if name in ("__get__", "__set__") else name
