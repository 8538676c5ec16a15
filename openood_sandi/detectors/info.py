"""What a detector says of itself: setup.py, OpenOOD's face, the comparison and the documents read it.

A detector is called as ``detector = Detector(net, **options); pred, score = detector(images)``: images (B, C, H, W) to
predicted classes (B,) int64 and scores (B,), larger = more out-of-distribution. Its options are keyword-only, with
defaults. One that needs training images has ``fit(batches)`` of images (B, C, H, W) and labels (B,), which returns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["DetectorInfo", "Needs"]

Needs = Literal["nothing", "training images", "a linear head", "a linear head by default"]


@dataclass(frozen=True)
class DetectorInfo:
    """A detector: how it is called, where it is published, what it needs.

    In this package each is a literal named ``INFO``, as setup.py reads it where torch is not installed.

    Raises:
        ValueError: a value is not what it should be.
    """

    name: str
    """As in ``--postprocessor NAME`` and ``configs/postprocessors/NAME.yml``."""
    label: str
    """As tables show it."""
    detector: str
    """Where its class is: ``"package.module:Class"``."""
    title: str
    """The paper's title."""
    venue: str
    """Where that appeared."""
    url: str
    """The paper's address."""
    year: int | None = None
    """When it appeared."""
    needs: Needs = "nothing"
    """Beside the network itself. "By default": another value of some option does without."""
    fitted: tuple[str, ...] = ()
    """The attributes that ``fit`` sets, which OpenOOD's face keeps between networks."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name={self.name!r}: expected letters, digits and underscores, as of a Python name")
        module, _, attribute = self.detector.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), attribute)):
            raise ValueError(f"detector={self.detector!r}: expected 'package.module:Class'")
        if self.needs not in get_args(Needs):
            raise ValueError(f"needs={self.needs!r}: expected one of {', '.join(map(repr, get_args(Needs)))}")
        if bool(self.fitted) != (self.needs == "training images"):
            raise ValueError(
                f"fitted={self.fitted!r} with needs={self.needs!r}: expected the names of the attributes that fit sets "
                "where the detector needs training images, and none elsewhere"
            )
