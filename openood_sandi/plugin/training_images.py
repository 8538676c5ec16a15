"""A fit to OpenOOD's training images as a test has them.

Its training loader crops and mirrors them at random, and its main.py sets a postprocessor up before ``net.eval()``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

__all__ = ["as_tested", "in_eval_mode"]

_log = logging.getLogger(__name__)


def as_tested(train: Any, val: Any) -> Any:
    """The images of ``train``, in the order of its list, with the transformation of ``val``.

    Args:
        train: a loader of OpenOOD's training images. Another's stays as it is: its owner chose its transformation.
        val: a loader of its validation images, or None: then the images stay as they are, with a warning.
    """
    dataset: Any = getattr(train, "dataset", None)
    if not isinstance(train, DataLoader) or not hasattr(dataset, "transform_image"):
        return train
    tested = getattr(getattr(val, "dataset", None), "transform_image", None)
    if tested is None:
        _log.warning("no validation images show how test images are transformed: the fit is to augmented ones")
        return train
    dataset = copy.copy(dataset)
    dataset.preprocessor = dataset.transform_image = tested  # the first prepares an image, the second is applied
    workers, collate = train.num_workers, train.collate_fn
    return DataLoader(dataset, batch_size=train.batch_size or 64, num_workers=workers, collate_fn=collate)


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and as it was afterwards."""
    before = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
