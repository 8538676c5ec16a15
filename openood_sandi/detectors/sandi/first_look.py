"""Whether a detector's first scores tell images apart at all, and what to say where they do not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from torch import Tensor

from openood_sandi.engine.devices import fetch

__all__ = ["tells_apart"]

_log = logging.getLogger(__name__)


def tells_apart(x: Tensor, tau: Tensor, detector: object, is_known: bool, why_zero: Callable[[], str]) -> bool:
    """Whether it is settled, by the scores (B,) of images (B, C, H, W), if images can be told apart.

    If they are seen not to be, a warning names the ``detector``, unless that ``is_known``.

    Raises:
        ValueError: all scores are zero; ``why_zero`` says why, where that is not because every gradient is.
    """
    if len(x) < 2:
        return False
    scores = {score for score in fetch(tau)[0].tolist() if math.isfinite(score)}
    if len(scores) != 1 or bool((x == x[:1]).all()):  # seldom looked at: it takes memory and a wait
        return len(scores) > 1
    if scores == {0.0}:
        raise ValueError(why_zero() or _NO_GRADIENTS)
    if not is_known:
        _log.warning(
            "all %d images of the first batch have the same score, %.6g, so they cannot be told apart; try another "
            "variant or other splits: %r",
            *(len(x), *scores, detector),
        )
    return True


_NO_GRADIENTS = (
    "every gradient of the network is zero, so that no image can be told from another: its output is saturated (hard "
    "decisions, a softmax of large logits) or does not depend on the split points; pass the network that returns its "
    "logits"
)
