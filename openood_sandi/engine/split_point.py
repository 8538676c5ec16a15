"""A split point, and how its tensor is read by image and by channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openood_sandi.engine.axes import Rows
from openood_sandi.engine.recorded import Site

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """A split point: a site, and what the dimensions of its tensor mean.

    Attributes:
        site: the place in the forward pass.
        channel_axis: the dimension that counts channels (K of Eq. 11).
        batch_axis: the dimension that the images are in.
        fold: how many rows of that dimension an image has; those of tokens, windows or views folded into the batch.
        image_major: whether an image's rows lie side by side, (B N, ...), rather than at a distance of B, (N B, ...).

    All other dimensions, and the ``fold`` rows, are positions.
    """

    site: Site
    channel_axis: int
    batch_axis: int = 0
    fold: int = 1
    image_major: bool = True

    @property
    def name(self) -> str:
        return self.site.name

    def by_image(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The split's tensor as (B, K, *positions), rows folded into the batch as the first position.

        ``lead`` dimensions before those of the split stay where they are.
        """
        rows = Rows(self.batch_axis, self.fold, self.image_major)
        channels = self.channel_axis + (self.channel_axis < self.batch_axis) + (self.fold > 1)
        return rows.unfolded(tensor, lead).movedim(channels + lead, lead + 1)

    def by_channel(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The split's tensor as (B, K, positions), with the ``lead`` dimensions before these."""
        return self.by_image(tensor, lead).unsqueeze(-1).flatten(lead + 2)

    def for_images(self, values: Tensor, tensor: Tensor) -> Tensor:
        """One number an image, ``values`` (B,), in a shape that broadcasts over the split's ``tensor``."""
        rows = values.repeat_interleave(self.fold) if self.image_major else values.repeat(self.fold)
        shape = [1] * tensor.dim()
        shape[self.batch_axis] = -1
        return rows.view(shape)
