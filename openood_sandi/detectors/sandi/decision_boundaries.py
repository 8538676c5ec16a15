"""fDBD, the distance of a feature to the decision boundaries: Liu and Qin, ICML 2024.

For logits l = W h + b with predicted class y, the feature h lies (l_y - l_c) / |w_y - w_c| away from the boundary to
class c. The score is the mean of that over the classes c != y, over the distance of h to the mean training feature:

    f = - mean_{c != y} (l_y - l_c) / |w_y - w_c| / |h - mean h|

Classes whose row equals that of y have no boundary with it, and are left out of the mean. OpenOOD's version sums over
classes instead, which ranks alike, and can choose its normaliser by a search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openood_sandi.engine.devices import Moved

__all__ = ["DecisionBoundaries", "fdbd"]


class DecisionBoundaries:
    """The boundaries between the classes of a linear layer.

    Args:
        weight: W (C, D). C x C distances are kept, in float64.
    """

    def __init__(self, weight: Tensor) -> None:
        rows = weight.detach().double()
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # equal rows at exactly 0
        self._inverse = torch.where(apart > 0, 1 / apart, 0.0)
        self._others = (apart > 0).sum(1).clamp_min(1).double()
        self._moved = Moved()  # the network may be taken to another device

    def distance(self, logits: Tensor) -> Tensor:
        """The mean distance (B,) to the boundaries of the predicted class, float64, from logits (B, C)."""
        logits = logits.double()
        inverse = self._moved.to("inverse", self._inverse, logits)
        others = self._moved.to("others", self._others, logits)
        values, y = logits.max(1)
        distances: Tensor = ((values[:, None] - logits) * inverse[y]).sum(1) / others[y]
        return distances


def fdbd(distance: Tensor, features: Tensor, mean: Tensor) -> Tensor:
    """f (B,), larger for OOD, from mean distances (B,), features h (B, D) and their mean over training images (D,)."""
    away = torch.linalg.vector_norm(features.double() - mean.double(), dim=1)
    f: Tensor = -distance / away.clamp_min(torch.finfo(torch.double).tiny)
    return f
