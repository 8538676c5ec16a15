"""Weights from files as :mod:`openood_sandi.weights` reads them, and those of MobileNetV2 for integer arithmetic."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from openood_sandi import weights
from openood_sandi.weights import State, classes, load, misfits, renamed

from .imagenet import dequantised

__all__ = ["State", "classes", "load", "misfits", "read", "renamed"]


def read(path: Path) -> State:
    """The state dict in a file; SourceError where it cannot be read, or holds something else."""
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as arrays:
            if {"w0", "s0", "b0"} <= set(arrays.files):
                return dequantised(arrays)
    return weights.read(path)
