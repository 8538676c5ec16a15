"""Weights from files as :mod:`openood_sandi.weights` reads them, also MobileNetV2's for integer arithmetic and those
whose tensors have other names than the network's."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from openood_sandi import weights
from openood_sandi.weights import State, classes, load, misfits, renamed

from . import efficientnet_lite
from .imagenet import dequantised

__all__ = ["State", "classes", "load", "misfits", "read", "renamed"]


def read(path: Path) -> State:
    """The state dict in a file; SourceError where it cannot be read, or holds something else."""
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as arrays:
            if {"w0", "s0", "b0"} <= set(arrays.files):
                return dequantised(arrays)
    state = weights.read(path)
    return efficientnet_lite.renamed(state) if efficientnet_lite.FIRST in state else state
