"""Which gradients flow through what a network computes under ``torch.no_grad()``.

It is written for two ends. A *stop-gradient* takes a tensor that also reaches the logits otherwise: a rounding error
that is added back, a maximum to divide by. It is a constant there, for the network's gradient means it so. A *frozen
stem* saves memory where only parameters would want gradients: the function is the same, and the splits in it count.

So a region under no_grad computes with gradients, but what enters it from outside enters as a constant. A split inside
that depends on a split outside is neither, and an error; so is a tensor of one region that is used in another as well
as outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openood_sandi.engine import lanes
from openood_sandi.engine.errors import ReplayError

__all__ = ["Regions"]


class Regions:
    """The regions under no_grad of one pass over the network, which is just about to begin.

    A pass that is without gradients as a whole has none.
    """

    def __init__(self) -> None:
        self._matters = torch.is_grad_enabled()
        self.inside = False
        """Whether the network is in a region now."""
        self._region = 0
        self._made: dict[int, tuple[Tensor, int]] = {}
        """Tensors with a gradient that were computed in a region, and in which; each keeps its id from being reused."""
        self._used: dict[int, str] = {}
        """Where of these the ones are used that are used outside their region."""
        self._cut: dict[int, Tensor] = {}
        """Tensors that depend on a constant which has a gradient outside."""

    def switch(self, enabled: bool) -> None:
        """The network enables or disables gradients."""
        if enabled:
            self.inside = False
        elif torch.is_grad_enabled():
            self.inside, self._region = self._matters, self._region + 1
        torch._C._set_grad_enabled(enabled)

    @property
    def matter(self) -> bool:
        """Whether anything depends on regions so far: calls need to be shown only then."""
        return self.inside or bool(self._made) or bool(self._cut)

    def entering(self, name: str, target: Tensor | None, arguments: Any) -> Any:
        """The ``arguments`` that a call is to have; ``target`` is what it would change in place, if anything."""
        if not self.inside:
            return arguments
        if target is not None and self._is_from_outside(target):
            raise ReplayError(
                f"under torch.no_grad() the network changes a tensor in place ({name!r}) that it computed outside; "
                "write that out of place in the network's forward, or remove torch.no_grad() there"
            )
        return lanes.map_tensors(arguments, lambda t: lanes.constant(t) if self._is_from_outside(t) else t)

    def follow(self, name: str, operands: list[Tensor], result: Any) -> None:
        """Takes in the call ``name`` with its operands, as they were before :meth:`entering`, and its result."""
        results = lanes.tensors_in(result)
        if results and self._depends_on_a_cut(name, operands):
            self._cut.update((id(tensor), tensor) for tensor in results)
        if self.inside:
            for tensor in results:
                self._keep(tensor)

    def visit(self, site: str, tensor: Tensor, tapped: Tensor) -> None:
        """At a split point the pass goes on with ``tapped`` in place of ``tensor``."""
        if not self.inside or tapped is tensor:
            return
        if id(tensor) in self._cut or self._is_from_outside(tensor):
            raise ReplayError(
                f"split point {site!r} lies in what the network computes under torch.no_grad() from a tensor that "
                "other split points reach: as the network has it, no gradient flows there; leave it out and "
                "choose split points outside, or remove torch.no_grad() from the network's forward"
            )
        self._keep(tapped)

    def _is_from_outside(self, tensor: Tensor) -> bool:
        return tensor.requires_grad and id(tensor) not in self._made

    def _keep(self, tensor: Tensor) -> None:
        if tensor.requires_grad:
            self._made.setdefault(id(tensor), (tensor, self._region))

    def _depends_on_a_cut(self, name: str, operands: list[Tensor]) -> bool:
        cut = False
        for tensor in operands:
            if id(tensor) in self._made:
                self._note_use(name, tensor)
            cut = cut or id(tensor) in self._cut or (self.inside and self._is_from_outside(tensor))
        return cut

    def _note_use(self, name: str, tensor: Tensor) -> None:
        """The network uses a tensor with a gradient of some region, maybe of another than it is in now."""
        if self.inside and self._made[id(tensor)][1] == self._region:
            return
        use = "under it again" if self.inside else "outside of it"
        if self._used.setdefault(id(tensor), use) != use:
            raise ReplayError(
                f"the network uses a tensor that it computed under torch.no_grad() {use} ({name!r}) as well as "
                f"{self._used[id(tensor)]}: which of its gradients are meant cannot be told; "
                "choose split points behind that place, or remove torch.no_grad() from the network's forward"
            )
